"""A unit over several ranks: the unit's process is rank 0, the others are processes of their own.

Every rank has its own cores, or a GPU (worker/device_mesh.py), its own slices of the weights and
its own arena, with its part of every block: ids are equal on all. A work is encoded once and
written to each rank, which runs it on its lane of the same number; rank 0 alone draws tokens, and
its result is the mesh's. What moves blocks is over when it is over everywhere, and so is a batch:
behind its last exchange between the ranks nobody touches K and V any more.
"""

import os
import select
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NoReturn, cast

import msgspec
import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from muxrt.config.model import ModelShape
from muxrt.config.placement import Mesh, ModelSpec
from muxrt.config.shard import Shard
from muxrt.core import Result, SlotOpen, Work
from muxrt.engine.build import UnitPlan
from muxrt.engine.ranks import plan_rank, rank_cores
from muxrt.errors import MuxrtError
from muxrt.kernels import Team
from muxrt.models.device_llama import DeviceLlama
from muxrt.models.llama import Llama
from muxrt.models.ranks import Ranks
from muxrt.worker.build import open_mover
from muxrt.worker.collectives import CPU, GroupRanks, RankLost, open_store
from muxrt.worker.device_mesh import open_device_lanes
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.host_weights import HostWeights
from muxrt.worker.kv_storage import Segment, Storage
from muxrt.worker.lanes import Lane, LaneDied, Run, ThreadLane, split_cores
from muxrt.worker.mesh_copies import CopyTogether, add_up, join_addresses, open_exchange
from muxrt.worker.process_lane import ProcessLane
from muxrt.worker.rank_processes import RankProcesses
from muxrt.worker.runner import Copier, Resident, Runner
from muxrt.worker.shared_ranks import SharedRanks, num_bytes
from muxrt.worker.transfer import Reached
from muxrt.worker.watch import BEATS_BYTES

# Ranks may be so far apart where some of the weights come from memory and others from the disk. One
# that is gone or stands still is found by its beats.
WAKE_S = 60.0

Models = dict[str, Llama] | dict[str, DeviceLlama]
Load = Callable[[Shard], Models]
Lose = Callable[[Exception], None]
Share = Callable[[Sequence[int], Sequence[int] | None], Sequence[Sequence[int]]]


class RankSetup(msgspec.Struct, frozen=True):
    """What a rank loads and runs with."""

    name: str
    shard: Shard
    plan: UnitPlan  # the rank's
    shapes: dict[str, ModelShape]  # of whole models
    models: tuple[ModelSpec, ...]
    cores: tuple[int, ...]
    lanes: tuple[tuple[int, ...], ...]  # the cores of each, without the copy lane
    memory: int  # descriptor of what all ranks map: beats, and rooms for exchanges behind them
    wakes: tuple[tuple[int, ...], ...]  # eventfds, by lane and rank
    unit: str  # name and generation
    port: int | None  # of torch.distributed's store; None: sums go through that memory
    device: str | None = None  # as torch names it; None: its cores


