"""A draft under change: alike groups are counted, traffic is dealt anew by every move."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, Group, Part, packs_pool
from muxrt.planner.workload import Problem

LEAST_TRAFFIC = 5e-3  # of the largest replica's: one with less is dropped
LEAST_ROOM = 0.02  # of a mesh: what a full one is still given
EMPTIEST = 0.95  # of the most room: this is as good
DIGITS = 12  # of a share of traffic: alike groups are equal


class Kind(NamedTuple):
    """`copies` groups that are alike."""

    group: Group
    copies: int


@dataclass(frozen=True, slots=True)
class Move:
    """Groups that go, each named by the number of its kind, and groups that come."""

    name: str
    gone: tuple[int, ...]
    come: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A move that fits, with all that it touches, and the gain that capacities promise."""

    name: str
    gone: tuple[int, ...]  # kinds that are replaced as a whole
    come: tuple[Kind, ...]
    guess: float
    more_gpus: int  # how many that are free now it takes


class Layout:
    """Kinds of groups by number, which of them host a model, and what each group is worth."""

    def __init__(self, problem: Problem, capacity: Capacity, draft: Draft) -> None:
        self.problem = problem
        self.capacity = capacity
        self.kinds: dict[int, Kind] = {}
        self.values: dict[int, float] = {}  # of one group of a kind
        self.loads: dict[int, float] = {}
        self.hosts: dict[str, set[int]] = {model: set() for model in problem.demands}
        self.sizes = [Counter[int]() for _ in problem.pools]
        self._numbers: dict[Group, int] = {}
        self._guesses: dict[int, float] = {}
        self._next = 0
        for group, count in Counter(map(_rounded, draft)).items():
            self._add(Kind(group, count))

    @property
    def draft(self) -> Draft:
        kinds = (self.kinds[number] for number in sorted(self.kinds))
        return tuple(kind.group for kind in kinds for _ in range(kind.copies))

    @property
    def value(self) -> float:
        return sum(self.values[number] * kind.copies for number, kind in self.kinds.items())

    def free_gpus(self, pool: int) -> int:
        """GPUs of a pool in no group."""
        used = sum(size * count for size, count in self.sizes[pool].items())
        return self.problem.pools[pool].num_gpus - used

    @property
    def has_free_gpus(self) -> bool:
        return any(self.free_gpus(pool.index) for pool in self.problem.pools)

    def propose(self, move: Move) -> Proposal | None:
        """The move with all traffic dealt anew; None where it does not fit."""
        if not all(map(self._fits, move.come)) or not self._packs(move):
            return None
        taken = Counter(move.gone)
        if any(self.kinds[number].copies < count for number, count in taken.items()):
            return None
        return self._dealt(move, taken)

    def tilt(self, model: str, giver: int, taker: int, part: float) -> Proposal | None:
        """One group of a kind gives `part` of a model's traffic to one of another, or its own."""
        taken = Counter((giver, taker))
        if any(self.kinds[number].copies < count for number, count in taken.items()):
            return None
        less, more = self.kinds[giver].group, self.kinds[taker].group
        given = round(part * less.traffic(model), DIGITS)
        less = _with_traffic(less, model, round(less.traffic(model) - given, DIGITS))
        more = _with_traffic(more, model, round(more.traffic(model) + given, DIGITS))
        if not self._fits(more):
            return None
        come = [
            Kind(self.kinds[number].group, self.kinds[number].copies - count)
            for number, count in taken.items()
        ]
        come = [kind for kind in come if kind.copies] + [Kind(less, 1), Kind(more, 1)]
        guess = self.capacity.guess(less) + self.capacity.guess(more)
        guess -= sum(self.capacity.guess(self.kinds[number].group) for number in (giver, taker))
        return Proposal("tilt", tuple(sorted(taken)), tuple(come), guess, 0)

    def make(self, proposal: Proposal, least_gain: float) -> bool:
        """Make the move if it gains more than that."""
        before = sum(self.values[n] * self.kinds[n].copies for n in proposal.gone)
        if not self._is_worth(proposal.come, before + least_gain):
            return False
        for number in proposal.gone:
            self._remove(number)
        for kind in proposal.come:
            self._add(Kind(self.capacity.tuned(kind.group), kind.copies))
        return True

    def _is_worth(self, kinds: Iterable[Kind], least: float) -> bool:
        """Whether they are worth more than `least`; says no as early as it can."""
        most = [(kind, self.capacity.most_value(kind.group) * kind.copies) for kind in kinds]
        hope = sum(value for _, value in most)
        for kind, value in most:
            if hope <= least:
                return False
            hope += self.capacity.lanes(kind.group).value * kind.copies - value
        return hope > least

    def _fits(self, group: Group) -> bool:
        names = group.models
        return len(set(names)) == len(names) and self.problem.fits(group.pool, group.size, names)

    def _packs(self, move: Move) -> bool:
        delta = Counter((group.pool, group.size) for group in move.come)
        gone = (self.kinds[number].group for number in move.gone)
        delta.subtract((group.pool, group.size) for group in gone)
        for pool in {pool for (pool, _), change in delta.items() if change}:
            sizes = self.sizes[pool].copy()
            for (where, size), change in delta.items():
                if where == pool:
                    sizes[size] += change
            if not packs_pool(+sizes, self.problem.pools[pool]):
                return False
        return True

    def _dealt(self, move: Move, taken: Counter[int]) -> Proposal | None:
        """The move with the traffic of all its models dealt anew over all of their replicas."""
        groups = [*move.come, *(self.kinds[number].group for number in taken)]
        models = sorted({part.model for group in groups for part in group.parts})
        touched = sorted(set(taken).union(*(self.hosts[model] for model in models)))
        kinds = [
            Kind(self.kinds[number].group, self.kinds[number].copies - taken[number])
            for number in touched
        ]
        kinds = [kind for kind in kinds if kind.copies] + [Kind(group, 1) for group in move.come]
        hosts: dict[str, list[int]] = {model: [] for model in models}
        for index, kind in enumerate(kinds):
            for part in kind.group.parts:
                if part.model in hosts:
                    hosts[part.model].append(index)
        if not all(hosts.values()):
            return None  # nobody may lose a last replica
        for model, where in hosts.items():
            deal(self.capacity, kinds, model, where)
        if not all(kind.group.parts for kind in kinds[len(kinds) - len(move.come) :]):
            return None  # what came got no traffic
        come = tuple(kind for kind in kinds if kind.group.parts)
        guess = sum(self.capacity.guess(kind.group) * kind.copies for kind in come)
        guess -= sum(self._guesses[number] for number in touched)
        gpus = sum(kind.group.size * kind.copies for kind in come)
        gpus -= sum(self.kinds[n].group.size * self.kinds[n].copies for n in touched)
        return Proposal(move.name, tuple(touched), come, guess, gpus)

    def _add(self, kind: Kind) -> None:
        group = kind.group
        number = self._numbers.get(group)
        if number is None:
            number, self._next = self._next, self._next + 1
            self._numbers[group] = number
            self.values[number] = self.capacity.lanes(group).value
            self.loads[number] = self.capacity.load(group)
            for part in group.parts:
                self.hosts[part.model].add(number)
        else:
            kind = Kind(group, kind.copies + self.kinds[number].copies)
            self.sizes[group.pool][group.size] -= self.kinds[number].copies
        self.kinds[number] = kind
        self._guesses[number] = self.capacity.guess(group) * kind.copies
        self.sizes[group.pool][group.size] += kind.copies

    def _remove(self, number: int) -> None:
        kind = self.kinds.pop(number)
        group = kind.group
        del self.values[number], self.loads[number], self._guesses[number], self._numbers[group]
        self.sizes[group.pool][group.size] -= kind.copies
        for part in group.parts:
            self.hosts[part.model].discard(number)


