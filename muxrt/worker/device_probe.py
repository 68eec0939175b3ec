"""Lanes of a GPU for a probe: shares of its SMs that are used one at a time, and two halves."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from muxrt.config.placement import Mesh
from muxrt.engine.build import UnitPlan
from muxrt.models.device_llama import DeviceLlama
from muxrt.worker.device_lanes import DeviceLane
from muxrt.worker.device_runner import DeviceResident, DeviceRunner
from muxrt.worker.device_storage import DeviceStorage
from muxrt.worker.device_streams import (
    check_device,
    device_sms,
    open_green,
    open_steps,
    plain_share,
)
from muxrt.worker.driver import open_driver
from muxrt.worker.flight import Launch, Share
from muxrt.worker.green import Granule
from muxrt.worker.probe import Opened, executor_of


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that can be computed on, and split."""

    device: torch.device
    name: str
    memory_bytes: int
    num_sms: int
    granule: Granule
    versions: tuple[str, ...]  # of CUDA, here and in the driver


def take_gpu(ordinal: int) -> Gpu:
    """That GPU, current from now on. Raises MuxrtError without it, DriverError without green."""
    device = torch.device("cuda", ordinal)
    check_device(device)
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    num_sms, granule = device_sms(device)
    major, minor = divmod(open_driver().version // 10, 100)
    versions = (f"CUDA {torch.version.cuda}", f"driver for CUDA {major}.{minor}")
    return Gpu(device, properties.name, properties.total_memory, num_sms, granule, versions)


class OnGpu:
    """A lane for each of `sm_counts`, then one for each half."""

    warm_runs = 2  # compiles, then captures

    def __init__(
        self,
        models: dict[str, DeviceLlama],
        device: torch.device,
        sm_counts: Sequence[int],
        halves: Sequence[int],
    ) -> None:
        """Counts are what the driver hands out (`share_out`), or all. `models` is emptied."""
        self.num_lanes = len(sm_counts) + len(halves)
        self.mesh = Mesh(device="gpu", gpus=(device.index or 0,))
        self._models = models
        self._device = device
        self._sm_counts = sm_counts
        self._halves = halves

    def open(self, plan: UnitPlan) -> Opened:
        device = self._device
        with ExitStack() as stack:
            storage = DeviceStorage(plan, device)
            stack.callback(storage.close)
            residents = {
                name: DeviceResident.of(self._models.pop(name), name, storage)
                for name in plan.models
            }
            shares = [self._share(count, stack) for count in self._sm_counts]
            shares += self._split(self._halves, stack)
            lanes = [
                DeviceLane(f"lane-{number}", _launcher(plan, residents, share, device), device)
                for number, share in enumerate(shares)
            ]
            return Opened(executor_of(lanes, stack), storage.arena)
        raise AssertionError("an exit stack swallows nothing")

    def _share(self, sm_count: int, stack: ExitStack) -> Share:
        total, _ = device_sms(self._device)
        if sm_count >= total:
            return plain_share("whole", self._device, 0)
        return self._split((sm_count, total - sm_count), stack)[0]

    def _split(self, counts: Sequence[int], stack: ExitStack) -> list[Share]:
        return open_green(open_driver(), self._device, counts, [0] * len(counts), stack)


def _launcher(
    plan: UnitPlan, residents: dict[str, DeviceResident], share: Share, device: torch.device
) -> Callable[[], Launch]:
    def make() -> Launch:
        return DeviceRunner(residents, open_steps(plan, device), lambda: share).launch

    return make
