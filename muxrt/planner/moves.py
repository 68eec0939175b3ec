"""Small changes of a draft: shift, swap, split, merge, replicate, drop, change of tp."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, Group, Part, packs_pool
from muxrt.planner.workload import Problem

# Partners that are tried for a group: the least loaded ones, and only so many.
NUM_PARTNERS = 8
LEAST_TRAFFIC = 1e-3  # a replica with less is dropped


@dataclass(frozen=True, slots=True)
class Move:
    """Groups by index that go, and groups that come."""

    name: str
    gone: tuple[int, ...]
    come: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A move that fits, with the gain that capacities promise."""

    name: str
    gone: list[int]
    come: list[Group]
    guess: float


class Layout:
    """A draft under change: which groups host a model, GPUs in use, and values of groups."""

    def __init__(self, problem: Problem, capacity: Capacity, draft: Draft) -> None:
        self.problem = problem
        self.capacity = capacity
        self.groups: dict[int, Group] = {}
        self.values: dict[int, float] = {}
        self.hosts: dict[str, set[int]] = {model: set() for model in problem.demands}
        self.sizes = [Counter[int]() for _ in problem.pools]
        self._next = 0
        for group in draft:
            self._add(group)

    @property
    def draft(self) -> Draft:
        return tuple(self.groups[index] for index in sorted(self.groups))

    @property
    def value(self) -> float:
        return sum(self.values.values())

    def free_gpus(self, pool: int) -> int:
        """GPUs of a pool in no group."""
        used = sum(size * count for size, count in self.sizes[pool].items())
        return self.problem.pools[pool].num_gpus - used

    def goodput_rps(self, index: int) -> float:
        """Goodput of one group."""
        return self.capacity.goodput_rps(self.groups[index])

    @property
    def has_free_gpus(self) -> bool:
        return any(self.free_gpus(pool.index) for pool in self.problem.pools)

    def more_gpus(self, proposal: Proposal) -> int:
        """How many GPUs a proposal takes that are free now."""
        gone = sum(self.groups[index].size for index in proposal.gone)
        return sum(group.size for group in proposal.come) - gone

    def propose(self, move: Move) -> Proposal | None:
        """The move with all traffic dealt anew; None where it does not fit."""
        if not self._packs(move) or not all(self._fits(group) for group in move.come):
            return None
        proposal = self._rebalanced(move)
        if proposal is None or not all(group.parts for group in proposal.come):
            return None
        return proposal

    def make(self, proposal: Proposal, least_gain: float) -> bool:
        """Make the move if it gains more than that."""
        least = sum(self.values[index] for index in proposal.gone) + least_gain
        tuned = self._tuned(proposal.come, least)
        if tuned is None:
            return False
        for index in proposal.gone:
            self._remove(index)
        for group in tuned:
            self._add(group)
        return True

    def _tuned(self, groups: list[Group], least: float) -> list[Group] | None:
        """The groups with their best lanes, if worth more than `least`; else None, early."""
        hope = sum(self.capacity.most_value(group) for group in groups)
        found = []
        for group in groups:
            if hope <= least:
                return None
            best = self.capacity.tuned(group)
            hope += self.capacity.value(best) - self.capacity.most_value(group)
            found.append(best)
        return found if hope > least else None

    def _fits(self, group: Group) -> bool:
        names = group.models
        return len(set(names)) == len(names) and self.problem.fits(group.pool, group.size, names)

    def _packs(self, move: Move) -> bool:
        delta = Counter((group.pool, group.size) for group in move.come)
        delta.subtract((self.groups[i].pool, self.groups[i].size) for i in move.gone)
        if not any(delta.values()):
            return True
        for pool in {pool for pool, _ in delta}:
            sizes = self.sizes[pool].copy()
            for (where, size), count in delta.items():
                if where == pool:
                    sizes[size] += count
            if not packs_pool(+sizes, self.problem.pools[pool]):
                return False
        return True

    def _rebalanced(self, move: Move) -> Proposal | None:
        """The move with the traffic of all its models dealt anew over all of their replicas."""
        models = {part.model for group in move.come for part in group.parts}
        models |= {part.model for i in move.gone for part in self.groups[i].parts}
        touched = set().union(*(self.hosts[model] for model in models)) | set(move.gone)
        kept = [self.groups[index] for index in sorted(touched - set(move.gone))]
        groups = [*kept, *move.come]
        for model in sorted(models):
            groups = deal(self.capacity, groups, model)
            if not any(model in group.models for group in groups):
                return None  # nobody may lose a last replica
        gone, come = sorted(touched), [group for group in groups if group.parts]
        guess = sum(self.capacity.guess(group) for group in come)
        guess -= sum(self.capacity.guess(self.groups[index]) for index in gone)
        return Proposal(move.name, gone, come, guess)

    def _add(self, group: Group) -> None:
        index, self._next = self._next, self._next + 1
        self.groups[index] = group
        self.values[index] = self.capacity.value(group)
        self.sizes[group.pool][group.size] += 1
        for part in group.parts:
            self.hosts[part.model].add(index)

    def _remove(self, index: int) -> None:
        group = self.groups.pop(index)
        del self.values[index]
        self.sizes[group.pool][group.size] -= 1
        for part in group.parts:
            self.hosts[part.model].discard(index)


