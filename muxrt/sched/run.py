"""Runs of decode steps that somebody else counts: how long they may be, and what they did.

While nobody waits, prefills, or leaves, every decode step of a model does the same to each of its
sequences. `horizon` says for how long that holds, `resume` writes down what came of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from muxrt.core import Batch, BatchEntry, Phase, Sequence, SequenceState, Transfer, TransferKind
from muxrt.sched.queues import ModelQueue, by_order
from muxrt.sched.scheduler import Flight, Scheduler


@dataclass(frozen=True, slots=True)
class Stepped:
    """Sequences of one model that were in the same batches, and what became of those."""

    sequences: list[Sequence]
    launches: int
    commits: int
    in_flight: int  # works that name them now
    lane: int


@dataclass(frozen=True, slots=True)
class Flying:
    """A decode step that was launched and has not been committed."""

    model: str
    lane: int
    sequences: list[Sequence]


def horizon(scheduler: Scheduler) -> int:
    """Decode steps that every running sequence has before its limit if nothing else happens.

    0 where something else can come next: nothing runs, somebody waits, prefills, is preempted, on
    the way out or back, or blocks are kept for somebody. Prompts under hash keys are left to the
    brain. Sequences that are fetched from another unit have their blocks and change nothing until
    that is done, which is for the caller to notice.
    """
    if scheduler.prefills_in_flight() or not scheduler.memory.is_settled:
        return 0
    if scheduler.lane_load[scheduler.limits.copy_lane] != len(fetches(scheduler)):
        return 0
    steps = []
    for queue in scheduler.queues.values():
        if not queue.is_waitless:
            return 0
        for sequence in stepping(queue):
            request = sequence.request
            # From the first token here on it has a pace: that of one that was fetched is to come.
            is_plain = not request.keys and sequence.first_token_s is not None
            steps.append(request.max_tokens - sequence.outputs_scheduled if is_plain else 0)
    return min(steps, default=0)


def stepping(queue: ModelQueue) -> list[Sequence]:
    """Who decodes, oldest first, without those whose K and V are still on the way."""
    running = SequenceState.RUNNING
    return [sequence for sequence in queue.decoding if sequence.state is running]


def fetches(scheduler: Scheduler) -> dict[int, Flight]:
    """What is being fetched from other units, by work."""
    if not scheduler.lane_load[scheduler.limits.copy_lane]:
        return {}
    return {
        number: flight
        for number, flight in scheduler.flights.items()
        if isinstance(flight.work, Transfer) and flight.work.kind is TransferKind.FETCH
    }


def resume(
    scheduler: Scheduler, stepped: Iterable[Stepped], flying: Iterable[Flying]
) -> list[Batch]:
    """Go on after a run: `flying` are all batches in flight, in order of launch.

    The blocks of what was launched are there (`Memory.grow`), observations of its latency too. The
    batches name no blocks: whoever counted the steps keeps no block tables.
    """
    moved = set()
    for one in stepped:
        for sequence in one.sequences:
            sequence.num_scheduled += one.launches
            sequence.outputs_scheduled += one.launches
            sequence.num_committed += one.commits
            sequence.outputs_committed += one.commits
            sequence.in_flight = one.in_flight
            sequence.lane = one.lane
            sequence.num_groups_sent = len(sequence.groups)
        if one.launches or one.commits:
            moved.add(one.sequences[0].request.model)
    for name, queue in scheduler.queues.items():
        queue.decodes.clear()
        if name in moved:  # what was computed of the others still holds
            queue.changed()
    fetched = fetches(scheduler)
    scheduler.flights.clear()
    scheduler.flights.update(fetched)
    scheduler.lane_load[:] = [0] * len(scheduler.lane_load)
    scheduler.lane_load[scheduler.limits.copy_lane] = len(fetched)
    batches = []
    seen: dict[Sequence, int] = {}
    for flight in flying:
        batches.append(_batch(scheduler, flight, seen))
    return batches


def _batch(scheduler: Scheduler, flying: Flying, seen: dict[Sequence, int]) -> Batch:
    """The batch of a step; `seen` counts the steps in flight that came before, by sequence."""
    sequences, entries = sorted(flying.sequences, key=by_order), []
    for sequence in sequences:
        assert sequence.slot is not None and sequence.state is SequenceState.RUNNING
        before = seen[sequence] = seen.get(sequence, 0) + 1
        start = sequence.num_scheduled - sequence.in_flight + before - 1
        entries.append(BatchEntry(sequence.slot, start, 1, True))
    number, lane, model = next(scheduler.work_ids), flying.lane, flying.model
    batch = Batch(number, lane, model, Phase.DECODE, tuple(entries))
    scheduler.flights[number] = Flight(batch, sequences)
    scheduler.lane_load[lane] += 1
    decodes = scheduler.queues[model].decodes
    decodes[lane] = decodes.get(lane, 0) + 1
    return batch
