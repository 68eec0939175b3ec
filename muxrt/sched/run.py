"""Runs of decode steps that somebody else counts: how long they may be, and what they did.

While nobody waits, prefills, or leaves, every decode step of a model does the same to each of its
sequences. `horizon` says for how long that holds, `resume` writes down what came of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from muxrt.core import Batch, BatchEntry, Phase, Sequence, SequenceState
from muxrt.sched.queues import by_order
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
    brain.
    """
    copies_in_flight = scheduler.lane_load[scheduler.limits.copy_lane]
    if scheduler.prefills_in_flight() or copies_in_flight or not scheduler.memory.is_settled:
        return 0
    steps = []
    for queue in scheduler.queues.values():
        if not queue.is_waitless:
            return 0
        for sequence in queue.decoding:
            request = sequence.request
            steps.append(0 if request.keys else request.max_tokens - sequence.outputs_scheduled)
    return min(steps, default=0)


def resume(
    scheduler: Scheduler, stepped: Iterable[Stepped], flying: Iterable[Flying]
) -> list[Batch]:
    """Go on after a run: `flying` are all works in flight, in order of launch; their batches.

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
    scheduler.flights.clear()
    scheduler.lane_load[:] = [0] * len(scheduler.lane_load)
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
