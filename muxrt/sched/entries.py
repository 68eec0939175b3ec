"""What a batch says of each of its sequences, and what that changes of them."""

from muxrt.core import BatchEntry, Sequence, SlotOpen, pack_ids


def open_slot(sequence: Sequence) -> SlotOpen:
    """The worker gets the sequence's payload with this batch."""
    assert sequence.slot is not None
    sequence.opened = True
    return SlotOpen(sequence.slot, sequence.request.payload)


def add_step(sequence: Sequence, lane: int) -> BatchEntry:
    """Put a decode step of a sequence into a batch on `lane`: `add_chunk` of one, for hundreds."""
    assert sequence.slot is not None
    start, groups = sequence.num_scheduled, sequence.groups
    sequence.num_scheduled = start + 1
    sequence.outputs_scheduled += 1
    sequence.in_flight += 1
    sequence.lane = lane
    first_group = sequence.num_groups_sent
    if first_group == len(groups):
        return BatchEntry(sequence.slot, start, 1, True, first_group)
    sequence.num_groups_sent = len(groups)
    return BatchEntry(sequence.slot, start, 1, True, first_group, pack_ids(groups[first_group:]))


def add_chunk(sequence: Sequence, num_tokens: int, lane: int) -> BatchEntry:
    """Put `num_tokens` of a prompt into a batch on `lane`."""
    assert sequence.slot is not None
    start, first_group = sequence.num_scheduled, sequence.num_groups_sent
    samples = (
        num_tokens == sequence.num_pending
        and sequence.outputs_scheduled < sequence.request.max_tokens
    )
    sequence.num_scheduled += num_tokens
    sequence.outputs_scheduled += samples
    sequence.num_groups_sent = len(sequence.groups)
    sequence.in_flight += 1
    sequence.lane = lane
    blocks = pack_ids(sequence.groups[first_group:])
    return BatchEntry(sequence.slot, start, num_tokens, samples, first_group, blocks)


def may_run(sequence: Sequence, lane: int) -> bool:
    """Not on its way out, and what is in flight of it comes before on the same lane."""
    return sequence.can_run and (not sequence.in_flight or sequence.lane == lane)


def is_prompt_done(sequence: Sequence) -> bool:
    """K and V of all of its prompt are there."""
    return sequence.num_committed >= sequence.request.prompt_tokens
