"""A unit over several ranks: the unit's process is rank 0, the others are processes of their own.

Every rank has its own cores, or a GPU (worker/device_mesh.py), its own slices of the weights and
its own arena, with its part of every block: ids are equal on all. A work is encoded once and
written to each rank, which runs it on its lane of the same number; rank 0 alone draws tokens, and
its result is the mesh's. What moves blocks is over when it is over everywhere, and so is a batch:
behind its last exchange between the ranks nobody touches K and V any more.
"""

import logging
import os
import select
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt
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
from muxrt.worker.collectives import CPU, GroupRanks, RankLost, open_store
from muxrt.worker.device_mesh import open_device_lanes
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.kv_storage import Segment, Storage
from muxrt.worker.lanes import Lane, LaneDied, Run, ThreadLane, split_cores
from muxrt.worker.mesh_copies import CopyTogether, join_addresses, open_exchange
from muxrt.worker.process_lane import ProcessLane
from muxrt.worker.runner import Copier, Resident, Runner
from muxrt.worker.shared_ranks import SharedRanks, num_bytes, open_wake
from muxrt.worker.transfer import Reached
from muxrt.worker.watch import Watch

log = logging.getLogger(__name__)

BEATS_BYTES = 4096  # of the shared memory; rooms begin behind them

Models = dict[str, Llama] | dict[str, DeviceLlama]
Load = Callable[[Shard], Models]
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
    port: int | None  # of torch.distributed's store; None: sums go through that memory
    device: str | None = None  # as torch names it; None: its cores
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

    def abandon(self, error: Exception) -> None:
        """Likewise, where no result of a lane will say so: their ends do."""
        self.lose(error)
        for rank in self._ranks.values():
            rank.kill()

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
    device: torch.device | None = None,
) -> LaneExecutor:
    """Start the other ranks, load this one's weights and start its lanes.

    `unit` is its name and generation, for units that fetch from it; `device` is this rank's, where
    ranks have one each and share the cores. Raises ConfigError for a unit that cannot be cut,
    MuxrtError where a rank cannot start.
    """
    size, timeout_s = plan.spec.mesh.tp, plan.spec.mesh.timeout_s
    parts = rank_cores(cores, size) if device is None else (tuple(cores),) * size
    shards = [Shard(rank, size) for rank in range(size)]
    plans = [plan_rank(plan, shapes, shard) for shard in shards]
    for part in parts:
        split_cores(part, plan.spec.lanes.split)
    with ExitStack() as stack:
        memory = Segment(memory_bytes(plan))
        stack.callback(memory.close)
        is_shared = device is None and plan.spec.mesh.exchange == "shared"
        wakes = _open_wakes(plan, stack) if is_shared else ()
        store = None if is_shared else open_store()
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
                device=rank_device(plan.spec.mesh, device, shard.rank),
            )
            for shard in shards
        ]
        others = Others(setups[1:])
        stack.callback(others.close)
        loaded = load(shards[0])
        others.wait_started()  # they have loaded, too, and meet us next
        lines = open_lines(setups[0], memory, store, stack)
        lose = others.lose if device is None else others.abandon
        opened = open_lanes(setups[0], loaded, lines, stack, lose)
        lanes: list[Lane] = [MeshLane(lane, others) for lane in opened.lanes]
        others.wait_started()
        watch = Watch(open_beats(memory, size), 0, others.pids, timeout_s, others.silence)
        stack.callback(watch.close)
        return LaneExecutor([*lanes, others], stack.pop_all(), opened.reached)
    raise AssertionError("an exit stack swallows nothing")


def rank_device(mesh: Mesh, first: torch.device | None, rank: int) -> str | None:
    """The device of a rank, as torch names it, where the first rank has `first`."""
    if first is None or first.type != "cuda":
        return None if first is None else str(first)
    assert mesh.gpus is not None, "a GPU for each rank"
    return f"cuda:{mesh.gpus[rank]}"


def memory_bytes(plan: UnitPlan) -> int:
    """What the ranks of a unit share."""
    return BEATS_BYTES + (plan.num_lanes + 1) * num_bytes(plan.spec.mesh.tp)


def _open_wakes(plan: UnitPlan, stack: ExitStack) -> tuple[tuple[int, ...], ...]:
    """By lane and rank."""
    lanes = range(plan.num_lanes + 1)
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
    timeout_s = setup.plan.spec.mesh.timeout_s
    for lane in range(setup.plan.num_lanes + 1):
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


def open_lanes(
    setup: RankSetup, models: Models, lines: Sequence[Ranks], stack: ExitStack, lose: Lose
) -> OpenedRank:
    """Start a rank's lanes; `models` is emptied, `lose` hears why the mesh is broken."""
    if setup.device is None:
        return _open_on_cores(setup, cast(dict[str, Llama], models), lines, stack, lose)
    theirs, groups = cast(dict[str, DeviceLlama], models), cast(Sequence[GroupRanks], lines)
    device = torch.device(setup.device)
    return OpenedRank(open_device_lanes(setup.plan, theirs, groups, device, lose, stack), None)


def _open_on_cores(
    setup: RankSetup, models: dict[str, Llama], lines: Sequence[Ranks], stack: ExitStack, lose: Lose
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
    copier = Copier(storage, plan.arena.block_bytes, exchange, there)
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
    return OpenedRank(lanes, reached)


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
