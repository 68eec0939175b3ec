"""The models of worker_world on `torch.device("cpu")` as the device: its code, and no GPU.

What stands in for the driver is one class: a graph that repeats calls (played_graphs.py).
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
from tests.played_graphs import Repeated, steps
from tests.worker_world import SHAPES, Desk

__all__ = ["ALL", "CPU", "OnDevice", "Repeated", "Share", "device_llamas", "steps"]

# OpenMP's threads wait for each other where other processes run beside the tests.
torch.set_num_threads(1)

CPU = torch.device("cpu")
ALL = Share("all", torch.cpu.Stream(), 4)


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
