"""The executors of the simulator: work takes as long as a cost says, and tokens are counted."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from muxrt.core import Batch, Copy, Load, Result, Sleep, Transfer, Work
from muxrt.cost.batch import BatchWork
from muxrt.engine.executor import Done
from muxrt.sim.copies import CopyLane
from muxrt.sim.loop import FINISH, Event, EventLoop
from muxrt.sim.mesh import MeshCost, Runner
from muxrt.sim.tokens import Tokens

Cost = Callable[[Work], float]  # seconds a lane needs


@dataclass(frozen=True, slots=True)
class ConstantCost:
    """Seconds per batch by fixed prices; the simplest cost there is."""

    batch_s: float = 0.01
    token_s: float = 0.0001
    copy_s: float = 0.005

    def __call__(self, work: Work) -> float:
        if isinstance(work, Batch):
            return (self.batch_s + self.token_s * work.num_tokens) * work.share
        return self.copy_s


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
class Job:
    """A batch on its way through a lane, and whom its end concerns."""

    lane: int
    runner: Runner
    work: BatchWork
    landed: "Landed"
    ends_pass: bool = True  # False: a part of a batch that others follow
    started_s: float = 0.0
    since_s: float = 0.0  # when `left` was true
    left: float = 1.0  # share of the batch that is still to be computed
    whole_s: float = 0.0  # the whole batch would take that long as it runs now
    end: Event | None = None


Landed = Callable[[Job, float], None]  # a job, and the seconds since it was started


class MeshLanes:
    """The lanes of one mesh: batches beside each other share its compute.

    When a neighbour starts or ends, what a batch has left takes as long as it takes from then on.
    """

    def __init__(self, loop: EventLoop, cost: MeshCost) -> None:
        self.loop = loop
        self.cost = cost
        self._queued: dict[int, deque[Job]] = {}  # by lane, behind what runs
        self._running: dict[int, Job] = {}  # by lane
        self._is_held = False  # more may start at this instant: shares are dealt once, after it
        self.after: Callable[[], None] | None = None  # called when a batch has ended
        self.busy_s: dict[int, float] = {}  # by lane
        self.num_batches = 0

    def launch(self, job: Job) -> None:
        """Start `job` when its lane is free."""
        if job.lane in self._running:
            self._queued.setdefault(job.lane, deque()).append(job)
            return
        self._start(job)
        if not self._is_held:
            self._deal()

    def _start(self, job: Job) -> None:
        job.started_s = self.loop.now_s
        self._running[job.lane] = job

    def _deal(self) -> None:
        """Give every running batch its share, and find out when it ends with it."""
        jobs = list(self._running.values())
        if not jobs:
            return
        now = self.loop.now_s
        seconds = self.cost.together_s([job.runner for job in jobs], [job.work for job in jobs])
        for job, whole_s in zip(jobs, seconds, strict=True):
            if job.end is not None:
                if whole_s == job.whole_s:
                    continue
                job.left = max(0.0, job.left - (now - job.since_s) / job.whole_s)
                job.end.cancel()
            job.since_s, job.whole_s = now, whole_s
            self._ends(job, now + job.left * whole_s)

    def _end(self, job: Job) -> None:
        lane, elapsed_s = job.lane, self.loop.now_s - job.started_s
        self.busy_s[lane] = self.busy_s.get(lane, 0.0) + elapsed_s
        self.num_batches += job.ends_pass
        del self._running[lane]
        queued = self._queued.get(lane)
        if queued:
            self._start(queued.popleft())
        self._is_held = True
        job.landed(job, elapsed_s)
        self._is_held = False
        self._deal()
        if self.after is not None:
            self.after()

    def _ends(self, job: Job, at_s: float) -> None:
        job.end = self.loop.at(at_s, partial(self._end, job), FINISH)

    def stop(self) -> None:
        """Nothing of what was launched will be done."""
        for job in self._running.values():
            lane_s = self.busy_s.get(job.lane, 0.0)
            self.busy_s[job.lane] = lane_s + self.loop.now_s - job.started_s
            if job.end is not None:
                job.end.cancel()
        self._running.clear()

    def busy_until_now_s(self, lane: int) -> float:
        """Seconds that `lane` was busy, with what runs on it."""
        busy_s, job = self.busy_s.get(lane, 0.0), self._running.get(lane)
        return busy_s if job is None else busy_s + self.loop.now_s - job.started_s

    def lift(self) -> list[list[Job]]:
        """Take all jobs off the lanes: by lane in order of start, what runs before what waits."""
        lifted = [[job, *self._queued.pop(lane, ())] for lane, job in self._running.items()]
        self._running.clear()
        for job, *_ in lifted:
            assert job.end is not None, "shares are dealt before jobs are lifted"
            job.end.cancel()
        return lifted

    def put(self, lifted: list[list[Job]], ends: list[tuple[Job, float]]) -> None:
        """The opposite of `lift`; `ends` says of those that run when, in order of being known."""
        for first, *others in lifted:
            self._running[first.lane] = first
            self._queued[first.lane] = deque(others)
        for job, at_s in ends:
            self._ends(job, at_s)


@dataclass(slots=True, eq=False)
class BatchJob(Job):
    """A batch of the brain."""

    batch: Batch | None = None
    done: Done | None = None


class MeshExecutor:
    """A mesh behind the brain's seam."""

    def __init__(self, loop: EventLoop, cost: MeshCost, copies: CopyLane) -> None:
        self._loop = loop
        self.lanes = MeshLanes(loop, cost)
        self.copies = copies
        self.tokens = copies.tokens

    def launch(self, work: Work, done: Done) -> None:
        """Finish `work` when its lane has had time for it."""
        if isinstance(work, Copy | Transfer | Load | Sleep):
            self.copies.launch(work, done)
            return
        runner = self.lanes.cost.runner(work)
        self.lanes.launch(
            BatchJob(
                work.lane,
                runner,
                BatchWork.of(work),
                self.land,
                work.ends_pass,
                batch=work,
                done=done,
            )
        )

    def busy_until_now_s(self, lane: int) -> float:
        """Seconds that `lane` was busy, with what runs on it."""
        return self.lanes.busy_until_now_s(lane)

    def stop(self) -> None:
        """The mesh is lost: nothing of what was launched will be done."""
        self.lanes.stop()
        self.copies.stop()

    def land(self, job: Job, elapsed_s: float) -> None:
        """Tell the brain that a batch is done."""
        assert isinstance(job, BatchJob) and job.batch is not None and job.done is not None
        job.done(job.batch, self.tokens.run(job.batch, elapsed_s))