def deal(capacity: Capacity, kinds: list[Kind], model: str, hosts: Sequence[int]) -> None:
    """Change the model's traffic in `kinds` at `hosts`: in proportion to what each has room for.

    What exceeds all the room goes where the others lose least by it: to the emptiest.
    """
    if len(hosts) == 1 and kinds[hosts[0]].copies == 1:
        kinds[hosts[0]] = Kind(_with_traffic(kinds[hosts[0]].group, model, 1.0), 1)
        return
    rooms = {}
    for index in hosts:
        group = kinds[index].group
        free = max(1 - capacity.load(group, without=model), LEAST_ROOM)
        rooms[index] = free, free * capacity.rps(model, (group.pool, group.size))
    rate_rps = capacity.rate_rps(model)
    total_rps = sum(rps * kinds[index].copies for index, (_, rps) in rooms.items())
    most = max(free for free, _ in rooms.values())
    emptiest = [index for index, (free, _) in rooms.items() if free > EMPTIEST * most]
    excess = max(0.0, rate_rps - total_rps) / sum(kinds[index].copies for index in emptiest)
    weights = {
        index: rps + (excess if index in emptiest else 0.0) for index, (_, rps) in rooms.items()
    }
    least = LEAST_TRAFFIC * max(weights.values())
    total = sum(weight * kinds[i].copies for i, weight in weights.items() if weight >= least)
    for index, weight in weights.items():
        traffic = round(weight / total, DIGITS) if weight >= least else 0.0
        group = _with_traffic(kinds[index].group, model, traffic)
        kinds[index] = Kind(group, kinds[index].copies)


def _with_traffic(group: Group, model: str, traffic: float) -> Group:
    """The group with that share of the model's traffic; 0: without the model."""
    parts = [part for part in group.parts if part.model != model]
    if traffic > 0:
        parts.append(Part(model, traffic))
    return group.with_parts(parts)


def _rounded(group: Group) -> Group:
    return group.with_parts(Part(p.model, round(p.traffic, DIGITS)) for p in group.parts)
