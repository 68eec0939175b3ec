"""The sequences of one model in one unit, by what may happen to them next."""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from muxrt.config.placement import Slo
from muxrt.core import Batch, Phase, Sequence, SequenceState, Work
from muxrt.kvcache.layout import ModelLayout


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the brain knows of a model."""

    name: str
    layout: ModelLayout
    max_model_len: int  # prompt and output tokens of one sequence
    max_sequences: int  # sequences with a slot: running or preempted
    slo: Slo | None = None
    # Its lanes are parts of one device: two decode steps at once would read its weights twice.
    is_kept_whole: bool = False

    @property
    def floor_blocks(self) -> int:
        """Blocks of one sequence of maximum length."""
        return self.layout.num_blocks(self.max_model_len)


def by_order(sequence: Sequence) -> int:
    """Oldest first."""
    return sequence.order


@dataclass(slots=True)
class Ready:
    """Sequences that could take a decode step now, oldest first."""

    with_room: list[Sequence] = field(default_factory=list)
    without_room: list[Sequence] = field(default_factory=list)  # need another block group first


@dataclass(slots=True, eq=False)
class ModelQueue:
    """A model's sequences. Lists are in admission order, oldest first.

    A sequence is in exactly one of `waiting`, `late`, `preempted` and `running` until it is
    finished.
    """

    model: ServedModel
    waiting: deque[Sequence] = field(default_factory=deque)  # never started
    late: deque[Sequence] = field(default_factory=deque)  # likewise, and stepped behind the others
    preempted: list[Sequence] = field(default_factory=list)  # started, hold no blocks
    running: list[Sequence] = field(default_factory=list)  # hold blocks
    prefilling: list[Sequence] = field(default_factory=list)  # running, with prompt to schedule
    decoding: list[Sequence] = field(default_factory=list)  # running, one token per step
    free_slots: list[int] = field(default_factory=list)
    decodes: dict[int, int] = field(default_factory=dict)  # decode batches in flight, by lane
    num_changes: int = 0  # of who is running, and in which phase
    version: int = 0  # counts changes of running sequences: what was computed before is stale
    _ready: dict[int, Ready] = field(default_factory=dict)  # by lane, until something changes

    def __post_init__(self) -> None:
        self.free_slots = list(range(self.model.max_sequences))[::-1]

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def is_empty(self) -> bool:
        return not (self.waiting or self.late or self.preempted or self.running)

    @property
    def is_waitless(self) -> bool:
        """Nobody waits for a prefill, or has one before it."""
        return not (self.waiting or self.late or self.preempted or self.prefilling)

    @property
    def num_waiting(self) -> int:
        """Sequences that never started."""
        return len(self.waiting) + len(self.late)

    def head(self) -> Sequence | None:
        """Who starts or resumes next: the preempted before the new, each oldest first."""
        if self.preempted:
            return self.preempted[0]
        return self.waiting[0] if self.waiting else None

    @property
    def may_start(self) -> bool:
        """The head, if there is one, has or could have a slot and is where it can be started."""
        if self.preempted:  # it is not while it is on its way out to host memory
            return self.preempted[0].state in (SequenceState.WAITING, SequenceState.SWAPPED)
        return bool(self.waiting and self.free_slots)

    def step_behind(self) -> None:
        """The first that waits lets those behind it pass, until it is recalled."""
        self.late.append(self.waiting.popleft())

    def recall(self) -> Sequence:
        """The oldest that stepped behind is first again; not to be asked if there is none."""
        self.waiting.appendleft(self.late.popleft())
        return self.waiting[0]

    def turn_around(self) -> None:
        """Those that stepped behind for those that did not; twice is as before."""
        self.waiting, self.late = self.late, self.waiting

    @property
    def oldest_order(self) -> int:
        """The admission order of the oldest sequence; not to be asked of an empty queue."""
        parts = (self.running, self.preempted, self.waiting, self.late)
        return min(part[0].order for part in parts if part)

    def start(self, sequence: Sequence) -> None:
        """The head begins to run (its blocks are taken)."""
        if sequence.slot is None:
            sequence.slot = self.free_slots.pop()
            assert self.waiting.popleft() is sequence, "only the head may start"
        else:
            self.preempted.remove(sequence)
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=by_order)
        insort(self._part(sequence), sequence, key=by_order)
        self.num_changes += 1
        self.changed()

    def prefilled(self, sequence: Sequence) -> None:
        """Every known token of a running sequence is scheduled: from here on it decodes."""
        self.prefilling.remove(sequence)
        insort(self.decoding, sequence, key=by_order)
        self.num_changes += 1

    def stop(self, sequence: Sequence, state: SequenceState) -> None:
        """A running sequence loses its blocks but keeps its slot and its tokens."""
        self.running.remove(sequence)
        self._part(sequence).remove(sequence)
        insort(self.preempted, sequence, key=by_order)
        sequence.state = state
        self.num_changes += 1
        self.changed()

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is, and free its slot."""
        running = (self.running, self.prefilling, self.decoding)
        for queue in (*running, self.preempted, self.waiting, self.late):
            if sequence in queue:
                queue.remove(sequence)
        self.num_changes += 1
        self.changed()
        if sequence.slot is not None:
            self.free_slots.append(sequence.slot)
            sequence.slot = None

    def flew(self, work: Work, count: int) -> None:
        """A work was launched (1) or is done (-1)."""
        if isinstance(work, Batch) and work.phase is Phase.DECODE:
            self.decodes[work.lane] = self.decodes.get(work.lane, 0) + count
        self.changed()

    def is_elsewhere(self, lane: int) -> bool:
        """It decodes on another lane and is not to be on two."""
        if not self.model.is_kept_whole:
            return False
        return any(count for other, count in self.decodes.items() if other != lane)

    def changed(self) -> None:
        """A running sequence is not what it was."""
        self.version += 1
        self._ready.clear()

    def ready(self, lane: int) -> Ready:
        """Who could take a decode step on `lane`."""
        ready = self._ready.get(lane)
        if ready is None:
            ready = self._ready[lane] = self._find_ready(lane)
        return ready

    def _find_ready(self, lane: int) -> Ready:
        ready, block_tokens = Ready(), self.model.layout.block_tokens
        if self.is_elsewhere(lane):
            return ready
        running = SequenceState.RUNNING
        for sequence in self.decoding:
            if (
                # As `can_run`, without a call for each of hundreds.
                sequence.state is running
                and not sequence.preempt
                # What is in flight of it must come before on the same lane.
                and (not sequence.in_flight or sequence.lane == lane)
                and sequence.outputs_scheduled < sequence.request.max_tokens
            ):
                if sequence.num_scheduled < len(sequence.groups) * block_tokens:
                    ready.with_room.append(sequence)
                else:
                    ready.without_room.append(sequence)
        return ready

    def _part(self, sequence: Sequence) -> list[Sequence]:
        return self.decoding if sequence.is_prefilled else self.prefilling

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.preempted
        yield from self.waiting
        yield from self.late

    def check(self) -> bool:
        """Order, states and slots agree."""
        for queue in (self.running, self.preempted, list(self.waiting), list(self.late)):
            orders = [s.order for s in queue]
            assert orders == sorted(orders), f"{self.name}: a queue is out of order"
        slots = [s.slot for s in self if s.slot is not None] + self.free_slots
        assert sorted(slots) == list(range(self.model.max_sequences)), f"{self.name}: slots leak"
        assert all(s.slot is None and not s.groups for s in (*self.waiting, *self.late))
        assert self.decoding == [s for s in self.running if s.is_prefilled]
        assert self.prefilling == [s for s in self.running if not s.is_prefilled]
        assert all(self._find_ready(lane) == ready for lane, ready in self._ready.items())
        return True
