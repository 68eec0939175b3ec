"""The executors of the simulator: work takes as long as a cost says, and tokens are counted."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from muxrt.core import Batch, BatchEntry, Copy, Result, SlotOpen, Work
from muxrt.cost.batch import BatchWork
from muxrt.engine.executor import Done
from muxrt.sim.loop import FINISH, Event, EventLoop
from muxrt.sim.mesh import MeshCost, Runner

Cost = Callable[[Work], float]  # seconds a lane needs


class SimPrompt(msgspec.Struct, frozen=True):
    """A simulated request's payload: the one secret the brain must not see."""

    output_tokens: int  # the last of them ends the sequence


@dataclass(frozen=True, slots=True)
class ConstantCost:
    """Seconds per batch by fixed prices; the simplest cost there is."""

    batch_s: float = 0.01
    token_s: float = 0.0001
    copy_s: float = 0.005

    def __call__(self, work: Work) -> float:
        if isinstance(work, Batch):
            return self.batch_s + self.token_s * work.num_tokens
        return self.copy_s


class Tokens:
    """What the sequences in the slots of a unit still have to say."""

    def __init__(self) -> None:
        self._remaining: dict[tuple[str, int], int] = {}  # by (model, slot)

    def run(self, work: Work, elapsed_s: float) -> Result:
        """The result of `work`."""
        if not isinstance(work, Batch):
            return Result(elapsed_s=elapsed_s)
        for opened in work.opened:
            self._open(work.model, opened)
        drawn = tuple([self._draw(work.model, entry) for entry in work.entries])
        stopped = tuple([remaining == 0 for remaining in drawn])
        return Result(drawn, stopped, elapsed_s=elapsed_s)

    def _open(self, model: str, opened: SlotOpen) -> None:
        prompt = msgspec.msgpack.decode(opened.payload, type=SimPrompt)
        self._remaining[model, opened.slot] = prompt.output_tokens

    def _draw(self, model: str, entry: BatchEntry) -> int | None:
        """A sampled token: how many are still to come after it; None if nothing is sampled."""
        if not entry.samples:
            return None
        # Past its end a sequence draws what nobody will read, as the real one does.
        remaining = max(0, self._remaining[model, entry.slot] - 1)
        self._remaining[model, entry.slot] = remaining
        return remaining


class SimExecutor:
    """Lanes in virtual time: each runs its works one after the other, in launch order."""

    def __init__(self, loop: EventLoop, cost: Cost) -> None:
        self._loop = loop
        self._cost = cost
        self._lane_free_s: dict[int, float] = {}
        self._tokens = Tokens()

    def launch(self, work: Work, done: Done) -> None:
        """Finish `work` when its lane has had time for it."""
        elapsed_s = self._cost(work)
        start_s = max(self._loop.now_s, self._lane_free_s.get(work.lane, 0.0))
        self._lane_free_s[work.lane] = start_s + elapsed_s
        result = self._run(work, elapsed_s)
        self._loop.at(start_s + elapsed_s, lambda: done(work, result), FINISH)

    def _run(self, work: Work, elapsed_s: float) -> Result:
        return self._tokens.run(work, elapsed_s)


@dataclass(slots=True, eq=False)
class _Running:
    """The batch that a lane computes now."""

    batch: Batch
    done: Done
    runner: Runner
    work: BatchWork
    started_s: float
    since_s: float  # when `left` was true
    left: float = 1.0  # share of the batch that is still to be computed
    whole_s: float = 0.0  # the whole batch would take that long as it runs now
    end: Event | None = None


class MeshExecutor:
    """The lanes of one mesh: batches beside each other share its compute.

    When a neighbour starts or ends, what a batch has left takes as long as it takes from then on.
    """

    def __init__(self, loop: EventLoop, cost: MeshCost) -> None:
        self._loop = loop
        self._cost = cost
        self._tokens = Tokens()
        self._queued: dict[int, deque[tuple[Batch, Done]]] = {}  # by lane, behind what runs
        self._running: dict[int, _Running] = {}  # by lane
        self._copies_end_s = 0.0
        self._is_held = False  # more may start at this instant: shares are dealt once, after it
        self.busy_s: dict[int, float] = {}  # by lane
        self.num_batches = 0

    def launch(self, work: Work, done: Done) -> None:
        """Finish `work` when its lane has had time for it."""
        if isinstance(work, Copy):
            self._copy(work, done)
        elif work.lane in self._running:
            self._queued.setdefault(work.lane, deque()).append((work, done))
        else:
            self._start(work, done)
            if not self._is_held:
                self._deal()

    def _copy(self, copy: Copy, done: Done) -> None:
        seconds = self._cost.copy_s(copy)
        self._copies_end_s = max(self._copies_end_s, self._loop.now_s) + seconds
        result = self._tokens.run(copy, seconds)
        self._loop.at(self._copies_end_s, lambda: done(copy, result), FINISH)

    def _start(self, batch: Batch, done: Done) -> None:
        now, runner = self._loop.now_s, Runner(batch.model, batch.phase)
        self._running[batch.lane] = _Running(batch, done, runner, BatchWork.of(batch), now, now)

    def _deal(self) -> None:
        """Give every running batch its share, and find out when it ends with it."""
        now, running = self._loop.now_s, list(self._running.values())
        if not running:
            return
        is_alone = len(running) == 1
        shares = self._cost.shares([run.runner for run in running])
        for run, share in zip(running, shares, strict=True):
            whole_s = self._cost.batch_s(run.batch.model, run.work, share, is_alone)
            if run.end is not None:
                if whole_s == run.whole_s:
                    continue
                run.left = max(0.0, run.left - (now - run.since_s) / run.whole_s)
                run.end.cancel()
            run.since_s, run.whole_s = now, whole_s
            run.end = self._loop.at(now + run.left * whole_s, lambda r=run: self._end(r), FINISH)  # type: ignore[misc]

    def _end(self, run: _Running) -> None:
        lane, now = run.batch.lane, self._loop.now_s
        elapsed_s = now - run.started_s
        self.busy_s[lane] = self.busy_s.get(lane, 0.0) + elapsed_s
        self.num_batches += 1
        del self._running[lane]
        queued = self._queued.get(lane)
        if queued:
            self._start(*queued.popleft())
        self._is_held = True
        run.done(run.batch, self._tokens.run(run.batch, elapsed_s))
        self._is_held = False
        self._deal()
