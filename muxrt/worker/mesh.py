"""A unit over several ranks: the unit's process is rank 0, the others are processes of their own.

Every rank has its own cores, its own slices of the weights and its own arena, with its part of
every block: ids are equal on all. A work is encoded once and written to each rank, which runs it on
its lane of the same number; rank 0 alone draws tokens, and its result is the mesh's. What moves
blocks is over when it is over everywhere, and so is a batch: behind its last exchange between the
ranks nobody touches K and V any more.
"""

import logging
import os
import select
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from muxrt.config.model import ModelShape
from muxrt.config.placement import ModelSpec
from muxrt.config.shard import Shard
from muxrt.core import Result, SlotOpen, Work
from muxrt.engine.build import UnitPlan
from muxrt.engine.ranks import plan_rank, rank_cores
from muxrt.errors import MuxrtError
from muxrt.kernels import Team
from muxrt.models.llama import Llama
from muxrt.models.ranks import Ranks
from muxrt.worker.build import open_mover
from muxrt.worker.collectives import GlooRanks, RankLost, open_store
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.host_weights import HostWeights
from muxrt.worker.kv_storage import Segment, Storage
from muxrt.worker.lanes import Lane, LaneDied, Run, ThreadLane, split_cores
from muxrt.worker.mesh_copies import CopyTogether, add_up, join_addresses, open_exchange
from muxrt.worker.process_lane import ProcessLane
from muxrt.worker.runner import Copier, Resident, Runner
from muxrt.worker.shared_ranks import SharedRanks, num_bytes, open_wake
from muxrt.worker.transfer import Reached
from muxrt.worker.watch import Watch

log = logging.getLogger(__name__)

BEATS_BYTES = 4096  # of the shared memory; rooms begin behind them

# Ranks may be so far apart where some of the weights come from memory and others from the disk. One
# that is gone or stands still is found by its beats.
WAKE_S = 60.0

Load = Callable[[Shard], dict[str, Llama]]
Lose = Callable[[Exception], None]


class RankSetup(msgspec.Struct, frozen=True):
    """What the process of a rank starts from."""

    name: str
    shard: Shard
    plan: UnitPlan  # the rank's
    shapes: dict[str, ModelShape]  # of whole models
    models: tuple[ModelSpec, ...]
    cores: tuple[int, ...]
    memory: int  # descriptor of what all ranks map: beats, and rooms for exchanges
    wakes: tuple[tuple[int, ...], ...]  # eventfds, by lane and rank
    unit: str  # name and generation
    port: int | None  # of gloo's store; None: sums go through that memory
    module: str = "muxrt.worker.rank"
    environ: dict[str, str] = {}

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.memory, *(wake for lane in self.wakes for wake in lane))


