"""DistServe's placement algorithms (OSDI 2024, section 4) for one model on one kind of GPU.

`high_affinity` is Algorithm 1: KV may cross nodes, so prefill and decode instances are chosen
apart, each for the most goodput per GPU, and n of one feed m of the other. `low_affinity` is
Algorithm 2: KV stays inside a node, so both are cut into the same pipeline stages and the
segments of a stage lie on one node.

Beyond the paper, unless `Rules` say otherwise by `joint`: n and m are looked for together, by a
simulation of both phases with both targets; a node may hold several segments of either kind.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from heapq import nlargest, nsmallest
from math import ceil

from muxrt.planner.phases import Instance, Judge

Catalog = Callable[[int, int], Instance | None]  # by tp and pp; None: there is none

MOST_COPIES = 8  # instances of one phase that are tried beside one of the other
NUM_PHASE, NUM_RATIOS = 3, 12  # the best of a phase, and of their ratios, that are simulated
NUM_CELLS = 40  # likewise of what one node, or so many stages, may hold
NUM_FEWEST = 4  # likewise of pairs at a given rate
STEPS = 10  # instances are added by a tenth of those that there are
FAR = 1.5  # times the GPUs that there are: pooling never saves as much
# Instances in a pool and two phases that share a budget of misses do better than the bound from
# each of them alone: by less than this.
SLACK = 1.3


@dataclass(frozen=True, slots=True)
class Space:
    """What instances may look like."""

    tps: tuple[int, ...]
    num_layers: int
    gpus_per_node: int
    num_nodes: int

    def stages(self, most: int) -> tuple[int, ...]:
        """Numbers of stages with equally many layers each."""
        return tuple(pp for pp in range(1, most + 1) if self.num_layers % pp == 0)


@dataclass(frozen=True, slots=True)
class Rated:
    """An instance and what one of it sustains in its phase."""

    instance: Instance
    rps: float

    @property
    def per_gpu(self) -> float:
        return self.rps / self.instance.gpus


@dataclass(frozen=True, slots=True)
class Split:
    """Prefill and decode instances that share one model's traffic."""

    prefill: Instance
    num_prefill: int
    decode: Instance
    num_decode: int
    goodput_rps: float
    nodes: int | None = None  # low affinity: each of so many holds a stage of all of them

    @property
    def gpus(self) -> int:
        return self.num_prefill * self.prefill.gpus + self.num_decode * self.decode.gpus

    @property
    def per_gpu(self) -> float:
        return self.goodput_rps / self.gpus

    @property
    def name(self) -> str:
        return (
            f"{self.num_prefill} x prefill on {self.prefill.name},"
            f" {self.num_decode} x decode on {self.decode.name}"
        )


