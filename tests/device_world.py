"""The models of worker_world on `torch.device("cpu")` as the device: its code, and no GPU.

What stands in for the driver is one class: a graph that repeats calls, as torch.cuda.CUDAGraph does
what was launched. Like that one it does nothing while it records.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from muxrt.core import Copy, Work
from muxrt.models.device_llama import DeviceLlama
from muxrt.worker.device_runner import DeviceCopier, DeviceResident, DeviceRunner
from muxrt.worker.device_storage import DeviceStorage
from muxrt.worker.flight import Share
from muxrt.worker.graphs import Steps
from tests.worker_world import SHAPES, Desk

# OpenMP's threads wait for each other where other processes run beside the tests.
torch.set_num_threads(1)

CPU = torch.device("cpu")
ALL = Share("all", torch.cpu.Stream(), 4)


class Repeated:
    """Stands in for a CUDA graph."""

    made = 0

    def __init__(self) -> None:
        self.replays = 0
        self._run: Callable[[], None] | None = None
        Repeated.made += 1

    def capture(self, run: Callable[[], None]) -> None:
        assert self._run is None
        self._run = run

    def replay(self) -> None:
        assert self._run is not None
        self.replays += 1
        self._run()


def steps(budget_bytes: int = 1 << 20) -> Steps:
    """Graphs that take no memory."""
    return Steps(budget_bytes, Repeated, lambda: 0)


def device_llamas(home: Path, dtype: torch.dtype = torch.float32) -> dict[str, DeviceLlama]:
    return {name: DeviceLlama.load(home / name, dtype, CPU) for name in SHAPES}


class OnDevice:
    """Runs works at once, one after the other, on the test's own thread."""

    def __init__(
        self,
        home: Path,
        desk: Desk,
        kept: Steps | None = None,
        choose: Callable[[], Share] = lambda: ALL,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.storage = DeviceStorage(desk.plan, CPU)
        self.residents = {
            name: DeviceResident.of(llama, name, self.storage)
            for name, llama in device_llamas(home, dtype).items()
        }
        self.desk = desk
        self.runner = DeviceRunner(self.residents, kept or steps(), choose)
        self._copier = DeviceCopier(self.storage, desk.plan.arena.block_bytes, ALL)

    def __call__(self, work: Work) -> None:
        launch = self._copier.launch if isinstance(work, Copy) else self.runner.launch
        self.desk.note(work, launch(work).wait())
