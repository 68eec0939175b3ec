"""Runs of decode steps in which nothing can change, kept as counts instead of sequences.

While nobody waits, prefills or ends, every decode step of a model does the same to each of its
sequences: one token more. Such a run is folded: sequences that are in the same batches are one
`Cohort`, a step changes a few integers, and what it did is written into the sequences when the
run is over. Lanes, clock, latency estimates, and the policy's choices are the real ones, step by
step; so is the taking of blocks. The result is the same to the last bit (tests/test_folding.py).

A run ends before anything else happens to the unit: a request, its timer, the first end of a
sequence, or blocks that are not simply there.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import cast

from muxrt.core import Batch, BatchEntry, Phase, Sequence, SequenceState, Work
from muxrt.cost.batch import BatchWork
from muxrt.cost.latency import BatchShape
from muxrt.engine.executor import Done
from muxrt.engine.unit import Unit
from muxrt.sched.memory import Memory
from muxrt.sched.queues import ModelQueue, by_order
from muxrt.sched.scheduler import Limits, Scheduler, _Flight
from muxrt.sim.cohort import Cohort, FoldedJob, is_last, make_cohorts
from muxrt.sim.executor import BatchJob, Job, MeshExecutor
from muxrt.sim.loop import EventLoop
from muxrt.sim.mesh import MeshCost, Runner
from muxrt.sim.sprint import run_steps

# A request got so many tokens more, the last one at that time.
Advance = Callable[[int, int, float], None]


class _Over(Exception):
    """The run ends here: the brain itself must decide."""


class FoldingExecutor(MeshExecutor):
    """A mesh that folds runs of decode steps of the unit it belongs to."""

    def __init__(
        self, loop: EventLoop, cost: MeshCost, advance: Advance, horizon: Callable[[], float]
    ) -> None:
        """`horizon` is when something else may happen to the unit, or be asked of it."""
        super().__init__(loop, cost)
        self.horizon = horizon
        self._advance = advance
        self._jobs: dict[int, BatchJob] = {}  # the brain's batches in flight, by id
        self._unit: Unit | None = None
        self._run: DecodeRun | None = None

    def attach(self, unit: Unit) -> None:
        """The unit whose work this is."""
        self._unit = unit

    def launch(self, work: Work, done: Done) -> None:
        """Finish `work` when its lane has had time for it."""
        if not isinstance(work, Batch):
            super().launch(work, done)
            return
        runner = Runner(work.model, work.phase)
        job = BatchJob(work.lane, runner, BatchWork.of(work), self.land, batch=work, done=done)
        self._jobs[work.id] = job
        self.lanes.launch(job)

    def land(self, job: Job, elapsed_s: float) -> None:
        """Tell the brain that a batch is done, and see whether a run begins."""
        assert isinstance(job, BatchJob) and job.batch is not None
        del self._jobs[job.batch.id]
        super().land(job, elapsed_s)
        if self._unit is not None and is_quiet(self._unit):
            self._fold(self._unit)

    def settle(self) -> None:
        """The run is over: sequences, flights and jobs are what they would be without it."""
        if self._run is not None:
            run, self._run, self.lanes.sprint = self._run, None, None
            run.settle()

    def publish(self) -> None:
        """Tell what was generated so far; the run goes on."""
        if self._run is not None:
            self._run.publish()

    def _fold(self, unit: Unit) -> None:
        cohorts = make_cohorts(unit.scheduler, self.tokens.remaining)
        if cohorts is not None:
            self._run = DecodeRun(unit, self, cohorts, self._loop)
            if sum(bool(parts) for parts in cohorts.values()) == 1:
                self.lanes.sprint = self._run.sprint

    # -- what a run needs --------------------------------------------------------------------

    @property
    def jobs(self) -> Mapping[int, BatchJob]:
        """The brain's batches in flight, by id."""
        return self._jobs

    def adopt(self, job: BatchJob) -> None:
        """A folded job goes on as a batch of the brain."""
        assert job.batch is not None
        job.landed = self.land
        self._jobs[job.batch.id] = job

    def disown(self, number: int) -> None:
        """A batch of the brain was committed by a run."""
        del self._jobs[number]

    def advance(self, cohort: Cohort) -> None:
        """Tell what every sequence of a cohort got since it was told last."""
        steps, remaining = cohort.commits - cohort.told, self.tokens.remaining
        if not steps:
            return
        cohort.told = cohort.commits
        for sequence in cohort.sequences:
            assert sequence.slot is not None
            remaining[cohort.model, sequence.slot] -= steps
            self._advance(sequence.request.id, steps, cohort.last_s)