def phases(catalog: Catalog, space: Space, judge: Judge) -> "Phases":
    """Algorithm 1's two searches: every tp in a node, every pp over all nodes."""
    most = space.gpus_per_node * space.num_nodes
    found = [
        instance
        for tp in space.tps
        if tp <= space.gpus_per_node
        for pp in space.stages(most // tp)
        if (instance := catalog(tp, pp)) is not None
    ]
    prefills = [Rated(one, judge.prefill_rps(one)) for one in found]
    decodes = [Rated(one, judge.decode_rps(one)) for one in found]
    return Phases(_best(prefills), _best(decodes))


def _best(rated: list[Rated]) -> tuple[Rated, ...]:
    """Those that sustain anything, the most goodput per GPU first; at a tie the fewer GPUs."""
    good = [one for one in rated if one.rps > 0]
    return tuple(sorted(good, key=lambda one: (-one.per_gpu, one.instance.gpus)))


@dataclass(frozen=True, slots=True)
class Phases:
    """Instances by what they sustain per GPU in either phase."""

    prefill: tuple[Rated, ...]
    decode: tuple[Rated, ...]

    @property
    def is_empty(self) -> bool:
        return not self.prefill or not self.decode


def published(found: Phases, rate_rps: float) -> Split:
    """Algorithm 1's answer: ceil(R / goodput) copies of the best of each phase."""
    prefill, decode = found.prefill[0], found.decode[0]
    num_prefill, num_decode = ceil(rate_rps / prefill.rps), ceil(rate_rps / decode.rps)
    rps = min(num_prefill * prefill.rps, num_decode * decode.rps)
    return Split(prefill.instance, num_prefill, decode.instance, num_decode, rps)


def high_affinity(found: Phases, judge: Judge, most_gpus: int) -> Split | None:
    """The ratio of instances with the most goodput per GPU of both phases together."""

    def ratios() -> Iterator[tuple[float, Split]]:
        for prefill in found.prefill[:NUM_PHASE]:
            for decode in found.decode[:NUM_PHASE]:
                yield from _ratios(prefill, decode, most_gpus, None)

    best: Split | None = None
    for _, split in nlargest(NUM_RATIOS, ratios(), key=lambda item: item[0]):
        best = better(best, simulated(split, judge))
    return best


def low_affinity(catalog: Catalog, space: Space, judge: Judge) -> Split | None:
    """Algorithm 2; without `joint` one prefill and one decode instance, as published."""
    best: Split | None = None
    for stages in space.stages(space.num_nodes):
        segments = [
            instance
            for tp in space.tps
            for local in space.stages(space.gpus_per_node // tp)
            if space.num_layers % (stages * local) == 0
            and (instance := catalog(tp, stages * local)) is not None
        ]
        prefills = [Rated(one, judge.prefill_rps(one)) for one in segments]
        decodes = [Rated(one, judge.decode_rps(one)) for one in segments]
        budget = space.gpus_per_node * stages
        bounds = [
            item
            for prefill in prefills
            for decode in decodes
            for item in _ratios(prefill, decode, budget, stages)
            if judge.rules.joint or (item[1].num_prefill, item[1].num_decode) == (1, 1)
        ]
        for bound, split in nlargest(NUM_CELLS, bounds, key=lambda item: item[0]):
            if best is not None and SLACK * bound < best.per_gpu:
                break
            best = better(best, simulated(split, judge))
    return best


def _ratios(
    prefill: Rated, decode: Rated, most_gpus: int, nodes: int | None
) -> Iterator[tuple[float, Split]]:
    """What phases alone allow per GPU, for every n and m within `most_gpus`."""
    if not prefill.rps or not decode.rps:
        return
    for n in range(1, MOST_COPIES + 1):
        for m in range(1, MOST_COPIES + 1):
            rps = min(n * prefill.rps, m * decode.rps)
            split = Split(prefill.instance, n, decode.instance, m, rps, nodes)
            if split.gpus <= most_gpus:
                yield split.per_gpu, split


def simulated(split: Split, judge: Judge) -> Split:
    """The same instances with the goodput that both phases have together."""
    rps = judge.split_rps(split.prefill, split.num_prefill, split.decode, split.num_decode)
    return replace(split, goodput_rps=rps)


def better(one: Split | None, other: Split | None) -> Split | None:
    """That with more goodput per GPU; the first at a tie."""
    if one is None or other is None:
        return one or other
    return other if other.per_gpu > one.per_gpu else one


def for_rate(split: Split, judge: Judge, rate_rps: float) -> Split | None:
    """As few of its instances as keep the goal at that rate; None where it takes far too many.

    Starts from Algorithm 1's ceil(R / goodput) of each phase, adds where it is missed, and takes
    away what is not needed: in a pool an instance sustains more than alone.
    """

    def keeps(n: int, m: int) -> bool:
        return judge.keeps_split(split.prefill, n, split.decode, m, rate_rps)

    alone = judge.prefill_rps(split.prefill), judge.decode_rps(split.decode)
    if not all(alone):
        return None
    n, m = ceil(rate_rps / alone[0]), ceil(rate_rps / alone[1])
    most = 2 * (n + m) + MOST_COPIES
    while not keeps(n, m):
        # The phase that is short of its own needs gets more; where neither is, both do.
        short = not judge.keeps_prefills(split.prefill, n, rate_rps)
        dear = not judge.keeps_decodes(split.decode, m, rate_rps)
        n += (short or not dear) * max(1, n // STEPS)
        m += (dear or not short) * max(1, m // STEPS)
        if n + m > most:
            return None
    if split.decode.gpus > split.prefill.gpus:
        m = _least(lambda count: keeps(n, count), m)
        n = _least(lambda count: keeps(count, m), n)
    else:
        n = _least(lambda count: keeps(count, m), n)
        m = _least(lambda count: keeps(n, count), m)
    return replace(split, num_prefill=n, num_decode=m, goodput_rps=rate_rps)


def _least(keeps: Callable[[int], bool], enough: int) -> int:
    """The smallest count that keeps the goal; `enough` does, and more are never worse."""
    low = 0
    while enough - low > 1:
        middle = (low + enough) // 2
        low, enough = (low, middle) if keeps(middle) else (middle, enough)
    return enough


def fewest(found: Phases, judge: Judge, rate_rps: float, most_gpus: int) -> Split | None:
    """The instances that keep the goal at that rate on the fewest GPUs, in any numbers.

    The most goodput per GPU wastes most of a wide instance at a low rate, so pairs are ranked by
    what ceil(R / goodput) of each takes, and the best of them simulated. Where that is far more
    than `most_gpus`, nothing is: the answer is what it takes.
    """
    if found.is_empty:
        return None
    pairs = [
        Split(prefill.instance, n, decode.instance, m, rate_rps)
        for prefill in found.prefill
        for decode in found.decode
        for n, m in [(ceil(rate_rps / prefill.rps), ceil(rate_rps / decode.rps))]
    ]
    tried = nsmallest(NUM_FEWEST, pairs, key=lambda split: split.gpus)
    if tried[0].gpus > FAR * most_gpus:
        return tried[0]
    near = [split for split in tried if split.gpus <= FAR * most_gpus]
    able = [split for one in near if (split := for_rate(one, judge, rate_rps)) is not None]
    return min(able, key=lambda split: split.gpus, default=None)