class Others:
    """The other ranks, as rank 0 sees them; among its lanes the one that gives no results."""

    def __init__(self, setups: Sequence[RankSetup]) -> None:
        """Start their processes; `wait_started` tells whether they could."""
        self._ranks = {setup.shard.rank: ProcessLane(setup) for setup in setups}
        self._epoll = select.epoll()
        for rank in self._ranks.values():
            self._epoll.register(rank.fileno(), select.EPOLLIN)
        self._reason: str | None = None

    @property
    def pids(self) -> dict[int, int]:
        return {number: rank.pid for number, rank in self._ranks.items()}

    def tell(self, work: Work) -> None:
        """Have `work` run on every rank. Raises LaneDied where one is gone."""
        frame = msgspec.msgpack.encode(work)
        for rank in self._ranks.values():
            rank.write(frame)

    def lose(self, error: Exception) -> None:
        """An exchange with them failed; from any thread. The next `check` raises."""
        self._reason = self._reason or str(error)

    def silence(self, number: int, seconds: float) -> None:
        """Rank `number` stands still: end it, so that nobody waits for it."""
        pid = self._ranks[number].pid
        self._reason = f"rank {number} (process {pid}) did not move for {seconds:.1f} s"
        log.error("event=rank_silent rank=%d pid=%d seconds=%.1f", number, pid, seconds)
        os.kill(pid, signal.SIGKILL)

    def check(self) -> None:
        """Raises LaneDied, with all other ranks ended, if the mesh cannot go on."""
        if self._reason is not None:
            self._end(self._reason)

    def wait_started(self) -> None:
        for rank in self._ranks.values():
            rank.wait_started()

    def launch(self, work: Work) -> None:
        raise AssertionError("works go to the lanes of rank 0")

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Nothing to do: every rank is told of every work."""

    def fileno(self) -> int:
        return self._epoll.fileno()

    def collect(self) -> list[Result]:
        self.check()
        for rank in self._ranks.values():
            try:
                results = rank.collect()
            except LaneDied as error:
                self._end(self._reason or error.message)
            for result in results:  # after it started, a rank speaks only to complain
                self._end(self._reason or f"{rank.name}: {result.error}")
        return []

    def close(self) -> None:
        for rank in self._ranks.values():
            rank.kill()  # it may stand still, and holds nothing that anybody waits for
            rank.close()
        self._epoll.close()

    def _end(self, reason: str) -> None:
        for rank in self._ranks.values():
            rank.kill()
        raise LaneDied(f"the unit's mesh is broken: {reason}")


class MeshLane:
    """A lane of rank 0, whose works all ranks run."""

    def __init__(self, lane: ThreadLane, others: Others) -> None:
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
    sleepers: Mapping[str, HostWeights] | None = None,
) -> LaneExecutor:
    """Start the other ranks, load this one's weights and start its lanes.

    `unit` is its name and generation, for units that fetch from it; `sleepers` are there once
    `load` has returned: the weights of models that may sleep. Raises ConfigError for a unit
    that cannot be cut, MuxrtError where a rank cannot start.
    """
    size, timeout_s = plan.spec.mesh.tp, plan.spec.mesh.timeout_s
    parts = rank_cores(cores, size)
    shards = [Shard(rank, size) for rank in range(size)]
    plans = [plan_rank(plan, shapes, shard) for shard in shards]
    for part in parts:
        split_cores(part, plan.spec.lanes.split)
    with ExitStack() as stack:
        memory = Segment(memory_bytes(plan))
        stack.callback(memory.close)
        wakes = _open_wakes(plan, stack)
        store = open_store() if plan.spec.mesh.exchange == "gloo" else None
        setups = [
            RankSetup(
                name=f"{plan.spec.name}/rank-{shard.rank}",
                shard=shard,
                plan=plans[shard.rank],
                shapes=dict(shapes),
                models=tuple(models),
                cores=parts[shard.rank],
                memory=memory.fd,
                wakes=wakes,
                unit=unit,
                port=None if store is None else store.port,
            )
            for shard in shards
        ]
        others = Others(setups[1:])
        stack.callback(others.close)
        loaded = load(shards[0])
        others.wait_started()  # they have loaded, too, and meet us next
        lines = open_lines(setups[0], memory, store, stack)
        opened = open_lanes(setups[0], loaded, lines, stack, others.lose, sleepers)
        lanes: list[Lane] = [MeshLane(lane, others) for lane in opened.lanes]
        others.wait_started()
        watch = Watch(open_beats(memory, size), 0, others.pids, timeout_s, others.silence)
        stack.callback(watch.close)
        every = [*lanes, others]
        return LaneExecutor(every, stack.pop_all(), opened.reached, opened.weight_bytes)
    raise AssertionError("an exit stack swallows nothing")


def memory_bytes(plan: UnitPlan) -> int:
    """What the ranks of a unit share."""
    return BEATS_BYTES + (plan.num_lanes + 1) * num_bytes(plan.spec.mesh.tp)


def _open_wakes(plan: UnitPlan, stack: ExitStack) -> tuple[tuple[int, ...], ...]:
    """By lane and rank; none where gloo wakes."""
    lanes = range(plan.num_lanes + 1 if plan.spec.mesh.exchange == "shared" else 0)
    wakes = tuple(tuple(open_wake() for _ in range(plan.spec.mesh.tp)) for _ in lanes)
    for lane in wakes:
        for wake in lane:
            stack.callback(os.close, wake)
    return wakes


def open_beats(memory: Segment, size: int) -> npt.NDArray[np.int64]:
    """[ranks]"""
    beats: npt.NDArray[np.int64] = memory.tensor(torch.int64, count=size).numpy()
    return beats


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
            gloo = GlooRanks(store, f"lane-{lane}", setup.shard, timeout_s)
            stack.callback(gloo.close)
            lines.append(gloo)
    return lines


@dataclass(frozen=True, slots=True)
class OpenedRank:
    """The lanes of one rank, the copy lane last."""

    lanes: list[ThreadLane]
    reached: Reached | None  # on the first rank, where the unit hands sequences over
    weight_bytes: dict[str, int]  # on the first rank: of models that may sleep, on all ranks


def open_lanes(
    setup: RankSetup,
    models: dict[str, Llama],
    lines: Sequence[Ranks],
    stack: ExitStack,
    lose: Lose,
    sleepers: Mapping[str, HostWeights] | None = None,
) -> OpenedRank:
    """Start a rank's lanes; `models` is emptied, `lose` hears why the mesh is broken."""
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
    weight_bytes = add_up({n: w.num_bytes for n, w in (sleepers or {}).items()}, lines[-1])
    copier = Copier(storage, plan.arena.block_bytes, exchange, there, mover)
    shares = split_cores(setup.cores, plan.spec.lanes.split)
    lanes = [
        ThreadLane(f"lane-{number}", share, _batches(there, lines[number], lose))
        for number, share in enumerate(shares)
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
