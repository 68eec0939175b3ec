"""Sequences of one model that are in the same batches, as one thing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from muxrt.core import Batch, Sequence
from muxrt.sched.run import stepping
from muxrt.sched.scheduler import Flight, Scheduler


@dataclass(slots=True, eq=False)
class Cohort:
    """Sequences of one model that are in the same batches."""

    model: str
    sequences: list[Sequence]  # oldest first
    flights: tuple[int, ...]  # ids of the works that name them
    weighed: int = 0  # of its commits: the router has counted their tokens
    request_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.request_ids = [sequence.request.id for sequence in self.sequences]

    def ends_after(self, remaining: Mapping[int, int]) -> int:
        """Commits until the first of them says its last token; `remaining` is by slot."""
        # A slot is an int while a sequence runs.
        return min([remaining[sequence.slot] for sequence in self.sequences])  # type: ignore[index]

    def rooms(self, block_tokens: int) -> list[int]:
        """Tokens that each may still have scheduled before it needs a block group."""
        return [len(s.groups) * block_tokens - s.num_scheduled for s in self.sequences]


def make_cohorts(scheduler: Scheduler) -> list[Cohort]:
    """All decoding sequences, model by model."""
    flights: dict[str, list[tuple[int, Flight]]] = {}
    for number, flight in scheduler.flights.items():
        if isinstance(flight.work, Batch):
            flights.setdefault(flight.work.model, []).append((number, flight))
    return [
        cohort
        for queue in scheduler.queues.values()
        if (everybody := stepping(queue))
        for cohort in _cohorts(queue.name, everybody, flights.get(queue.name, []))
    ]


def _cohorts(
    model: str, everybody: list[Sequence], flights: list[tuple[int, Flight]]
) -> list[Cohort]:
    # Most of the time all are in all batches.
    if all(len(flight.sequences) == len(everybody) for _, flight in flights):
        numbers = tuple([number for number, _ in flights])
        return [Cohort(model, everybody, numbers)]
    signs: dict[Sequence, tuple[int, ...]] = {}
    for number, flight in flights:
        for sequence in flight.sequences:
            signs[sequence] = (*signs.get(sequence, ()), number)
    alike: dict[tuple[int, ...], list[Sequence]] = {}
    for sequence in everybody:
        alike.setdefault(signs.get(sequence, ()), []).append(sequence)
    return [Cohort(model, members, sign) for sign, members in alike.items()]
