"""The sequences of one model in one unit, by what may happen to them next."""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from muxrt.core import Sequence, SequenceState
from muxrt.kvcache.layout import ModelLayout


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the brain knows of a model."""

    name: str
    layout: ModelLayout
    max_model_len: int  # prompt and output tokens of one sequence
    max_sequences: int  # sequences with a slot: running or preempted

    @property
    def floor_blocks(self) -> int:
        """Blocks of one sequence of maximum length."""
        return self.layout.num_blocks(self.max_model_len)


def _by_order(sequence: Sequence) -> int:
    return sequence.order


@dataclass(slots=True, eq=False)
class ModelQueue:
    """A model's sequences. Lists are in admission order, oldest first.

    A sequence is in exactly one of them until it is finished.
    """

    model: ServedModel
    waiting: deque[Sequence] = field(default_factory=deque)  # never started
    preempted: list[Sequence] = field(default_factory=list)  # started, hold no blocks
    running: list[Sequence] = field(default_factory=list)  # hold blocks
    free_slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_slots = list(range(self.model.max_sequences))[::-1]

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def is_empty(self) -> bool:
        return not (self.waiting or self.preempted or self.running)

    def head(self) -> Sequence | None:
        """Who starts or resumes next: the preempted before the new, each oldest first."""
        if self.preempted:
            return self.preempted[0]
        return self.waiting[0] if self.waiting else None

    def start(self, sequence: Sequence) -> None:
        """The head begins to run (its blocks are taken)."""
        if sequence.slot is None:
            sequence.slot = self.free_slots.pop()
            assert self.waiting.popleft() is sequence, "only the head may start"
        else:
            self.preempted.remove(sequence)
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=_by_order)

    def stop(self, sequence: Sequence, state: SequenceState) -> None:
        """A running sequence loses its blocks but keeps its slot and its tokens."""
        self.running.remove(sequence)
        insort(self.preempted, sequence, key=_by_order)
        sequence.state = state

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is, and free its slot."""
        for queue in (self.running, self.preempted, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
                break
        if sequence.slot is not None:
            self.free_slots.append(sequence.slot)
            sequence.slot = None

    def prefilling(self) -> Iterator[Sequence]:
        """Running sequences whose tokens are not all scheduled yet."""
        return (s for s in self.running if not s.is_decoding and s.num_pending > 0)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.preempted
        yield from self.waiting

    def check(self) -> bool:
        """Order, states and slots agree."""
        for queue in (self.running, self.preempted, list(self.waiting)):
            orders = [s.order for s in queue]
            assert orders == sorted(orders), f"{self.name}: a queue is out of order"
        slots = [s.slot for s in self if s.slot is not None] + self.free_slots
        assert sorted(slots) == list(range(self.model.max_sequences)), f"{self.name}: slots leak"
        assert all(s.slot is None and not s.groups for s in self.waiting)
        return True
