"""Sequences that leave for another unit, and those that come from one: piece by piece, or whole.

K and V of a sequence that another unit is going to fetch are told of as soon as they are final,
while the rest is computed: a chunk of its prompt when its batch is done, and of the batch that
ends the prompt a part after every few layers (layer-wise transfer: Splitwise, ISCA 2024, section
IV-C). So that batch is launched in parts. What is told of was sealed before: a unit that fetches
it waits for nothing. A short prompt is told of in one piece, at its end (the paper: serialized).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from msgspec.structs import replace

from muxrt.core import (
    Batch,
    BatchEntry,
    FinishReason,
    Incoming,
    Layers,
    Outgoing,
    Output,
    Piece,
    Refusal,
    Request,
    Result,
    Sequence,
    SequenceState,
    Transfer,
    TransferKind,
    pack_ids,
)
from muxrt.errors import TransferFailed
from muxrt.sched.due import DueTimes
from muxrt.sched.memory import Memory
from muxrt.sched.queues import ModelQueue

# A batch has at most one part for so many tokens: a part costs about a millisecond.
PART_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Ends:
    """What the scheduler knows of its sequences."""

    alive: Mapping[int, Sequence]  # unfinished, by request id
    finish: Callable[[Sequence], None]


class Transfers:
    """What is sealed and fetched when, and for how long either side waits for the other."""

    def __init__(
        self, queues: Mapping[str, ModelQueue], memory: Memory, ends: Ends, stream_tokens: int
    ) -> None:
        """Prompts with fewer tokens to compute than `stream_tokens` leave in one piece."""
        self._queues, self._memory, self._ends = queues, memory, ends
        self._stream_tokens = stream_tokens
        self._leases = DueTimes(ends.alive.__contains__)  # until then its blocks are held
        self._awaited = DueTimes(self._is_awaiting)  # until then its next piece must have come

    def next_s(self) -> float | None:
        """When `expire` has something to do; None while nobody waits for anybody."""
        times = (self._leases.next_s(), self._awaited.next_s())
        return min((time for time in times if time is not None), default=None)

    def expire(self, now: float) -> list[Output]:
        """Let go of what was held for too long, or is waited for for too long.

        Whoever comes late computes it again.
        """
        while (request_id := self._leases.pop(now)) is not None:
            self._ends.finish(self._ends.alive[request_id])
        outputs = []
        while (request_id := self._awaited.pop(now)) is not None:
            sequence = self._ends.alive[request_id]
            assert sequence.incoming is not None, "or it would not count"
            if sequence.incoming.due_s <= now:
                outputs.append(self._fail(sequence, "the next piece of K and V did not come"))
        return outputs

    def _is_awaiting(self, request_id: int) -> bool:
        sequence = self._ends.alive.get(request_id)
        incoming = sequence.incoming if sequence else None
        return incoming is not None and not incoming.is_whole

    def begin(self, sequence: Sequence) -> None:
        """A sequence got its blocks: those that it had before, if any, are no longer its."""
        is_leaving = sequence.request.hold_s and sequence.incoming is None
        is_long = sequence.num_pending >= self._stream_tokens
        sequence.outgoing = Outgoing() if is_leaving and is_long else None

    # -- what leaves -------------------------------------------------------------------------

    def parts(self, batch: Batch, sequences: list[Sequence], ids: Iterator[int]) -> Iterator[Batch]:
        """A prefill batch as it is to be launched; parts but the first have `ids` of their own.

        It is cut where it ends the prompt of a sequence that leaves piece by piece. Each part has
        half of the layers that are left: a piece has half the time to move that it took to compute,
        and what is left to move at the end is one layer.
        """
        num_layers = self._queues[batch.model].model.layout.shape.num_layers
        cuts = halves(num_layers, batch.num_tokens // PART_TOKENS)
        if not cuts or not any(s.outgoing and s.is_prefilled for s in sequences):
            yield batch
            return
        silent = tuple(replace(entry, samples=False) for entry in batch.entries)
        yield replace(batch, entries=silent, layers=Layers(0, cuts[0], num_layers))
        known = tuple(replace(entry, blocks=b"") for entry in batch.entries)
        silent = tuple(replace(entry, samples=False) for entry in known)
        for begin, end in pairwise([*cuts, num_layers]):
            entries, layers = known if end == num_layers else silent, Layers(begin, end, num_layers)
            yield replace(batch, id=next(ids), entries=entries, opened=(), layers=layers)

    def computed_part(self, batch: Batch, sequences: list[Sequence]) -> None:
        """Some layers of a batch are done; the others are in flight."""
        for entry, sequence in zip(batch.entries, sequences, strict=True):
            if sequence.outgoing is not None:
                self.computed(sequence, sequence.outgoing, entry, batch.layers)

    def computed(
        self, sequence: Sequence, outgoing: Outgoing, entry: BatchEntry, layers: Layers | None
    ) -> None:
        """A batch, or its part, is done: what is final of a sequence now can be sealed."""
        if sequence.can_run:
            end = entry.start + entry.num_tokens
            self._give(sequence, outgoing, end, layers, is_last=False)

    def hold(self, sequence: Sequence) -> None:
        """A sequence has all its tokens; its blocks stay until another unit has fetched them."""
        sequence.state = SequenceState.HELD
        self._queues[sequence.request.model].changed()
        outgoing = sequence.outgoing = sequence.outgoing or Outgoing()
        self._give(sequence, outgoing, sequence.num_committed, None, is_last=True)

    def _give(
        self,
        sequence: Sequence,
        outgoing: Outgoing,
        end: int,
        layers: Layers | None,
        is_last: bool,
    ) -> None:
        """Seal what is final up to token `end`, in these layers, and was not sealed yet."""
        layout = self._queues[sequence.request.model].model.layout
        is_end = end >= sequence.request.prompt_tokens
        num_groups = layout.num_groups(end) if is_end else end // layout.block_tokens
        is_whole = layers is None or layers.end == layers.of
        end_layer = layout.shape.num_layers if layers is None else layers.end
        if num_groups <= outgoing.num_groups or end_layer <= outgoing.num_layers:
            return
        piece = Piece(
            number=outgoing.num_pieces,
            blocks=pack_ids(sequence.groups[outgoing.num_groups : num_groups]),
            first_group=outgoing.num_groups,
            first_layer=outgoing.num_layers,
            end_layer=end_layer,
            num_tokens=min(end, num_groups * layout.block_tokens),
            is_last=is_last,
        )
        outgoing.num_pieces += 1
        outgoing.num_layers = 0 if is_whole else end_layer
        outgoing.num_groups = num_groups if is_whole else outgoing.num_groups
        outgoing.unsealed.append(piece)
        self._memory.copies.append((sequence, TransferKind.SEAL))

    # -- what comes --------------------------------------------------------------------------

    def extend(self, request_id: int, piece: Piece, payload: bytes, num_outputs: int) -> bool:
        """A piece more of a sequence can be fetched; False if nobody waits for it any more.

        With the last one comes what was generated: `payload` replaces the request's, and ends in
        `num_outputs` tokens more.
        """
        sequence = self._ends.alive.get(request_id)
        if sequence is None or sequence.incoming is None or sequence.incoming.is_whole:
            return False
        incoming = sequence.incoming
        incoming.pieces.append(piece)
        incoming.due_s = inf
        if piece.is_last:
            incoming.is_whole = True
            sequence.request = replace(sequence.request, payload=payload, num_outputs=num_outputs)
            sequence.outputs_scheduled = sequence.outputs_committed = num_outputs
        self._memory.fetch(sequence)
        return True

    # -- landing -----------------------------------------------------------------------------

    def commit(
        self, sequence: Sequence, work: Transfer, result: Result, now: float
    ) -> list[Output]:
        """A piece was sealed, or pieces were fetched; what there is to say of that."""
        if sequence.state is SequenceState.FINISHED:
            self._memory.settle(sequence)
            return []
        if result.error is not None:
            return [self._fail(sequence, result.error)]
        if work.kind is TransferKind.FETCH:
            return self._fetched(sequence, now)
        return self._sealed(sequence, replace(work.pieces[0], checksums=result.checksums), now)

    def _fetched(self, sequence: Sequence, now: float) -> list[Output]:
        request, incoming = sequence.request, sequence.incoming
        assert request.source is not None and incoming is not None, "what was fetched, came"
        incoming.is_asking = False
        if self._memory.fetched(sequence):
            return [Output(request.id, is_fetched=True, attempt=request.attempt)]
        if incoming.num_asked == len(incoming.pieces):  # it holds blocks, and can do nothing
            incoming.due_s = now + request.source.wait_s
            self._awaited.add(incoming.due_s, request.id)
        self._memory.fetch(sequence)
        return []

    def _sealed(self, sequence: Sequence, piece: Piece, now: float) -> list[Output]:
        request = sequence.request
        if piece.is_last:
            self._leases.add(now + request.hold_s, request.id)
            return [Output(request.id, finish=FinishReason.LENGTH, held=piece)]
        self._memory.settle(sequence)  # it may have had to give its blocks back meanwhile
        is_there = sequence.state is SequenceState.RUNNING or sequence.state is SequenceState.HELD
        return [Output(request.id, held=piece)] if is_there else []

    def _fail(self, sequence: Sequence, error: str) -> Output:
        self._ends.finish(sequence)
        request = sequence.request
        refusal = Refusal(TransferFailed.status, TransferFailed.kind, error)
        end = FinishReason.ERROR
        return Output(request.id, finish=end, refusal=refusal, attempt=request.attempt)


def halves(num_layers: int, max_parts: int) -> list[int]:
    """Where a pass is cut so that each part has half of what is left; nowhere: not at all.

    8 layers, 4 parts: before layers 4, 6 and 7.
    """
    cuts: list[int] = []
    left = num_layers
    while left > 1 and len(cuts) < max_parts - 1:
        left -= left // 2
        cuts.append(num_layers - left)
    return cuts


def incoming_of(request: Request) -> Incoming | None:
    """What is to come of a request's K and V at first; None: they are computed here."""
    source = request.source
    return Incoming(list(source.pieces), source.is_whole) if source is not None else None
