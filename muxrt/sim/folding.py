"""Runs of decode steps in which nothing can change, kept as counts instead of sequences.

While nobody waits, prefills or ends, every decode step of a model does the same to each of its
sequences: one token more. Such a run is folded: sequences that are in the same batches are one
`Cohort`, a step changes a few integers in a compiled loop (`sim/sprint.py`), and what it did is
written into the sequences when the run is over. Several models take turns as the policy says
(`Policy.rotation`), on as many lanes as there are, beside each other at the mesh's prices. The
result is the same to the last bit (tests/test_folding.py).

A run goes no further than anything else that may happen to the unit or be asked of it: a request,
a sample, its timer. It is over before the first end of a sequence, and where blocks may be short.
"""

from collections.abc import Callable, Sequence
from math import inf, nextafter

import numpy as np

from muxrt.core import Batch, Copy, Phase, Result, Transfer, Work
from muxrt.cost.batch import BatchWork
from muxrt.cost.latency import BatchShape
from muxrt.engine.executor import Done
from muxrt.engine.unit import Unit
from muxrt.sched.rotation import Rotation
from muxrt.sched.run import Flying, Stepped, horizon, resume
from muxrt.sim import sprint
from muxrt.sim.cohort import Cohort, make_cohorts
from muxrt.sim.copies import CopyLane
from muxrt.sim.executor import BatchJob, Job, MeshExecutor
from muxrt.sim.loop import FINISH, Event, EventLoop
from muxrt.sim.mesh import MeshCost, Runner
from muxrt.sim.prices import PriceTable
from muxrt.sim.sprint import State

# Requests of a model in a unit got so many tokens more each, the last ones at that time.
Advance = Callable[[str, str, Sequence[int], int, float], None]
# All requests of a model in a unit together got so many tokens more.
Weigh = Callable[[str, str, int], None]

FEW_STEPS = 16  # to be observed: more is quicker by arrays
MIN_STEPS = 2  # of every sequence before its end: shorter runs are not worth their bookkeeping


class FoldingExecutor(MeshExecutor):
    """A mesh that folds runs of decode steps of the unit it belongs to."""

    def __init__(
        self,
        loop: EventLoop,
        cost: MeshCost,
        copies: CopyLane,
        advance: Advance,
        weigh: Weigh,
        horizon_s: Callable[[], float],
    ) -> None:
        """`horizon_s` is when something else may happen to the unit, or be asked of it.

        `weigh` is told of tokens whenever they are asked for, `advance` of each sequence's when the
        run is over: there may be many sequences, and many who ask.
        """
        super().__init__(loop, cost, copies)
        self._horizon_s = horizon_s
        self._advance = advance
        self._weigh = weigh
        self._fold: Fold | None = None

    def launch(self, work: Work, done: Done) -> None:
        """See `MeshExecutor`; the end of a transfer ends a run."""
        if not isinstance(work, Copy | Transfer):
            super().launch(work, done)
            return

        def settled(work: Work, result: Result) -> None:
            self.settle()
            done(work, result)

        self.copies.launch(work, settled)

    def attach(self, unit: Unit) -> None:
        """The unit whose work this is."""
        limits, queues = unit.scheduler.limits, unit.scheduler.queues
        if PriceTable.fits(len(queues), limits.num_lanes):
            self._fold = Fold(unit, self, self.lanes.cost, self._loop)
            self.lanes.after = self._fold.begin

    def settle(self) -> None:
        """The run is over: sequences, flights and jobs are what they would be without it."""
        if self._fold is not None and self._fold.is_running:
            self._fold.settle()

    def publish(self) -> None:
        """Tell how many tokens were generated so far; the run goes on."""
        if self._fold is not None and self._fold.is_running:
            self._fold.publish()

    def take_blocks(self) -> None:
        """The pool is as full as it should be by now; the run goes on."""
        if self._fold is not None and self._fold.is_running:
            self._fold.take_blocks()

    def busy_until_now_s(self, lane: int) -> float:
        """Seconds that `lane` was busy, with what runs on it; the run goes on."""
        if self._fold is not None and self._fold.is_running:
            return self._fold.busy_until_now_s(lane)
        return super().busy_until_now_s(lane)

    def tick(self) -> bool:
        """What the unit's timer does while a run goes on; False if none does."""
        if self._fold is None or not self._fold.is_running:
            return False
        if self._fold.is_due:
            self._fold.settle()
            return False
        self._fold.adapt_quotas()
        return True

    def until_s(self) -> float:
        """What ends before that time happens before anything else does; now, at the least."""
        return max(self._horizon_s(), nextafter(self._loop.now_s, inf))

    def weigh(self, unit: str, cohort: Cohort, commits: int) -> None:
        """Tell what a cohort got since that was told last."""
        steps = commits - cohort.weighed
        if steps:
            cohort.weighed = commits
            self._weigh(cohort.model, unit, steps * len(cohort.sequences))

    def advance(self, unit: str, cohort: Cohort, commits: int, last_s: float) -> None:
        """Tell what every sequence of a cohort got in the whole run."""
        self.weigh(unit, cohort, commits)
        if commits:
            self._advance(cohort.model, unit, cohort.request_ids, commits, last_s)