def deal(capacity: Capacity, groups: list[Group], model: str) -> list[Group]:
    """`groups` with the model's traffic in proportion to what each has room for."""
    hosts = [index for index, group in enumerate(groups) if model in group.models]
    if len(hosts) < 2:
        return [_with_traffic(group, model, 1.0) for group in groups]
    weights = {}
    for index in hosts:
        group = groups[index]
        rps = capacity.rps(model, (group.pool, group.size))
        room = 1 - capacity.load(group, without=model)
        weights[index] = rps * max(room, 0.02)
    total = sum(weights.values())
    if not total:
        weights, total = dict.fromkeys(hosts, 1.0), float(len(hosts))
    shares = {index: weight / total for index, weight in weights.items()}
    shares = {index: share for index, share in shares.items() if share >= LEAST_TRAFFIC}
    kept = sum(shares.values())
    return [
        _with_traffic(group, model, shares.get(index, 0.0) / kept)
        for index, group in enumerate(groups)
    ]


def _with_traffic(group: Group, model: str, traffic: float) -> Group:
    if model not in group.models:
        return group
    parts = [
        replace(part, traffic=traffic) if part.model == model else part for part in group.parts
    ]
    return group.with_parts(part for part in parts if part.traffic > 0)


def moves(layout: Layout, index: int) -> Iterator[Move]:
    """Changes that begin at one group, the most promising first."""
    group = layout.groups[index]
    partners = _partners(layout, index)
    yield from _new_meshes(layout, index)
    yield from _widths(layout, index)
    for part in group.parts:
        without = group.with_parts(p for p in group.parts if p is not part)
        for other in partners:
            host = layout.groups[other]
            if part.model in host.models:
                continue
            more = host.with_parts((*host.parts, Part(part.model, 0.5)))
            yield Move("replicate", (other,), (more,))
            left = (without,) if without.parts else ()
            yield Move("shift", (index, other), (*left, more))
            for back in host.parts:
                if back.model not in group.models:
                    mine = without.with_parts((*without.parts, back))
                    theirs = host.with_parts((*(p for p in host.parts if p is not back), part))
                    yield Move("swap", (index, other), (mine, theirs))
        if len(layout.hosts[part.model]) > 1:
            yield Move("drop", (index,), (without,) if without.parts else ())
    for other in partners:
        yield from _merges(layout, index, other)


def _partners(layout: Layout, index: int) -> list[int]:
    """The least loaded groups, one of each kind that is alike."""
    likes = layout.problem.likes
    seen: dict[tuple[object, ...], int] = {}
    for other, group in layout.groups.items():
        if other != index:
            alike = tuple(sorted((likes[p.model], round(p.traffic, 3)) for p in group.parts))
            seen.setdefault((group.pool, group.size, alike), other)
    return sorted(seen.values(), key=lambda i: layout.capacity.load(layout.groups[i]))[
        :NUM_PARTNERS
    ]


def growth(layout: Layout, index: int) -> Iterator[Move]:
    """Changes that use more GPUs."""
    yield from _new_meshes(layout, index)
    yield from (move for move in _widths(layout, index) if move.name == "widen")


def _new_meshes(layout: Layout, index: int) -> Iterator[Move]:
    """A replica of the group, or of one of its models, on GPUs that are free."""
    group = layout.groups[index]
    for pool in layout.problem.pools:
        for size in (8, 4, 2, 1):
            if size > layout.free_gpus(pool.index):
                continue
            if len(group.parts) > 1:
                yield Move("replicate", (), (Group(pool.index, size, group.parts),))
            for part in group.parts:
                yield Move("replicate", (), (Group(pool.index, size, (part,)),))


def _widths(layout: Layout, index: int) -> Iterator[Move]:
    """The group on twice or half of its GPUs, and the same GPUs as two meshes."""
    group = layout.groups[index]
    if layout.free_gpus(group.pool) >= group.size:
        yield Move("widen", (index,), (replace(group, size=2 * group.size),))
    if group.size == 1:
        return
    half = replace(group, size=group.size // 2)
    yield Move("split", (index,), (half, half))
    yield Move("narrow", (index,), (half,))
    if len(group.parts) > 1:
        by_load = sorted(group.parts, key=lambda part: -_share(layout, group, part))
        yield Move(
            "split", (index,), (half.with_parts(by_load[::2]), half.with_parts(by_load[1::2]))
        )
        yield Move("split", (index,), (half.with_parts(by_load[:1]), half.with_parts(by_load[1:])))


def _merges(layout: Layout, index: int, other: int) -> Iterator[Move]:
    """Two meshes of the same size as one of twice the size, or on one of them."""
    group, host = layout.groups[index], layout.groups[other]
    if group.pool != host.pool or group.size != host.size:
        return
    names = {part.model: part for part in (*group.parts, *host.parts)}
    both = group.with_parts(names.values())
    yield Move("merge", (index, other), (replace(both, size=2 * group.size),))
    yield Move("merge", (index, other), (both,))


def _share(layout: Layout, group: Group, part: Part) -> float:
    rps = layout.capacity.rps(part.model, (group.pool, group.size))
    rate = layout.problem.demands[part.model].rate_rps * part.traffic
    return rate / rps if rps else 1e3
