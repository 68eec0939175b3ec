"""What `muxrt profile` measures on: the cores of this machine, or the SMs of a GPU."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from muxrt.config.model import ModelShape
from muxrt.config.placement import ModelSpec
from muxrt.config.serve import RANKS
from muxrt.engine.messages import Loading
from muxrt.errors import ConfigError
from muxrt.worker.device_probe import OnGpu, take_gpu
from muxrt.worker.green import Granule, share_out
from muxrt.worker.load import load_device_model, load_model
from muxrt.worker.probe import OnCores, Place
from muxrt.worker.rank_probe import OnRanks

GPU_MEMORY_SHARE = 0.9  # of a GPU: the rest is for activations, graphs and CUDA itself


@dataclass(frozen=True, slots=True)
class Target:
    """A device whose parts, cores or SMs, lanes share; or `tp` that are alike, lanes over all."""

    device: str  # "cpu" or "gpu"
    name: str  # of the hardware, for people
    kind: str  # in plans
    parts: int
    word: str  # for one part in the plural
    lanes: tuple[int, ...]  # parts of each lane, if nobody says otherwise
    halves: tuple[int, ...]  # of the lanes that run beside each other; one where it cannot be split
    memory_bytes: int  # what plans may give to weights and KV
    versions: tuple[str, ...]
    check_lane: Callable[[int], bool]  # whether a lane may have so many parts
    load: Callable[[ModelSpec, ModelShape], Any]
    place: Callable[[dict[str, Any], Sequence[int]], Place]  # lanes, then halves
    tp: int = 1


def cpu_target(cores: Sequence[int], tp: int = 1) -> Target:
    """These cores, in `tp` equal parts of which each is a rank's. Raises ConfigError."""
    if tp not in RANKS or tp > len(cores):
        raise ConfigError(
            f"--tp: found {tp}, expected 1, 2, 4 or 8 ranks with a core each: there are"
            f" {len(cores)}"
        )
    total = len(cores) // tp
    first = total - total // 2
    halves = tuple(half for half in (first, total - first) if half)

    def place(models: dict[str, Any], lanes: Sequence[int]) -> Place:
        def share(own: Sequence[int]) -> list[Sequence[int]]:
            beside = [own[:first], own[first:]][: len(halves)]
            return [*(own[:size] for size in lanes), *beside]

        return OnCores(models, share(cores)) if tp == 1 else OnRanks(models, cores, tp, share)

    def load(spec: ModelSpec, shape: ModelShape) -> Any:
        return load_model("profile", spec, shape, _quiet) if tp == 1 else (spec, shape)

    return Target(
        device="cpu",
        name=cpu_name(),
        kind=f"cpu-{total}c",
        parts=total,
        word="cores",
        lanes=tuple(sorted({max(1, total // 4), max(1, total // 2), total})),
        halves=halves,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // tp,
        versions=_versions("numba", "numpy", "torch"),
        check_lane=lambda size: 1 <= size <= total,
        load=load,
        place=place,
        tp=tp,
    )


def gpu_target(ordinal: int) -> Target:
    """That GPU. Raises MuxrtError where it cannot be computed on, or not be split."""
    gpu = take_gpu(ordinal)
    total, granule = gpu.num_sms, gpu.granule
    halves = share_out(total, granule, (50, 50))
    return Target(
        device="gpu",
        name=gpu.name,
        kind=gpu.name.lower().replace(" ", "-"),
        parts=total,
        word="SMs",
        lanes=sm_lanes(total, granule),
        halves=halves,
        memory_bytes=round(gpu.memory_bytes * GPU_MEMORY_SHARE),
        versions=(*_versions("numpy", "torch", "triton"), *gpu.versions),
        check_lane=lambda size: size == total or _can_split(size, total, granule),
        load=lambda spec, shape: load_device_model("profile", spec, shape, gpu.device, _quiet),
        place=lambda models, lanes: OnGpu(models, gpu.device, lanes, halves),
    )


def sm_lanes(total: int, granule: Granule) -> tuple[int, ...]:
    """SMs of lanes that show how speed grows with them: a quarter, a half, three quarters, all."""
    parts = {share_out(total, granule, (pct, 100 - pct))[0] for pct in (25, 50, 75)}
    return (*sorted(parts), total)


def _can_split(size: int, total: int, granule: Granule) -> bool:
    return size % granule.step == 0 and granule.least <= size <= total - granule.least


def parse_lanes(text: str | None, target: Target) -> tuple[int, ...]:
    """Parts of each lane, ascending; None: the target's own. Raises ConfigError."""
    if text is None:
        return target.lanes
    sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(target.check_lane(size) for size in sizes):
        example = ",".join(str(size) for size in target.lanes)
        raise ConfigError(
            f"--lanes: found {text!r}, expected numbers of {target.word} such as {example}:"
            f" there are {target.parts}"
        )
    return tuple(sorted(set(sizes)))


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions(*packages: str) -> tuple[str, ...]:
    return (
        f"python {platform.python_version()}",
        *(f"{package} {version(package)}" for package in packages),
    )


def _quiet(_: Loading) -> None:
    """Weights load in a moment beside the measuring."""
