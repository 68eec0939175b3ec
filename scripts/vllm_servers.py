"""vLLM for CPUs as its users run it: its environment, its settings, its servers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = Path(os.environ.get("MUXRT_VLLM_VENV") or ROOT / ".venv-vllm")


class NoVllm(RuntimeError):
    """The environment is not there."""


def environment(cores: Sequence[int], bound: bool) -> dict[str, str]:
    """Variables of a vLLM process: all `cores` bound to it, or one thread that runs where it may.

    Raises NoVllm.
    """
    preload = VENV / "preload.txt"
    if not preload.is_file():
        raise NoVllm(f"{VENV} is not there: bash scripts/setup_vllm_cpu.sh makes it")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {
        # The C++ compiler of torch.compile looks for ninja there.
        "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "LD_PRELOAD": os.pathsep.join(preload.read_text().split()),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if bound:
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    else:
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return env


def said(env: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` a reader must know to believe the figures."""
    preloaded = " ".join(Path(path).name for path in env["LD_PRELOAD"].split(os.pathsep))
    names = ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")
    return {"LD_PRELOAD": preloaded, **{name: env[name] for name in names if name in env}}
