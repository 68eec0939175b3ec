"""The scheduler of one unit: turns sequences into work, and results into tokens.

Mechanism only: which model and which phase comes next is a policy's choice (`sched/policies`).
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeVar

from muxrt.core import (
    Batch,
    BatchEntry,
    Copy,
    CopyKind,
    FinishReason,
    Output,
    Phase,
    Refusal,
    Request,
    Result,
    Scheduled,
    Sequence,
    SequenceState,
    Transfer,
    TransferKind,
)
from muxrt.cost.latency import BatchShape, Latency, attention_work
from muxrt.errors import Overloaded
from muxrt.sched.admission import Admission, Allowance, Need
from muxrt.sched.due import DueTimes
from muxrt.sched.entries import add_chunk, add_step, is_prompt_done, may_run, open_slot
from muxrt.sched.memory import Memory
from muxrt.sched.queues import ModelQueue, by_order
from muxrt.sched.rotation import Rotation
from muxrt.sched.transfers import Ends, Transfers, incoming_of

LATENESS_MARGIN = 2.0  # of a predicted prefill: others share its batch, it may wait for the lane
AnyWork = TypeVar("AnyWork", Batch, Copy, Transfer)


class Policy(Protocol):
    """Chooses what an idle lane does next."""

    beside_share: float  # of the pace that lanes beside a prefill must keep (sched/admission.py)

    def next_batch(self, scheduler: "Scheduler", lane: int, now: float) -> Batch | None:
        """A batch made by `scheduler.prefill` or `scheduler.decode`, or None to leave it idle."""

    def rotation(self, scheduler: "Scheduler") -> Rotation | None:
        """How decode steps would go on if nothing else happened; None: not by turns alone."""

    def rotated(self, last: str) -> None:
        """Decode steps went by that rotation, the last one was of the model `last`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what one batch and one lane take."""

    num_lanes: int = 1
    depth: int = 1  # works in flight per lane
    prefill_tokens: int = 512  # of one prefill batch
    stream_tokens: int = 256  # a prompt that leaves goes in pieces from so many tokens on

    @property
    def copy_lane(self) -> int:
        """The lane that moves bytes comes after those that compute."""
        return self.num_lanes


@dataclass(slots=True)
class Counters:
    """What one model did since the unit started."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_hit_tokens: int = 0
    refused: int = 0