class Others:
    """The other ranks, as rank 0 sees them; among its lanes the one that gives no results."""

    def __init__(self, setups: Sequence[RankSetup], processes: RankProcesses) -> None:
        """Have them load; `wait_started` tells whether they could. Raises LaneDied."""
        self._processes = processes
        piped = processes.piped
        self._ranks = [ProcessLane(setup, piped[setup.shard.rank]) for setup in setups]
        self._epoll = select.epoll()
        for rank in self._ranks:
            self._epoll.register(rank.fileno(), select.EPOLLIN)

    def tell(self, work: Work) -> None:
        """Have `work` run on every rank. Raises LaneDied where one is gone."""
        frame = msgspec.msgpack.encode(work)
        for rank in self._ranks:
            rank.write(frame)

    def lose(self, error: Exception) -> None:
        """An exchange with them failed; from any thread. The next `check` raises."""
        self._processes.lose(str(error))

    def abandon(self, error: Exception) -> None:
        """Likewise, where no result of a lane will say so: their ends do."""
        self.lose(error)
        for rank in self._ranks:
            rank.kill()

    @property
    def is_lost(self) -> bool:
        """The mesh cannot go on."""
        return self._processes.reason is not None

    def check(self) -> None:
        """Raises LaneDied, with all other ranks ended, if the mesh cannot go on."""
        if self._processes.reason is not None:
            self._end(self._processes.reason)

    def wait_started(self) -> None:
        """Return when all have come one step further. Raises MuxrtError if one cannot."""
        for rank in self._ranks:
            try:
                rank.wait_started()
            except LaneDied as error:
                self._end(self._processes.reason or error.message)

    def launch(self, work: Work) -> None:
        raise AssertionError("works go to the lanes of rank 0")

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Nothing to do: every rank is told of every work."""

    def fileno(self) -> int:
        return self._epoll.fileno()

    def collect(self) -> list[Result]:
        self.check()
        for rank in self._ranks:
            try:
                results = rank.collect()
            except LaneDied as error:
                self._end(self._processes.reason or error.message)
            for result in results:  # after it started, a rank speaks only to complain
                self._end(self._processes.reason or f"{rank.name}: {result.error}")
        return []

    def close(self) -> None:
        self._processes.close()  # one may stand still; they hold nothing that anybody waits for
        for rank in self._ranks:
            rank.close()
        self._epoll.close()

    def _end(self, reason: str) -> NoReturn:
        self._processes.lose(reason)
        for rank in self._ranks:
            rank.kill()
        raise LaneDied(f"the unit's mesh is broken: {reason}")


class MeshLane:
    """A lane of rank 0, whose works all ranks run."""

    def __init__(self, lane: Lane, others: Others) -> None:
        self._lane, self._others = lane, others

    def wait_started(self) -> None:
        self._lane.wait_started()

    def launch(self, work: Work) -> None:
        self._others.tell(work)
        self._lane.launch(work)

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        self._lane.learn(model, opened)

    def fileno(self) -> int:
        return self._lane.fileno()

    def collect(self) -> list[Result]:
        results = self._lane.collect()
        self._others.check()
        return results

    def close(self) -> None:
        self._lane.close()


def open_mesh(
    plan: UnitPlan,
    models: Sequence[ModelSpec],
    shapes: Mapping[str, ModelShape],
    cores: Sequence[int],
    load: Load,
    unit: str = "",
    ranks: RankProcesses | None = None,
    share: Share = split_cores,
    sleepers: Mapping[str, HostWeights] | None = None,
    device: torch.device | None = None,
) -> LaneExecutor:
    """Have the other ranks load, load this one's weights and start its lanes.

    `unit` is its name and generation, for units that fetch from it; `ranks` were started before;
    `share` says which cores of a rank each lane has; `sleepers` are there once `load` has returned:
    the weights of models that may sleep; `device` is this rank's, where ranks have one each and
    share the cores. Raises ConfigError for a unit that cannot be cut, MuxrtError where a rank
    cannot start.
    """
    size = plan.spec.mesh.tp
    parts = rank_cores(cores, size) if device is None else (tuple(cores),) * size
    shards = [Shard(rank, size) for rank in range(size)]
    lanes = [share(part, plan.spec.lanes.split) for part in parts]
    with ExitStack() as stack:
        ranks = ranks or RankProcesses(plan.spec.mesh, plan.num_lanes)
        stack.callback(ranks.close)
        os.ftruncate(ranks.memory, memory_bytes(plan))
        memory = Segment(memory_bytes(plan), ranks.memory)
        stack.callback(memory.close)
        is_shared = device is None and plan.spec.mesh.exchange == "shared"
        store = None if is_shared else open_store()
        setups = [
            RankSetup(
                name=f"{plan.spec.name}/rank-{shard.rank}",
                shard=shard,
                plan=plan_rank(plan, shapes, shard),
                shapes=dict(shapes),
                models=tuple(models),
                cores=parts[shard.rank],
                lanes=tuple(map(tuple, lanes[shard.rank])),
                memory=ranks.memory,
                wakes=ranks.wakes,
                unit=unit,
                port=None if store is None else store.port,
                device=rank_device(plan.spec.mesh, device, shard.rank),
            )
            for shard in shards
        ]
        others = Others(setups[1:], ranks)
        stack.callback(others.close)
        loaded = load(shards[0])
        others.wait_started()  # they have loaded, too, and meet us next
        lines = open_lines(setups[0], memory, store, stack)
        opened = _open_first(setups[0], loaded, lines, stack, others, sleepers)
        first: list[Lane] = [MeshLane(lane, others) for lane in opened.lanes]
        others.wait_started()
        ranks.loaded()
        return LaneExecutor([*first, others], stack.pop_all(), opened.reached, opened.weight_bytes)
    raise AssertionError("an exit stack swallows nothing")


def _open_first(
    setup: RankSetup,
    models: Models,
    lines: Sequence[Ranks],
    stack: ExitStack,
    others: Others,
    sleepers: Mapping[str, HostWeights] | None,
) -> "OpenedRank":
    """The lanes of rank 0. Raises what another rank said that could not start its own."""
    lose = others.lose if setup.device is None else others.abandon
    try:
        opened = open_lanes(setup, models, lines, stack, lose, sleepers)
    except RankLost:
        others.wait_started()
        raise
    if setup.device is not None and torch.device(setup.device).type == "cuda":
        # Before the lanes are closed: one may wait behind an exchange that nobody joins any more.
        stack.callback(_leave, lines, others)
    return opened


def _leave(lines: Sequence[Ranks], others: Others) -> None:
    """End the exchanges of a mesh that is broken."""
    for line in lines if others.is_lost else ():
        if isinstance(line, GroupRanks):
            line.close()


def rank_device(mesh: Mesh, first: torch.device | None, rank: int) -> str | None:
    """The device of a rank, as torch names it, where the first rank has `first`."""
    if first is None or first.type != "cuda":
        return None if first is None else str(first)
    assert mesh.gpus is not None, "a GPU for each rank"
    return f"cuda:{mesh.gpus[rank]}"


def memory_bytes(plan: UnitPlan) -> int:
    """What the ranks of a unit share."""
    return BEATS_BYTES + (plan.num_lanes + 1) * num_bytes(plan.spec.mesh.tp)


def open_lines(
    setup: RankSetup, memory: Segment, store: Store | None, stack: ExitStack
) -> list[Ranks]:
    """A line to the other ranks for each lane, the copy lane last."""
    lines: list[Ranks] = []
    for lane in range(setup.plan.num_lanes + 1):
        timeout_s = setup.plan.spec.mesh.timeout_s
        if lane == setup.plan.num_lanes and setup.plan.habits is not None:
            timeout_s = max(timeout_s, WAKE_S)
        if store is None:
            size = num_bytes(setup.shard.size)
            rooms = memory.tensor(offset=BEATS_BYTES + lane * size, count=size)
            lines.append(SharedRanks(rooms, setup.wakes[lane], setup.shard, timeout_s))
        else:
            device = torch.device(setup.device) if setup.device else CPU
            group = GroupRanks(store, f"lane-{lane}", setup.shard, timeout_s, device)
            stack.callback(group.close)
            lines.append(group)
    return lines


@dataclass(frozen=True, slots=True)
class OpenedRank:
    """The lanes of one rank, the copy lane last."""

    lanes: Sequence[Lane]
    reached: Reached | None  # on the first rank, where the unit hands sequences over
    weight_bytes: dict[str, int]  # on the first rank: of models that may sleep, on all ranks


def open_lanes(
    setup: RankSetup,
    models: Models,
    lines: Sequence[Ranks],
    stack: ExitStack,
    lose: Lose,
    sleepers: Mapping[str, HostWeights] | None = None,
) -> OpenedRank:
    """Start a rank's lanes; `models` is emptied, `lose` hears why the mesh is broken."""
    if setup.device is None:
        mine = cast(dict[str, Llama], models)
        return _open_on_cores(setup, mine, lines, stack, lose, sleepers or {})
    theirs, groups = cast(dict[str, DeviceLlama], models), cast(Sequence[GroupRanks], lines)
    device = torch.device(setup.device)
    return OpenedRank(open_device_lanes(setup.plan, theirs, groups, device, lose, stack), None, {})


