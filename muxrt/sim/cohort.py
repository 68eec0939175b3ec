"""Sequences of one model that are in the same batches, as one thing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from muxrt.core import Sequence
from muxrt.sched.queues import ModelQueue
from muxrt.sched.scheduler import Scheduler
from muxrt.sim.executor import BatchJob

MIN_STEPS = 4  # of every sequence before its end: shorter runs are not worth their bookkeeping


@dataclass(slots=True, eq=False)
class Cohort:
    """Sequences of one model that are in the same batches."""

    model: str
    sequences: list[Sequence]  # oldest first
    lane: int
    in_flight: int
    context: int  # tokens that all of them have scheduled, together
    ends_after: int  # commits until the first of them ends
    most_launches: int
    growing: dict[int, list[Sequence]]  # by tokens of room that were left when the run began
    launches: int = 0
    commits: int = 0
    told: int = 0  # of the commits: clients and router know of them
    last_s: float = 0.0  # of the last commit

    def short(self, launch: int, block_tokens: int) -> list[Sequence]:
        """Who needs a group for its token of that launch, counted from 0."""
        found = self.growing.get(launch % block_tokens, [])
        if launch and launch % block_tokens == 0:
            return found + self.growing.get(block_tokens, [])
        return found


@dataclass(slots=True, eq=False)
class FoldedJob(BatchJob):
    """A decode step of cohorts. Its batch is made only if the run ends before it does."""

    id: int = 0
    cohorts: list[Cohort] = field(default_factory=list)


def make_cohorts(
    scheduler: Scheduler, remaining: Mapping[tuple[str, int], int]
) -> dict[str, list[Cohort]] | None:
    """The cohorts of each model; None if somebody ends too soon for a run to be worth it."""
    for name, queue in scheduler.queues.items():
        for sequence in queue.decoding:
            assert sequence.slot is not None
            if remaining[name, sequence.slot] <= MIN_STEPS or sequence.request.keys:
                return None
            if sequence.request.max_tokens - sequence.outputs_scheduled <= MIN_STEPS:
                return None
    signs: dict[Sequence, tuple[int, ...]] = {}
    for number, flight in scheduler._flights.items():
        for sequence in flight.sequences:
            signs[sequence] = (*signs.get(sequence, ()), number)
    found: dict[str, list[Cohort]] = {}
    for name, queue in scheduler.queues.items():
        alike: dict[tuple[int, ...], list[Sequence]] = {}
        for sequence in queue.decoding:
            alike.setdefault(signs.get(sequence, ()), []).append(sequence)
        found[name] = [_cohort(queue, members, remaining) for members in alike.values()]
    return found


def _cohort(
    queue: ModelQueue, members: list[Sequence], remaining: Mapping[tuple[str, int], int]
) -> Cohort:
    block_tokens = queue.model.layout.block_tokens
    growing: dict[int, list[Sequence]] = {}
    ends, launches = [], []
    for sequence in members:
        assert sequence.slot is not None
        room = len(sequence.groups) * block_tokens - sequence.num_scheduled
        assert 0 <= room <= block_tokens
        growing.setdefault(room, []).append(sequence)
        left = sequence.request.max_tokens - sequence.outputs_committed
        ends.append(min(remaining[queue.name, sequence.slot], left))
        launches.append(sequence.request.max_tokens - sequence.outputs_scheduled)
    return Cohort(
        model=queue.name,
        sequences=members,
        lane=members[0].lane,
        in_flight=members[0].in_flight,
        context=sum(sequence.num_scheduled for sequence in members),
        ends_after=min(ends),
        most_launches=min(launches),
        growing=growing,
    )


def is_last(cohorts: list[Cohort]) -> bool:
    """The next commit of these cohorts ends a sequence."""
    # A loop, as `any` of a generator takes three times as long.
    for cohort in cohorts:  # noqa: SIM110
        if cohort.commits + 1 >= cohort.ends_after:
            return True
    return False