class Fold:
    """The runs of one unit, one after the other, in the same arrays."""

    def __init__(
        self, unit: Unit, executor: FoldingExecutor, cost: MeshCost, loop: EventLoop
    ) -> None:
        self._unit = unit
        self._executor = executor
        self._loop = loop
        scheduler = unit.scheduler
        self._names = list(scheduler.queues)
        self._models = [queue.model for queue in scheduler.queues.values()]
        self._cohorts: list[Cohort] = []
        self._done: Done | None = None
        self._event: Event | None = None
        self._is_running = False
        num_lanes = scheduler.limits.num_lanes
        longest = max(model.max_sequences for model in self._models)
        self._prices = PriceTable(cost, self._names, num_lanes, longest)
        self._state = self._make_state(num_lanes, scheduler.limits.depth)

    def _make_state(self, num_lanes: int, depth: int) -> State:
        def ints(*shape: int) -> sprint.Ints:
            return np.zeros(shape, np.int64)

        most, num_models = sprint.MOST_COHORTS, len(self._models)
        room = max(model.layout.block_tokens for model in self._models) + 1
        state = State(
            cohorts=ints(most, sprint.COHORT_COLUMNS),
            growing=ints(most, room),
            last_s=np.zeros(most),
            jobs=ints(num_lanes, depth, sprint.JOB_COLUMNS),
            lanes=ints(num_lanes, sprint.LANE_COLUMNS),
            times=np.zeros((num_lanes, sprint.TIME_COLUMNS)),
            running=ints(num_lanes),
            models=ints(num_models, sprint.MODEL_COLUMNS),
            asked=ints(num_models),
            unit=ints(sprint.UNIT_PLACES),
            log=ints(sprint.LOG_STEPS, sprint.LOG_COLUMNS),
            log_s=np.zeros(sprint.LOG_STEPS),
            clock=np.zeros(2),
        )
        for index, model in enumerate(self._models):
            state.models[index, sprint.GROUP_BLOCKS] = model.layout.blocks_per_group
            state.models[index, sprint.BLOCK_TOKENS] = model.layout.block_tokens
            state.models[index, sprint.KEPT_WHOLE] = model.is_kept_whole
        return state

    @property
    def is_running(self) -> bool:
        """A run is under way: what the brain has in its sequences and accounts is old."""
        return self._is_running

    @property
    def is_due(self) -> bool:
        """A unit that holds something of ours, or waits for it, has done so for too long."""
        due_s = self._unit.scheduler.transfers.next_s()
        return due_s is not None and due_s <= self._loop.now_s

    # -- the beginning -----------------------------------------------------------------------

    def begin(self) -> None:
        """Start a run if it can go on for some steps."""
        scheduler = self._unit.scheduler
        steps = horizon(scheduler)
        if steps <= MIN_STEPS + scheduler.limits.depth:
            return
        rotation = scheduler.policy.rotation(scheduler)
        if rotation is None or not scheduler.flights:
            return
        cohorts, remaining = make_cohorts(scheduler), self._executor.tokens.remaining
        ends = [cohort.ends_after(remaining[cohort.model]) for cohort in cohorts]
        if min(ends) <= MIN_STEPS or len(cohorts) > sprint.MOST_COHORTS:
            return
        self._cohorts = cohorts
        self._write_cohorts(ends)
        self._write_models(rotation, steps)
        self._write_lanes(self._executor.lanes.lift())
        self._is_running = True
        self._go()

    def _write_cohorts(self, ends: list[int]) -> None:
        state, most_growth = self._state, [0] * len(self._models)
        rows = []
        for index, cohort in enumerate(self._cohorts):
            model, members = self._names.index(cohort.model), cohort.sequences
            first, size = members[0], len(members)
            context = sum([sequence.num_scheduled for sequence in members])
            rows.append((model, first.lane, first.in_flight, size, context, 0, 0, ends[index]))
            block_tokens = self._models[model].layout.block_tokens
            counts = np.bincount(cohort.rooms(block_tokens), minlength=block_tokens + 1)
            state.growing[index, : block_tokens + 1] = counts
            most_growth[model] += size * self._models[model].layout.blocks_per_group
        state.cohorts[: len(rows)] = rows
        state.last_s[: len(rows)] = 0.0
        state.models[:, sprint.MOST_GROWTH] = most_growth

    def _write_models(self, rotation: Rotation, steps: int) -> None:
        state, memory = self._state, self._unit.scheduler.memory
        self._write_accounts()
        state.models[:, sprint.TOKENS] = 0
        running = {cohort.model for cohort in self._cohorts}
        asked = [self._names.index(name) for name in rotation.models if name in running]
        state.asked[: len(asked)] = asked
        unit = [0] * sprint.UNIT_PLACES
        unit[sprint.NUM_COHORTS] = len(self._cohorts)
        unit[sprint.NUM_MODELS] = len(self._models)
        unit[sprint.AVAILABLE] = memory.pool.num_available
        unit[sprint.MAY_BORROW] = memory.may_borrow
        unit[sprint.HAS_GROWN] = True  # what the brain took last was not looked at yet
        unit[sprint.MOST_LAUNCHES] = steps
        unit[sprint.NUM_ASKED] = len(asked)
        unit[sprint.TURNS] = rotation.turns
        state.unit[:] = unit

    def _write_accounts(self) -> None:
        accounts = self._unit.scheduler.memory.pool.accounts.values()
        self._state.models[:, sprint.USED] = [account.used for account in accounts]
        self._state.models[:, sprint.QUOTA] = [account.quota for account in accounts]
        self._state.models[:, sprint.PEAK] = 0

    def _write_lanes(self, lifted: list[list[Job]]) -> None:
        state, bits = self._state, dict[int, int]()
        for index, cohort in enumerate(self._cohorts):
            for number in cohort.flights:
                bits[number] = bits.get(number, 0) | 1 << index
        state.lanes[:] = 0
        busy_s = self._executor.lanes.busy_s
        for lane in range(len(state.lanes)):
            state.times[lane, sprint.BUSY_S] = busy_s.get(lane, 0.0)
        for position, jobs in enumerate(lifted):
            first = jobs[0]
            assert first.end is not None
            state.running[position] = first.lane
            for place, job in enumerate(jobs):
                assert isinstance(job, BatchJob) and job.batch is not None
                model, work = self._names.index(job.runner.model), job.work
                row = (model, bits[job.batch.id], work.decodes, work.context)
                state.jobs[first.lane, place] = row
                self._done = job.done
            state.lanes[first.lane] = (len(jobs), first.end.number)
            times = (first.started_s, first.since_s, first.left, first.whole_s, first.end.at_s)
            state.times[first.lane, : sprint.BUSY_S] = times
        unit = state.unit
        unit[sprint.NUM_RUNNING] = len(lifted)
        unit[sprint.EVENTS] = 1 + state.lanes[:, sprint.EVENT].max()
        state.clock[sprint.NOW_S] = self._loop.now_s

    # -- on its way --------------------------------------------------------------------------

    def _go(self) -> None:
        """Do what comes before anything else; come back for the rest, or leave it to the brain."""
        if self.is_due:
            self.settle()  # with the step that ends now, the brain gives up what did not come
            return
        state, unit = self._state, self._state.unit
        until_s = self._executor.until_s()
        while True:
            why = sprint.advance(state, self._prices.arrays, until_s)
            if why == sprint.HORIZON:
                next_s = float(state.clock[sprint.NEXT_END_S])
                self._event = self._loop.at(next_s, self._go, FINISH)
                return
            if why == sprint.BRAIN:
                self.settle()
                return
            if why == sprint.LOG_IS_FULL:
                self._observe()
            elif why == sprint.NO_PRICES:
                self._prices.find_shares(int(unit[sprint.WANTED]))
            else:
                self._prices.find_size(int(unit[sprint.WANTED]), int(unit[sprint.WANTED_SIZE]))

    def _observe(self) -> None:
        """The estimates know of all batches so far."""
        state, latency = self._state, self._unit.scheduler.latency
        num_logged = int(state.unit[sprint.NUM_LOGGED])
        state.unit[sprint.NUM_LOGGED] = 0
        log, log_s = state.log[:num_logged], state.log_s[:num_logged]
        if num_logged < FEW_STEPS:
            for (model, size, context), elapsed_s in zip(log.tolist(), log_s.tolist(), strict=True):
                latency.observe(self._names[model], BatchShape(size, context), elapsed_s)
            return
        for model in sorted({self._names.index(cohort.model) for cohort in self._cohorts}):
            mine = log[:, sprint.LOG_MODEL] == model
            sizes, contexts = log[mine, sprint.LOG_SIZE], log[mine, sprint.LOG_CONTEXT]
            if len(sizes):
                latency.observe_all(self._names[model], sizes, contexts, log_s[mine])

    def take_blocks(self) -> None:
        """The groups that sequences have for the tokens they have scheduled by now."""
        memory = self._unit.scheduler.memory
        for index, cohort in enumerate(self._cohorts):
            launches = int(self._state.cohorts[index, sprint.LAUNCHES])
            layout = self._models[self._names.index(cohort.model)].layout
            memory.grow(
                cohort.model,
                [
                    (s, layout.num_groups(s.num_scheduled + launches) - len(s.groups))
                    for s in cohort.sequences
                ],
            )

    def busy_until_now_s(self, lane: int) -> float:
        """Seconds that `lane` was busy, with what runs on it."""
        state = self._state
        busy_s = float(state.times[lane, sprint.BUSY_S])
        if not state.lanes[lane, sprint.LOAD]:
            return busy_s
        return busy_s + self._loop.now_s - float(state.times[lane, sprint.STARTED_S])

    def adapt_quotas(self) -> None:
        """Quotas move with what was used until now; nobody waits for them, so no work starts."""
        self.take_blocks()
        self._tell_peaks()
        self._unit.adapt_quotas()
        self._write_accounts()

    def _tell_peaks(self) -> None:
        peaks = self._state.models[:, sprint.PEAK].tolist()
        self._unit.held(dict(zip(self._names, peaks, strict=True)))

    def publish(self) -> None:
        """Tell how many tokens were generated so far."""
        for index, cohort in enumerate(self._cohorts):
            commits = int(self._state.cohorts[index, sprint.COMMITS])
            self._executor.weigh(self._unit.name, cohort, commits)

    def _advance(self) -> None:
        """Tell what every sequence got."""
        for index, cohort in enumerate(self._cohorts):
            commits = int(self._state.cohorts[index, sprint.COMMITS])
            last_s = float(self._state.last_s[index])
            self._executor.advance(self._unit.name, cohort, commits, last_s)

    # -- the end -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Write what happened into the sequences, and make batches of what is in flight."""
        if self._event is not None:
            self._event.cancel()
        self._is_running = False
        state, unit, executor = self._state, self._unit, self._executor
        scheduler, remaining = unit.scheduler, executor.tokens.remaining
        self._advance()
        self.take_blocks()
        self._observe()
        stepped = []
        for cohort, row in zip(self._cohorts, state.cohorts.tolist(), strict=False):
            launches, commits = row[sprint.LAUNCHES], row[sprint.COMMITS]
            in_flight, lane = row[sprint.IN_FLIGHT], row[sprint.LANE]
            stepped.append(Stepped(cohort.sequences, launches, commits, in_flight, lane))
            left = remaining[cohort.model]
            for sequence in cohort.sequences:
                left[sequence.slot] -= commits  # type: ignore[index]
        for name, row in zip(self._names, state.models.tolist(), strict=True):
            scheduler.counters[name].output_tokens += row[sprint.TOKENS]
        self._tell_peaks()
        if state.unit[sprint.TURNS] and any(one.launches for one in stepped):
            last = (state.unit[sprint.FIRST_ASKED] - 1) % state.unit[sprint.NUM_ASKED]
            scheduler.policy.rotated(self._names[state.asked[last]])
        self._put_back(stepped)

    def _put_back(self, stepped: list[Stepped]) -> None:
        """Lanes with jobs that the brain knows, each of them ending when it would."""
        state, executor = self._state, self._executor
        num_running, lanes = state.unit[sprint.NUM_RUNNING], executor.lanes
        order = state.running[:num_running].tolist()
        rows = {lane: state.jobs[lane, : state.lanes[lane, sprint.LOAD]].tolist() for lane in order}
        batches = iter(
            resume(
                self._unit.scheduler,
                stepped,
                [self._flying(lane, row) for lane, jobs in rows.items() for row in jobs],
            )
        )
        lifted = [[self._job(next(batches), row) for row in jobs] for jobs in rows.values()]
        ends = []
        for (first, *_), lane in zip(lifted, order, strict=True):
            times = state.times[lane].tolist()
            first.started_s, first.since_s, first.left, first.whole_s, end_s, _ = times
            ends.append((state.lanes[lane, sprint.EVENT], first, end_s))
        ends.sort(key=lambda end: end[0])
        lanes.put(lifted, [(job, end_s) for _, job, end_s in ends])
        lanes.busy_s.update(enumerate(state.times[:, sprint.BUSY_S].tolist()))
        lanes.num_batches += int(state.unit[sprint.BATCHES])

    def _flying(self, lane: int, row: list[int]) -> Flying:
        mask = row[sprint.JOB_COHORTS]
        named = [c.sequences for index, c in enumerate(self._cohorts) if mask >> index & 1]
        sequences = [sequence for members in named for sequence in members]
        return Flying(self._names[row[sprint.JOB_MODEL]], lane, sequences)

    def _job(self, batch: Batch, row: list[int]) -> Job:
        work = BatchWork(0, 0, row[sprint.JOB_SIZE], row[sprint.JOB_CONTEXT])
        runner, landed = Runner(batch.model, Phase.DECODE), self._executor.land
        return BatchJob(batch.lane, runner, work, landed, batch=batch, done=self._done)