def _open_on_cores(
    setup: RankSetup,
    models: dict[str, Llama],
    lines: Sequence[Ranks],
    stack: ExitStack,
    lose: Lose,
    sleepers: Mapping[str, HostWeights],
) -> OpenedRank:
    plan = setup.plan
    storage = Storage(plan)
    stack.callback(storage.close)
    there = {name: Resident.of(models.pop(name), name, storage) for name in plan.models}
    exchange = (
        open_exchange(setup.unit, setup.shard, plan, setup.shapes, storage, stack)
        if plan.spec.has_roles
        else None
    )
    reached = join_addresses(exchange, plan.models, lines[-1]) if exchange else None
    mover = open_mover(plan, storage, sleepers, len(setup.cores), stack)
    weight_bytes = add_up({n: w.num_bytes for n, w in sleepers.items()}, lines[0])
    copier = Copier(storage, plan.arena.block_bytes, exchange, there, mover)
    lanes = [
        ThreadLane(f"lane-{number}", cores, _batches(there, lines[number], lose))
        for number, cores in enumerate(setup.lanes)
    ]
    together = _guarded(CopyTogether(copier, lines[-1]).run, lose)
    lanes.append(ThreadLane("copy", setup.cores, lambda _: together, size=1))
    for lane in lanes:
        stack.callback(lane.close)
    for lane in lanes:
        lane.wait_started()
    return OpenedRank(lanes, reached, weight_bytes)


def _batches(models: Mapping[str, Resident], line: Ranks, lose: Lose) -> Callable[[Team], Run]:
    return lambda team: _guarded(Runner(models, team, line).run, lose)


def _guarded(run: Run, lose: Lose) -> Run:
    """`run`, whose failures break the mesh unless every rank has the same."""

    def guarded(work: Work) -> Result:
        try:
            return run(work)
        except RankLost as error:
            lose(error)
            raise
        except MuxrtError:
            raise  # of the batch, found before the ranks went on, or by rank 0 after they had
        except Exception as error:
            lose(error)
            raise

    return guarded