@dataclass(slots=True, eq=False)
class Flight:
    """A launched work and the sequences it names."""

    work: Scheduled
    sequences: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the sequences of a unit from `add` to their last output."""

    def __init__(
        self,
        queues: Mapping[str, ModelQueue],
        memory: Memory,
        policy: Policy,
        latency: Latency,
        limits: Limits,
    ) -> None:
        self.queues = queues
        self.memory = memory
        self.policy = policy
        self.limits = limits
        self.latency = latency
        self.admission = Admission(
            queues, latency, limits.num_lanes, limits.prefill_tokens, policy.beside_share
        )
        self.counters = {name: Counters() for name in queues}
        self._sequences: dict[int, Sequence] = {}  # unfinished, by request id
        self.flights: dict[int, Flight] = {}
        self.lane_load = [0] * (limits.num_lanes + 1)  # the copy lane is the last
        self._num_prefills = 0  # in flight
        self._orders = count()
        self.work_ids = count()
        self.deadlines = DueTimes(self._is_waiting)  # of first tokens
        ends = Ends(self._sequences, self._finish)
        self.transfers = Transfers(queues, memory, ends, limits.stream_tokens)
        self._parts: deque[tuple[Batch, list[Sequence]]] = deque()  # of a pass that was begun
        self._parts_s: dict[int, float] = {}  # what those took that are done, by lane

    # -- arrivals and departures -------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request whose lengths the unit has checked."""
        sequence = Sequence(
            request,
            next(self._orders),
            outputs_scheduled=request.num_outputs,
            outputs_committed=request.num_outputs,
        )
        sequence.incoming = incoming_of(request)
        self._sequences[request.id] = sequence
        self.queues[request.model].waiting.append(sequence)
        if request.deadline_s is not None:
            self.deadlines.add(request.deadline_s, request.id)

    def abort(self, request_id: int) -> bool:
        """Drop a request; its blocks are free when its work in flight is done. False = unknown."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence)
        return True

    def expire(self, now: float) -> list[Output]:
        """Refuse who can no longer be in time; let go of what was held or awaited for too long."""
        outputs = self.transfers.expire(now)
        for queue in self.queues.values():
            while queue.waiting and not queue.preempted and self._is_late(queue.waiting[0], now):
                outputs.append(self._refuse(queue.waiting[0], now))
        while (request_id := self.deadlines.pop(now)) is not None:
            outputs.append(self._refuse(self._sequences[request_id], now))
        return outputs

    def _is_waiting(self, request_id: int) -> bool:
        sequence = self._sequences.get(request_id)
        return sequence is not None and sequence.slot is None

    def _is_late(self, sequence: Sequence, now: float) -> bool:
        """Even started now, its prefill would end after the deadline.

        What is known of latencies is only as new as the last batch. So an idle unit computes a
        request that seems too late, or one that has become faster would never know it.
        """
        request = sequence.request
        if request.deadline_s is None or not any(q.running for q in self.queues.values()):
            return False
        return now + LATENESS_MARGIN * self.prompt_s(request) > request.deadline_s

    def prompt_s(self, request: Request) -> float:
        """How long its prompt alone should take, nothing cached; 0 while nothing is known."""
        tokens = request.prompt_tokens
        shape = BatchShape(tokens, attention_work(0, tokens))
        return self.latency.predict(request.model, shape) or 0.0

    def _refuse(self, sequence: Sequence, now: float) -> Output:
        self._finish(sequence)
        self.counters[sequence.request.model].refused += 1
        message = f"{sequence.request.model}: no first token within the queue's time limit"
        # A queue that did not move for so long will not have gone in less.
        retry_after_s = max(1.0, now - sequence.request.arrived_s)
        refusal = Refusal(Overloaded.status, Overloaded.kind, message, retry_after_s)
        return Output(sequence.request.id, finish=FinishReason.DEADLINE, refusal=refusal)

    # -- launching ---------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        return len(self.flights)

    @property
    def is_idle(self) -> bool:
        """Nothing waits, runs or flies."""
        return not self._sequences and not self.flights

    def schedule(self, now: float) -> Scheduled | None:
        """The next work that fits now; None when every lane is full or nothing can run."""
        if self._parts:
            part, sequences = self._parts.popleft()
            for sequence in sequences:
                sequence.in_flight += 1
            return self._fly(part, sequences)
        if self.memory.copies:
            return self._next_copy()
        for _ in range(2):
            for lane in self._idle_lanes():
                batch = self.policy.next_batch(self, lane, now)
                if batch is not None:
                    return batch
            if self.memory.copies:  # a policy that found no blocks may have preempted by swapping
                return self._next_copy()
            # With nothing in flight nothing changes: whoever blocks are kept for cannot come now.
            if self.flights or not self.memory.disclaim_all():
                break
        return None

    def _idle_lanes(self) -> list[int]:
        """Lanes that take more work, the emptiest first."""
        loads = self.lane_load[: self.limits.num_lanes]
        idle = [lane for lane, load in enumerate(loads) if load < self.limits.depth]
        return sorted(idle, key=loads.__getitem__)

    def prefills_in_flight(self) -> int:
        """Prefill batches that run or are queued on a lane."""
        return self._num_prefills

    def prefill(self, model: str, lane: int, now: float) -> Batch | None:
        """A batch of prompt chunks of `model`; None if none can run on `lane` now.

        Prompts under way come first, then those of the queue, while they fit the token budget
        whole; only the first may be longer and goes in chunks.
        """
        queue, allowed = self.queues[model], self._allowance(model, now)
        chunks = self._cut(queue, lane, allowed) if allowed.tokens else []
        if not chunks:
            return None
        opened = tuple(open_slot(s) for s, _ in chunks if not s.opened)
        entries = tuple(add_chunk(sequence, tokens, lane) for sequence, tokens in chunks)
        sequences = [sequence for sequence, _ in chunks]
        for sequence in sequences:
            if sequence.is_prefilled:
                queue.prefilled(sequence)
        batch = Batch(next(self.work_ids), lane, model, Phase.PREFILL, entries, opened)
        first, *others = self.transfers.parts(batch, sequences, self.work_ids)
        self._parts.extend((other, sequences) for other in others)
        return self._fly(first, sequences)

    def _cut(self, queue: ModelQueue, lane: int, allowed: Allowance) -> list[tuple[Sequence, int]]:
        """Sequences of a prefill batch, those that it starts included, and their tokens."""
        chunks: list[tuple[Sequence, int]] = []
        budget = allowed.tokens
        for sequence in queue.prefilling:
            if may_run(sequence, lane) and (not chunks or sequence.num_pending <= budget):
                chunks.append((sequence, min(budget, sequence.num_pending)))
                budget -= chunks[-1][1]
        for _ in range(allowed.sequences):
            head = queue.head()
            if head is None or (chunks and self.memory.num_unknown(head) > budget):
                break
            if not self._start(queue, head):
                break
            if head.can_run and head.num_pending > 0:
                chunks.append((head, min(budget, head.num_pending)))
                budget -= chunks[-1][1]
        return chunks

    def _start(self, queue: ModelQueue, head: Sequence) -> bool:
        if not queue.may_start:
            return False
        is_new = head.slot is None
        if not self.memory.start(head):
            return False
        self.transfers.begin(head)
        self.memory.disclaim(queue.name)
        if is_new and head.state is not SequenceState.FETCHING:
            counters = self.counters[queue.name]
            counters.prompt_tokens += head.request.prompt_tokens
            counters.prefix_hit_tokens += head.num_cached
        return True

    def decode(self, model: str, lane: int) -> Batch | None:
        """One decode step of all of `model`'s decoding sequences that may run on `lane`."""
        ready = self.queues[model].ready(lane)
        sequences = ready.with_room
        if ready.without_room:
            grown = self._grow(ready.without_room)
            # To grow, an older sequence may have preempted newer ones.
            stayed = [sequence for sequence in ready.with_room if sequence.can_run]
            sequences = sorted(stayed + grown, key=by_order)
        if not sequences:
            return None
        entries = tuple([add_step(sequence, lane) for sequence in sequences])
        batch = Batch(next(self.work_ids), lane, model, Phase.DECODE, entries)
        return self._fly(batch, sequences)

    def _grow(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those of one model's `sequences`, oldest first, that got room for one token more."""
        grown = []
        for sequence in sequences:
            if sequence.can_run:
                if not self.memory.extend(sequence, 1):
                    break  # there are no blocks for a newer one either
                grown.append(sequence)
        return grown

    def can_decode(self, model: str, lane: int) -> bool:
        """Some sequence of `model` could take a decode step on `lane`, blocks permitting."""
        ready = self.queues[model].ready(lane)
        return bool(ready.with_room or ready.without_room)

    def wants_prefill(self, model: str, lane: int) -> bool:
        """`model` has prompts under way, or sequences that wait for no more than blocks."""
        return self.queues[model].may_start or self.is_prefilling(model, lane)

    def may_prefill(self, model: str, lane: int, now: float) -> bool:
        """A prefill of `model` would cost no running sequence its TPOT."""
        allowed = self._allowance(model, now)
        if not allowed.tokens:
            return False
        return allowed.sequences > 0 or self.is_prefilling(model, lane)

    def _allowance(self, model: str, now: float) -> Allowance:
        queue = self.queues[model]
        if queue.prefilling:
            need = Need(queue.prefilling[0].num_pending, None)
        elif (head := queue.head()) is not None:
            need = Need(self.memory.num_unknown(head), head.request.deadline_s)
        else:
            return Allowance(0, 0)
        return self.admission.allowance(model, need, now)

    def predicted_s(self, batch: Batch) -> float:
        """How long `batch` should take; 0 while nothing is known of its model."""
        return self.latency.predict(batch.model, BatchShape.of(batch.entries)) or 0.0

    def is_prefilling(self, model: str, lane: int) -> bool:
        """Prompts of `model` are under way and may go on on `lane`."""
        return any(may_run(sequence, lane) for sequence in self.queues[model].prefilling)

    def _next_copy(self) -> Copy | Transfer:
        sequence, kind = self.memory.copies.popleft()
        lane, number = self.limits.copy_lane, next(self.work_ids)
        if kind is not TransferKind.SEAL:  # its batches go on beside it, where they are
            sequence.lane = lane
        sequence.in_flight += 1
        if isinstance(kind, CopyKind):
            return self._fly(self.memory.copy(sequence, kind, number, lane), [sequence])
        return self._fly(self.memory.transfer(sequence, kind, number, lane), [sequence])

    def _fly(self, work: AnyWork, sequences: list[Sequence]) -> AnyWork:
        self.flights[work.id] = Flight(work, sequences)
        self._num_prefills += _is_prefill(work)
        self.lane_load[work.lane] += 1
        self.queues[work.model].flew(work, 1)
        return work

    # -- landing -----------------------------------------------------------------------------

    def commit(self, work: Scheduled, result: Result, now: float) -> list[Output]:
        """Account for a finished work; what its sequences gave, and whether they ended."""
        flight = self.flights.pop(work.id)
        self.lane_load[work.lane] -= 1
        self._num_prefills -= _is_prefill(work)
        self.queues[work.model].flew(work, -1)
        for sequence in flight.sequences:
            sequence.in_flight -= 1
        if isinstance(work, Transfer):
            return self.transfers.commit(flight.sequences[0], work, result, now)
        elapsed_s = result.elapsed_s + self._parts_s.pop(work.lane, 0.0)
        if result.error is not None:
            return self._fail(flight.sequences, result.error)
        if isinstance(work, Copy):
            self._commit_copy(flight.sequences[0], work, result)
            return []
        if not work.ends_pass:
            self._parts_s[work.lane] = elapsed_s
            self.transfers.computed_part(work, flight.sequences)
            return []  # the other layers are in flight, and account for the rest
        self.latency.observe(work.model, BatchShape.of(work.entries), elapsed_s)
        return self._commit_batch(work, flight.sequences, result, now)

    def _commit_copy(self, sequence: Sequence, work: Copy, result: Result) -> None:
        self.memory.copied(sequence, work.kind)
        self.memory.settle(sequence)

    def _commit_batch(
        self, batch: Batch, sequences: list[Sequence], result: Result, now: float
    ) -> list[Output]:
        outputs = []
        finished, num_tokens = SequenceState.FINISHED, 0
        for index, (entry, sequence) in enumerate(zip(batch.entries, sequences, strict=True)):
            if sequence.state is finished:
                self.memory.settle(sequence)  # a step past its end: drop it
                continue
            sequence.num_committed += entry.num_tokens
            if sequence.request.keys:
                self._publish(sequence, entry)
            token = result.tokens[index] if entry.samples else None
            if token is not None:
                if sequence.first_token_s is None:
                    sequence.first_token_s = now
                sequence.outputs_committed += 1
                num_tokens += 1
            output = self._output(sequence, index, token, result)
            if output is not None:
                outputs.append(output)
            if sequence.outgoing is not None:
                self.transfers.computed(sequence, sequence.outgoing, entry, None)
            if sequence.preempt and not sequence.in_flight:
                self.memory.settle(sequence)
        self.counters[batch.model].output_tokens += num_tokens
        return outputs

    def _publish(self, sequence: Sequence, entry: BatchEntry) -> None:
        """Groups of the prompt that are complete now may be reused by others."""
        keys = sequence.request.keys
        if sequence.num_cached >= entry.start + entry.num_tokens:
            return
        size = self.queues[sequence.request.model].model.layout.block_tokens
        done = min(sequence.num_committed // size, len(keys))
        for index in range(entry.start // size, done):
            self.memory.pool.prefixes.publish(sequence.groups[index], keys[index])

    def _output(
        self, sequence: Sequence, index: int, token: int | None, result: Result
    ) -> Output | None:
        request = sequence.request
        finish = None
        if token is not None and result.stopped[index]:
            finish = FinishReason.STOP
        elif sequence.outputs_committed >= request.max_tokens and is_prompt_done(sequence):
            finish = FinishReason.LENGTH
        if finish is FinishReason.LENGTH and request.hold_s:
            self.transfers.hold(sequence)
            finish = None  # it ends when it can be fetched
        elif finish is not None:
            self._finish(sequence)
        prompt = result.prompt_logprobs[index] if result.prompt_logprobs else None
        if token is None:
            if finish is None and not prompt:
                return None
            return Output(request.id, (), finish, None, prompt or None, sequence.num_cached)
        logprobs = result.logprobs[index] if result.logprobs else None
        return Output(
            request.id,
            (token,),
            finish,
            None if logprobs is None else (logprobs,),
            prompt or None,
            sequence.num_cached,
        )

    def _fail(self, sequences: Iterable[Sequence], error: str) -> list[Output]:
        """A batch that raised takes its sequences with it, and nobody else."""
        outputs = []
        for sequence in sequences:
            if sequence.state is not SequenceState.FINISHED:
                self._finish(sequence)
                refusal = Refusal(500, "server_error", error)
                outputs.append(
                    Output(sequence.request.id, finish=FinishReason.ERROR, refusal=refusal)
                )
            else:
                self.memory.settle(sequence)
        return outputs

    def _finish(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.id]
        # Its claim, if it had one, was for it; the next head makes its own.
        self.memory.disclaim(sequence.request.model)
        self.memory.abandon(sequence)

    # -- proof -------------------------------------------------------------------------------

    def check(self) -> bool:
        """Queues, blocks and flights agree. Costs time: for tests."""
        alive = [sequence for queue in self.queues.values() for sequence in queue]
        for queue in self.queues.values():
            queue.check()
        self.memory.check(alive)
        flying: dict[Sequence, int] = {}
        for flight in self.flights.values():
            for sequence in flight.sequences:
                flying[sequence] = flying.get(sequence, 0) + 1
        assert all(s.in_flight == flying.get(s, 0) for s in alive), "a flight is miscounted"
        assert sum(self.lane_load) == len(self.flights)
        assert self._num_prefills == sum(_is_prefill(f.work) for f in self.flights.values())
        unfinished = {s.request.id for s in alive if s.state is not SequenceState.FINISHED}
        assert unfinished == self._sequences.keys(), "a sequence is lost"
        return True


def _is_prefill(work: Scheduled) -> bool:
    return isinstance(work, Batch) and work.phase is Phase.PREFILL
