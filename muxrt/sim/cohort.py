"""Sequences of one model that are in the same batches, as one thing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from muxrt.core import Sequence
from muxrt.sched.queues import ModelQueue
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
        flights.setdefault(flight.work.model, []).append((number, flight))
    return [
        cohort
        for queue in scheduler.queues.values()
        if queue.decoding
        for cohort in _cohorts(queue, flights.get(queue.name, []))
    ]


def _cohorts(queue: ModelQueue, flights: list[tuple[int, Flight]]) -> list[Cohort]:
    everybody = len(queue.decoding)
    # Most of the time all are in all batches.
    if all(len(flight.sequences) == everybody for _, flight in flights):
        numbers = tuple([number for number, _ in flights])
        return [Cohort(queue.name, list(queue.decoding), numbers)]
    signs: dict[Sequence, tuple[int, ...]] = {}
    for number, flight in flights:
        for sequence in flight.sequences:
            signs[sequence] = (*signs.get(sequence, ()), number)
    alike: dict[tuple[int, ...], list[Sequence]] = {}
    for sequence in queue.decoding:
        alike.setdefault(signs.get(sequence, ()), []).append(sequence)
    return [Cohort(queue.name, members, sign) for sign, members in alike.items()]
