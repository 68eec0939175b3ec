"""From a unit's plan and its models to lanes that can run them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from muxrt.engine.build import UnitPlan
from muxrt.models.llama import Llama
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.kv_storage import Storage, share_weights
from muxrt.worker.lanes import Lane, ThreadLane, split_cores
from muxrt.worker.process_lane import LaneSetup, ProcessLane, SharedModel
from muxrt.worker.runner import Copier, Resident, Runner


def open_executor(plan: UnitPlan, models: dict[str, Llama], cores: Sequence[int]) -> LaneExecutor:
    """Reserve the unit's memory and start its lanes on `cores`; `models` is emptied.

    Raises ConfigError where the lanes need more cores, MuxrtError where one cannot start.
    """
    shares = split_cores(cores, plan.spec.lanes.split)
    open_lanes = {"cores": _open_threads, "processes": _open_processes}[plan.spec.lanes.kind]
    with ExitStack() as stack:
        storage = Storage(plan)
        stack.callback(storage.close)
        lanes: list[Lane] = []
        for lane in open_lanes(plan, models, shares, storage, stack):
            stack.callback(lane.close)
            lanes.append(lane)
        for lane in lanes:
            lane.wait_started()
        return LaneExecutor(lanes, stack.pop_all())
    raise AssertionError("an exit stack swallows nothing")


def _open_threads(
    plan: UnitPlan,
    models: dict[str, Llama],
    shares: Sequence[Sequence[int]],
    storage: Storage,
    stack: ExitStack,
) -> Iterator[Lane]:
    yield from thread_lanes(plan, models, shares, storage)
    yield _open_copy_lane(plan, shares, storage)


def thread_lanes(
    plan: UnitPlan,
    models: dict[str, Llama],
    shares: Sequence[Sequence[int]],
    storage: Storage,
) -> Iterator[ThreadLane]:
    """Lanes for batches on these sets of cores, as threads; `models` is emptied."""
    residents = {name: Resident.of(models.pop(name), name, storage) for name in plan.models}
    for number, cores in enumerate(shares):
        yield ThreadLane(f"lane-{number}", cores, lambda team: Runner(residents, team).run)


def _open_processes(
    plan: UnitPlan,
    models: dict[str, Llama],
    shares: Sequence[Sequence[int]],
    storage: Storage,
    stack: ExitStack,
) -> Iterator[Lane]:
    shared = {}
    for name in plan.models:
        model = models.pop(name)
        shape, state = model.shape, model.state()
        del model  # so that each weight is held twice only while it moves
        weights = share_weights(state)
        stack.callback(weights.segment.close)
        shared[name] = SharedModel.of(shape, weights)
    for number, cores in enumerate(shares):
        yield ProcessLane(LaneSetup(f"lane-{number}", plan, tuple(cores), storage.fds, shared))
    yield _open_copy_lane(plan, shares, storage)


def _open_copy_lane(
    plan: UnitPlan, shares: Sequence[Sequence[int]], storage: Storage
) -> ThreadLane:
    """It moves bytes between batches, on whatever core of the mesh is free."""
    cores = [core for share in shares for core in share]
    copier = Copier(storage, plan.arena.block_bytes)
    return ThreadLane("copy", cores, lambda _: copier.run, size=1)
