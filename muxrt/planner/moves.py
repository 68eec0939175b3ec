"""Small changes of a draft: shift, swap, split, merge, replicate, drop, change of tp, trade."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest

from muxrt.planner.draft import Group, Part
from muxrt.planner.layout import Layout, Move, Proposal

# Partners that are tried for a group: the least loaded kinds, and only so many.
NUM_PARTNERS = 5
NUM_RELEASES = 4
HALF = 0.5  # any share: traffic is dealt anew
TILTS = (0.1, 0.3)  # of a replica's traffic, to another one
MAX_HOSTS = 8  # kinds of groups between which a model's traffic is tilted


@dataclass(frozen=True, slots=True)
class Release:
    """A move that frees GPUs, for another one to take."""

    move: Move
    pool: int
    gpus: int


def moves(layout: Layout, number: int, releases: Sequence[Release]) -> Iterator[Move]:
    """Changes that begin at one group of a kind."""
    partners = _partners(layout, number)
    yield from growth(layout, number)
    yield from drops(layout, number)
    yield from _narrower(layout, number)
    for part in layout.kinds[number].group.parts:
        for other in partners:
            yield from _exchanges(layout, number, part, other)
    for other in partners:
        yield from _merges(layout, number, other)
    for release in releases:
        yield from _trades(layout, number, release)


def tilts(layout: Layout, number: int) -> Iterator[Proposal]:
    """Some traffic of a model from one of its replicas to another, or to a new one."""
    group = layout.kinds[number].group
    partners = _partners(layout, number)
    for part in group.parts:
        hosts = nsmallest(MAX_HOSTS, layout.hosts[part.model])
        pairs = [(number, other) for other in dict.fromkeys((*hosts, *partners))]
        pairs += [(other, number) for other in hosts if other != number]
        for giver, taker in pairs:
            found = (layout.tilt(part.model, giver, taker, share) for share in TILTS)
            yield from (proposal for proposal in found if proposal is not None)


def _partners(layout: Layout, number: int) -> list[int]:
    """The least loaded kinds, this one among them only where there are several of it."""
    others = [other for other, kind in layout.kinds.items() if other != number or kind.copies > 1]
    return nsmallest(NUM_PARTNERS, others, key=lambda other: (layout.loads[other], other))


def _exchanges(layout: Layout, number: int, part: Part, other: int) -> Iterator[Move]:
    """A model of one group goes to another group, too or instead, or in exchange."""
    group, host = layout.kinds[number].group, layout.kinds[other].group
    if part.model in host.models:
        return
    without = group.with_parts(p for p in group.parts if p is not part)
    more = host.with_parts((*host.parts, Part(part.model, HALF)))
    yield Move("replicate", (other,), (more,))
    yield Move("shift", (number, other), (*_whole(without), more))
    for back in host.parts:
        theirs = host.with_parts((*(p for p in host.parts if p is not back), part))
        if back.model not in group.models:
            mine = without.with_parts((*without.parts, back))
            yield Move("swap", (number, other), (mine, theirs))
        if _has_others(layout, back.model, other):
            yield Move("displace", (number, other), (*_whole(without), theirs))
            yield Move("displace", (other,), (theirs,))


def _has_others(layout: Layout, model: str, host: int) -> bool:
    """Whether a group of the kind `host` is not the only one with the model."""
    return len(layout.hosts[model]) > 1 or layout.kinds[host].copies > 1


def _whole(group: Group) -> tuple[Group, ...]:
    return (group,) if group.parts else ()


def growth(layout: Layout, number: int) -> Iterator[Move]:
    """Changes that use GPUs that are free: a replica of a group or of one model, a wider mesh."""
    for pool in layout.problem.pools:
        free = layout.free_gpus(pool.index)
        if free:
            yield from _growth(layout.kinds[number].group, number, pool.index, free)


def _growth(group: Group, number: int, pool: int, free: int) -> Iterator[Move]:
    for size in (size for size in (8, 4, 2, 1) if size <= free):
        if len(group.parts) > 1:
            yield Move("replicate", (), (Group(pool, size, group.parts),))
        for part in group.parts:
            yield Move("replicate", (), (Group(pool, size, (part,)),))
    if group.pool == pool and free >= group.size:
        yield Move("widen", (number,), (group.with_size(2 * group.size),))


def drops(layout: Layout, number: int) -> Iterator[Move]:
    """The group without a model that lives elsewhere."""
    group = layout.kinds[number].group
    for part in group.parts:
        if _has_others(layout, part.model, number):
            without = group.with_parts(p for p in group.parts if p is not part)
            yield Move("drop", (number,), _whole(without))


def _narrower(layout: Layout, number: int) -> Iterator[Move]:
    """The group on half of its GPUs, or as two meshes."""
    group = layout.kinds[number].group
    if group.size == 1:
        return
    half = group.with_size(group.size // 2)
    yield Move("split", (number,), (half, half))
    yield Move("narrow", (number,), (half,))
    if len(group.parts) > 1:
        by_load = sorted(group.parts, key=lambda part: -_share(layout, group, part))
        for mine, theirs in (
            (by_load[::2], by_load[1::2]),
            (by_load[:1], by_load[1:]),
        ):
            yield Move("split", (number,), (half.with_parts(mine), half.with_parts(theirs)))


def _merges(layout: Layout, number: int, other: int) -> Iterator[Move]:
    """Two meshes of the same size as one of twice the size, or on one of them."""
    group, host = layout.kinds[number].group, layout.kinds[other].group
    if group.pool != host.pool or group.size != host.size:
        return
    both = _both(group, host)
    yield Move("merge", (number, other), (both.with_size(2 * group.size),))
    yield Move("merge", (number, other), (both,))


def _both(group: Group, host: Group) -> Group:
    names = {part.model: part for part in (*group.parts, *host.parts)}
    return group.with_parts(names.values())


def _share(layout: Layout, group: Group, part: Part) -> float:
    rate_rps = layout.problem.demands[part.model].rate_rps * part.traffic
    return layout.capacity.share((group.pool, group.size), part.model, rate_rps)


def releases(layout: Layout) -> list[Release]:
    """Moves that free GPUs at the least loss that capacities expect, of the least loaded kinds."""
    light = nsmallest(2 * NUM_PARTNERS, layout.kinds, key=lambda n: (layout.loads[n], n))
    found: list[tuple[float, int, Release]] = []
    for index, number in enumerate(light):
        for release in _releases(layout, number, light[index:]):
            proposal = layout.propose(release.move)
            if proposal is not None:
                found.append((-proposal.guess / release.gpus, len(found), release))
    return [release for _, _, release in nsmallest(NUM_RELEASES, found)]


def _releases(layout: Layout, number: int, others: list[int]) -> Iterator[Release]:
    kind = layout.kinds[number]
    group = kind.group
    yield Release(Move("drop", (number,), ()), group.pool, group.size)
    if group.size > 1:
        half = group.with_size(group.size // 2)
        yield Release(Move("narrow", (number,), (half,)), group.pool, half.size)
    for other in others:
        host = layout.kinds[other].group
        if host.pool != group.pool or (other == number and kind.copies == 1):
            continue
        both = _both(group, host).with_size(max(group.size, host.size))
        gpus = min(group.size, host.size)
        yield Release(Move("merge", (number, other), (both,)), group.pool, gpus)


def _trades(layout: Layout, number: int, release: Release) -> Iterator[Move]:
    """What a release frees is taken by this group."""
    first = release.move
    if number in first.gone or any(gone not in layout.kinds for gone in first.gone):
        return
    group = layout.kinds[number].group
    free = release.gpus + layout.free_gpus(release.pool)
    for second in _growth(group, number, release.pool, free):
        yield Move("trade", (*first.gone, *second.gone), (*first.come, *second.come))
