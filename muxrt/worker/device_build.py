"""From a unit's plan and its models on a device to lanes that can run them there."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch

from muxrt.engine.build import UnitPlan
from muxrt.models.device_llama import DeviceLlama
from muxrt.worker.device_lanes import DeviceLane, Shares
from muxrt.worker.device_process import check_mps, lane_setups
from muxrt.worker.device_runner import DeviceCopier, DeviceResident, DeviceRunner
from muxrt.worker.device_storage import DeviceStorage
from muxrt.worker.device_streams import open_shares, open_steps, plain_share
from muxrt.worker.driver import open_driver
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.flight import Launch
from muxrt.worker.lanes import Lane
from muxrt.worker.process_lane import ProcessLane


def open_device_executor(
    plan: UnitPlan,
    models: dict[str, DeviceLlama],
    device: torch.device,
    shares: Shares | None = None,
) -> LaneExecutor:
    """Reserve the unit's memory and start its lanes on `device`; `models` is emptied.

    `shares` is what threads get of a device that other units of this process use, too; whoever
    made it closes it. Raises ConfigError where the device has too few SMs, MuxrtError where a lane
    cannot start.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.callback(torch.cuda.empty_cache)  # what the lanes' streams left behind
        storage = DeviceStorage(plan, device)
        stack.callback(storage.close)
        if plan.spec.lanes.kind == "mps":
            opening = _open_processes(plan, models, storage, stack)
        else:
            opening = _open_threads(plan, models, storage, stack, shares)
        lanes: list[Lane] = []
        for lane in opening:
            stack.callback(lane.close)
            lanes.append(lane)
        for lane in lanes:
            lane.wait_started()
        return LaneExecutor(lanes, stack.pop_all())
    raise AssertionError("an exit stack swallows nothing")


def _open_threads(
    plan: UnitPlan,
    models: dict[str, DeviceLlama],
    storage: DeviceStorage,
    stack: ExitStack,
    shares: Shares | None,
) -> Iterator[Lane]:
    shares = shares or open_shares(plan, storage.device, stack)
    residents = {name: DeviceResident.of(models.pop(name), name, storage) for name in plan.models}
    for number in range(plan.num_lanes):
        make = _launcher(plan, residents, shares, number)
        yield DeviceLane(f"lane-{number}", make, storage.device, shares, number)
    yield _copy_lane(plan, storage)


def _open_processes(
    plan: UnitPlan, models: dict[str, DeviceLlama], storage: DeviceStorage, stack: ExitStack
) -> Iterator[Lane]:
    check_mps()
    owned = {name: models.pop(name) for name in plan.models}
    stack.callback(owned.clear)  # its memory is used until the last lane has ended
    for setup in lane_setups(plan, owned, storage, open_driver()):
        yield ProcessLane.start(setup)
    yield _copy_lane(plan, storage)


def _copy_lane(plan: UnitPlan, storage: DeviceStorage) -> DeviceLane:
    """It moves bytes beside batches, behind them where both want SMs."""
    share = plain_share("copy", storage.device, 0)
    copier = DeviceCopier(storage, plan.arena.block_bytes, share)
    return DeviceLane("copy", lambda: copier.launch, storage.device)


def _launcher(
    plan: UnitPlan, residents: dict[str, DeviceResident], shares: Shares, number: int
) -> Callable[[], Launch]:
    def make() -> Launch:
        steps = open_steps(plan, next(iter(residents.values())).llama.device)
        return DeviceRunner(residents, steps, lambda: shares.choose(number)).launch

    return make
