"""From a unit's plan and its models to lanes that can run them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from muxrt.engine.build import UnitPlan
from muxrt.models.llama import Llama
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.host_weights import HostWeights, WeightMover
from muxrt.worker.kv_storage import Storage, share_weights
from muxrt.worker.lanes import Lane, ThreadLane, split_cores
from muxrt.worker.process_lane import LaneSetup, ProcessLane, SharedModel
from muxrt.worker.runner import Copier, Resident, Runner
from muxrt.worker.torch_transport import TorchTransport
from muxrt.worker.transfer import Exchange, Geometry, Transport
from muxrt.worker.transports import NixlTransport, SharedTransport

# Weights come from memory to memory: two or three threads of a server reach what its memory gives.
MOST_COPY_THREADS = 4


def open_executor(
    plan: UnitPlan,
    models: dict[str, Llama],
    cores: Sequence[int],
    unit: str = "",
    sleepers: Mapping[str, HostWeights] | None = None,
) -> LaneExecutor:
    """Reserve the unit's memory and start its lanes on `cores`; `models` is emptied.

    `unit` is its name and generation, for units that fetch from it; `sleepers` are the weights of
    its models where those may sleep. Raises ConfigError where the
    lanes need more cores or units cannot reach each other, MuxrtError where a lane cannot start.
    """
    shares = split_cores(cores, plan.spec.lanes.split)
    open_lanes = {"cores": _open_threads, "processes": _open_processes}[plan.spec.lanes.kind]
    with ExitStack() as stack:
        storage = Storage(plan)
        stack.callback(storage.close)
        exchange = _open_exchange(plan, storage, unit, stack) if plan.spec.has_roles else None
        mover = _open_mover(plan, storage, sleepers, len(cores), stack) if sleepers else None
        copier = partial(Copier, storage, plan.arena.block_bytes, exchange, mover=mover)
        lanes: list[Lane] = []
        for lane in open_lanes(plan, models, shares, storage, stack, copier, sleepers or {}):
            stack.callback(lane.close)
            lanes.append(lane)
        for lane in lanes:
            lane.wait_started()
        return LaneExecutor(lanes, stack.pop_all(), exchange)
    raise AssertionError("an exit stack swallows nothing")


def _open_exchange(plan: UnitPlan, storage: Storage, unit: str, stack: ExitStack) -> Exchange:
    """What reads other units' blocks. Raises ConfigError where NIXL is asked for and not there."""
    arena = storage.arena.tensor()
    transport: Transport
    if plan.spec.transfer == "nixl":
        transport = NixlTransport(unit, arena)
    elif plan.spec.transfer == "gloo":
        transport = TorchTransport(arena)
    else:
        transport = SharedTransport(storage.arena.fd, storage.arena.num_bytes)
    stack.callback(transport.close)
    geometries = {model: Geometry.of(plan, model) for model in plan.models}
    return Exchange(unit, geometries, arena, transport)


def _open_mover(
    plan: UnitPlan,
    storage: Storage,
    sleepers: Mapping[str, HostWeights],
    num_cores: int,
    stack: ExitStack,
) -> WeightMover:
    num_threads = min(num_cores, MOST_COPY_THREADS)
    mover = WeightMover(sleepers, storage.arena, plan.arena.block_bytes, num_threads)
    stack.callback(mover.close)
    return mover


def _open_threads(
    plan: UnitPlan,
    models: dict[str, Llama],
    shares: Sequence[Sequence[int]],
    storage: Storage,
    stack: ExitStack,
    copier: Callable[..., Copier],
    sleepers: Mapping[str, HostWeights],
) -> Iterator[Lane]:
    there = residents(plan, models, storage)
    yield from thread_lanes(there, shares)
    yield _open_copy_lane(shares, copier(models=there))


def residents(plan: UnitPlan, models: dict[str, Llama], storage: Storage) -> dict[str, Resident]:
    """The plan's models over the unit's memory; `models` is emptied."""
    return {name: Resident.of(models.pop(name), name, storage) for name in plan.models}


def thread_lanes(
    models: dict[str, Resident], shares: Sequence[Sequence[int]]
) -> Iterator[ThreadLane]:
    """Lanes for batches on these sets of cores, as threads."""
    for number, cores in enumerate(shares):
        yield ThreadLane(f"lane-{number}", cores, lambda team: Runner(models, team).run)


def _open_processes(
    plan: UnitPlan,
    models: dict[str, Llama],
    shares: Sequence[Sequence[int]],
    storage: Storage,
    stack: ExitStack,
    copier: Callable[..., Copier],
    sleepers: Mapping[str, HostWeights],
) -> Iterator[Lane]:
    shared = {}
    for name in plan.models:
        model = models.pop(name)
        if name in sleepers:
            shared[name] = SharedModel.of(model.shape, sleepers[name].weights)
            continue
        shape, state = model.shape, model.state()
        del model  # so that each weight is held twice only while it moves
        weights = share_weights(state)
        stack.callback(weights.segment.close)
        shared[name] = SharedModel.of(shape, weights)
    for number, cores in enumerate(shares):
        yield ProcessLane.start(
            LaneSetup(f"lane-{number}", plan, tuple(cores), storage.fds, shared)
        )
    yield _open_copy_lane(shares, copier())


def _open_copy_lane(shares: Sequence[Sequence[int]], copier: Copier) -> ThreadLane:
    """It moves bytes between batches, on whatever core of the mesh is free."""
    cores = [core for share in shares for core in share]
    return ThreadLane("copy", cores, lambda _: copier.run, size=1)
