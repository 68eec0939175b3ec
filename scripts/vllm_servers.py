"""vLLM for CPUs as its users run it: its environment, its settings, a server per model."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from bench_serving import Serving, ask_each

from muxrt.cli.endpoint import choose_port

ROOT = Path(__file__).parent.parent
VENV = Path(os.environ.get("MUXRT_VLLM_VENV") or ROOT / ".venv-vllm")
HOST = "127.0.0.1"
POLL_S = 0.5
START_S = 900.0


class NoVllm(RuntimeError):
    """It is not installed, or does not start."""


def environment(cores: Sequence[int], bound: bool) -> dict[str, str]:
    """Variables of a vLLM process: all `cores` bound to it, or one thread that runs where it may.

    Raises NoVllm.
    """
    preload = VENV / "preload.txt"
    if not preload.is_file():
        raise NoVllm(f"{VENV} is not there: bash scripts/setup_vllm_cpu.sh makes it")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {
        "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",  # its build tools
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


@dataclass(frozen=True, slots=True)
class Server:
    """One `vllm serve`, in a session of its own."""

    model: str
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def is_healthy(self) -> bool:
        """Whether it takes requests. Raises NoVllm where it has ended."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise NoVllm(f"vllm serve {self.model} gave up; its log {self.log} ends:\n{tail}")
        try:
            with urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        """End it and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def vllm_serving(
    folders: Sequence[Path], kv_bytes: int, max_model_len: int, env: Mapping[str, str]
) -> Iterator[Serving]:
    """A server per model, all started at once, each with `kv_bytes` of KV memory."""
    logs = Path(tempfile.mkdtemp(prefix="muxrt-vllm-"))
    options = ["--dtype", "float32", "--max-model-len", str(max_model_len)]
    options += ["--kv-cache-memory-bytes", str(kv_bytes), "--host", HOST]
    begun_s = time.monotonic()
    with ExitStack() as stack:
        servers = []
        for folder in folders:
            server = _start(folder, options, logs / f"{folder.name}.log", env)
            stack.callback(server.kill)
            servers.append(server)
        _wait_healthy(servers, begun_s + START_S)
        ask_each({server.model: server.url for server in servers})
        ready_s = time.monotonic() - begun_s
        pids = tuple(server.process.pid for server in servers)
        yield Serving(tuple(server.url for server in servers), pids, ready_s)


def _start(folder: Path, options: Sequence[str], log: Path, env: Mapping[str, str]) -> Server:
    port = choose_port(HOST, 0)
    command = [str(VENV / "bin" / "vllm"), "serve", str(folder), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--served-model-name", folder.name, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    return Server(folder.name, process, f"http://{HOST}:{port}", log)


def _wait_healthy(servers: Sequence[Server], until_s: float) -> None:
    waiting = list(servers)
    while waiting := [server for server in waiting if not server.is_healthy()]:
        if time.monotonic() > until_s:
            raise NoVllm(f"vllm serve {waiting[0].model} is not ready; its log: {waiting[0].log}")
        time.sleep(POLL_S)