def is_quiet(unit: Unit) -> bool:
    """Nothing but decode steps of all running sequences can come next."""
    scheduler = unit.scheduler
    memory = scheduler.memory
    if scheduler.prefills_in_flight() or memory.copies or memory.claims:
        return False
    if memory._leaving or memory._short or not scheduler.policy.is_steady():
        return False
    return all(queue.is_waitless for queue in scheduler.queues.values())


class DecodeRun:
    """Stands in for the unit's scheduler while a run lasts; the policy notices no difference."""

    def __init__(
        self,
        unit: Unit,
        executor: FoldingExecutor,
        cohorts: dict[str, list[Cohort]],
        loop: EventLoop,
    ) -> None:
        self._unit = unit
        self._scheduler = unit.scheduler
        self._executor = executor
        self._cohorts = cohorts
        self._loop = loop
        self._has_grown = False
        self._folded: dict[int, FoldedJob] = {}  # in flight, in order of launch
        self._first: dict[int, list[Cohort]] = {}  # of batches in flight when the run began
        members = {c.sequences[0]: c for parts in cohorts.values() for c in parts}
        for number, job in executor.jobs.items():
            named = self._scheduler._flights[number].sequences
            self._first[number] = [members[s] for s in named if s in members]
            job.landed = self._land

    # -- what policies ask -------------------------------------------------------------------

    @property
    def queues(self) -> Mapping[str, ModelQueue]:
        return self._scheduler.queues

    @property
    def limits(self) -> Limits:
        return self._scheduler.limits

    @property
    def memory(self) -> Memory:
        return self._scheduler.memory

    @property
    def num_in_flight(self) -> int:
        return self._scheduler.num_in_flight

    def prefills_in_flight(self) -> int:
        """None: it would not be a run."""
        return 0

    def wants_prefill(self, model: str, lane: int) -> bool:
        """Nobody waits."""
        return False

    def prefill(self, model: str, lane: int, now: float) -> None:
        """Nobody waits."""

    def can_decode(self, model: str, lane: int) -> bool:
        """Some cohort may run on `lane`."""
        return bool(self._ready(model, lane))

    def decode(self, model: str, lane: int) -> FoldedJob | None:
        """One step of every cohort of `model` that may run on `lane`; raises `_Over`."""
        chosen = self._ready(model, lane)
        if not chosen:
            return None
        self._grow(model, chosen)
        num, context = 0, 0
        for cohort in chosen:
            size = len(cohort.sequences)
            num += size
            cohort.context += size
            context += cohort.context
            cohort.launches += 1
            cohort.in_flight += 1
            cohort.lane = lane
        work = BatchWork(0, 0, num, context)
        number = next(self._scheduler._work_ids)
        runner = Runner(model, Phase.DECODE)
        job = FoldedJob(lane, runner, work, self._land, id=number, cohorts=chosen)
        self._scheduler._flights[number] = _Flight(cast(Batch, job))
        self._scheduler._lane_load[lane] += 1
        decodes = self.queues[model].decodes
        decodes[lane] = decodes.get(lane, 0) + 1
        self._folded[number] = job
        return job

    def _ready(self, model: str, lane: int) -> list[Cohort]:
        if self.queues[model].is_elsewhere(lane):
            return []
        return [c for c in self._cohorts[model] if not c.in_flight or c.lane == lane]

    def _grow(self, model: str, chosen: list[Cohort]) -> None:
        """Take the groups that sequences need for their next token, all or none."""
        layout = self.queues[model].model.layout
        short = []
        for cohort in chosen:
            if cohort.launches >= cohort.most_launches:
                raise _Over
            short += cohort.short(cohort.launches, layout.block_tokens)
        if not short:
            return
        memory = self.memory
        if not memory._may_take(model, len(short) * layout.blocks_per_group):
            raise _Over
        for sequence in short:
            sequence.groups += memory._take(sequence, 1)
        self._has_grown = True

    # -- the loop ----------------------------------------------------------------------------

    def _pump(self) -> None:
        scheduler, now = self._scheduler, self._loop.now_s
        stand_in, next_batch = cast(Scheduler, self), scheduler.policy.next_batch
        while True:
            for lane in scheduler._idle_lanes():
                job = cast("FoldedJob | None", next_batch(stand_in, lane, now))
                if job is not None:
                    self._executor.lanes.launch(job)
                    break
            else:
                return

    def _land(self, job: Job, elapsed_s: float) -> None:
        assert isinstance(job, BatchJob)
        # A job of an earlier run has a batch since that one ended.
        is_new = isinstance(job, FoldedJob) and job.batch is None
        cohorts = job.cohorts if is_new else self._first[_number(job)]  # type: ignore[attr-defined]
        if is_last(cohorts):
            self._executor.settle()
            self._executor.land(job, elapsed_s)
            return
        self._commit(job, cohorts, elapsed_s)
        try:
            self._pump()
        except _Over:
            self._executor.settle()
            self._unit.pump()

    def _commit(self, job: BatchJob, cohorts: list[Cohort], elapsed_s: float) -> None:
        scheduler, model, work = self._scheduler, job.runner.model, job.work
        if isinstance(job, FoldedJob) and job.batch is None:
            number = job.id
            del self._folded[number]
        else:
            number = _number(job)
            self._executor.disown(number)
        del scheduler._flights[number]
        scheduler._lane_load[job.lane] -= 1
        scheduler.queues[model].decodes[job.lane] -= 1
        scheduler.latency.observe(model, BatchShape(work.decodes, work.context), elapsed_s)
        scheduler.counters[model].output_tokens += work.decodes
        now = self._loop.now_s
        for cohort in cohorts:
            cohort.commits += 1
            cohort.in_flight -= 1
            cohort.last_s = now
        if self._has_grown:
            self._unit._note_peaks()
            self._has_grown = False

    def sprint(self) -> None:
        """Steps of the only model on the only busy lane, until the horizon or an end is near.

        Other units' clocks do not matter: until then nobody compares.
        """
        alone = self._executor.lanes.alone()
        if alone is None:
            return
        job, queued = alone
        cohorts = list(self._all())
        jobs = [job, *queued]
        for one in jobs:
            if not isinstance(one, FoldedJob) or len(one.cohorts) != len(cohorts):
                return
        if len(jobs) != self.limits.depth or len(jobs) != self.num_in_flight or job.end is None:
            return
        if self.limits.depth == 1 and job.lane:
            return  # its next step would go to the first lane
        steps = min(
            min(c.ends_after - c.commits - 1, c.most_launches - c.launches) for c in cohorts
        )
        if steps <= 0 or job.end.at_s >= self._executor.horizon():
            return
        job.end.cancel()
        until_s, lanes = self._executor.horizon(), self._executor.lanes
        self._has_grown = run_steps(
            self._unit, lanes, cohorts, jobs, steps, until_s, self._has_grown
        )

    # -- the end -----------------------------------------------------------------------------

    def publish(self) -> None:
        """Tell what was generated so far."""
        for cohort in self._all():
            self._executor.advance(cohort)

    def settle(self) -> None:
        """Write what happened into the sequences, and make batches of what is in flight."""
        for cohort in self._all():
            for sequence in cohort.sequences:
                sequence.num_scheduled += cohort.launches
                sequence.outputs_scheduled += cohort.launches
                sequence.num_committed += cohort.commits
                sequence.outputs_committed += cohort.commits
                sequence.in_flight = cohort.in_flight
                sequence.lane = cohort.lane
                # No worker of a simulation keeps block tables: nothing is left to be sent.
                sequence.num_groups_sent = len(sequence.groups)
            self._executor.advance(cohort)
        for name, cohorts in self._cohorts.items():
            # What was computed of a model that did nothing meanwhile still holds.
            if any(cohort.launches or cohort.commits for cohort in cohorts):
                self.queues[name].changed()
        for number in self._first:
            if number in self._executor.jobs:
                self._executor.adopt(self._executor.jobs[number])
        steps_left = dict.fromkeys(self._all(), 0)
        for job in self._folded.values():
            for cohort in job.cohorts:
                steps_left[cohort] += 1
        for number, job in self._folded.items():
            self._make_batch(number, job, steps_left)

    def _make_batch(self, number: int, job: FoldedJob, steps_left: dict[Cohort, int]) -> None:
        """The batch of a folded job; `steps_left` counts those from it on, by cohort."""
        named = [(s, steps_left[cohort]) for cohort in job.cohorts for s in cohort.sequences]
        named.sort(key=lambda pair: by_order(pair[0]))
        entries = tuple(
            [BatchEntry(_slot(s), s.num_scheduled - left, 1, True) for s, left in named]
        )
        for cohort in job.cohorts:
            steps_left[cohort] -= 1
        batch = Batch(number, job.lane, job.runner.model, Phase.DECODE, entries)
        flight = _Flight(batch, [sequence for sequence, _ in named])
        self._scheduler._flights[number] = flight
        job.batch, job.done = batch, self._unit._done
        self._executor.adopt(job)

    def _all(self) -> Iterator[Cohort]:
        for cohorts in self._cohorts.values():
            yield from cohorts


def _number(job: BatchJob) -> int:
    assert job.batch is not None
    return job.batch.id


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None and sequence.state is SequenceState.RUNNING
    return sequence.slot
