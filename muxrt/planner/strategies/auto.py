"""Our own: replicas, unequal tp, shared meshes and lanes, for the most goodput under SLO.

It starts from the best of a packing by capacities and the other strategies, and improves by local
search: groups that lose the most try moves first; the first that gains is made, until none does or
the time is up. What counts is goodput as the queueing estimator sees it, plus a little of the
goodput at twice the rates, so that idle GPUs become headroom. The judge decides between the final
candidates, on the rates as given and on rates that are wrong by a factor of two.
"""

from collections.abc import Callable, Iterable
from heapq import nlargest
from math import inf
from random import Random

from muxrt.errors import ConfigError
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, num_gpus
from muxrt.planner.layout import Layout, Proposal
from muxrt.planner.moves import drops, growth, moves, releases, tilts
from muxrt.planner.pack import pack
from muxrt.planner.search import Search, Strategy
from muxrt.planner.strategies.muxserve import muxserve
from muxrt.planner.strategies.spatial import spatial
from muxrt.planner.workload import Problem

LEAST_GAIN = 0.02  # of the value of one GPU, on average; below it two placements are the same
LARGEST_LOSS = 1e-3  # relative; what headroom on an idle GPU may cost
CLOSE = 1e-5  # candidates within this share of the best are told apart by robustness
NUM_WRONG, WRONG = 4, 2.0  # scenarios of wrong rates, and by how much
OTHERS_UP_TO = 64  # models; beyond it the other strategies are no start that is worth their time
# Moves of a group that are looked at closely: those that capacities speak for. Small problems have
# time for more of them, for looking at every group again after changes elsewhere, and for shaking
# the best placement and improving it again.
NUM_IMPROVED = 2  # starts: the best ones
NUM_TRIED, MORE_TRIED = 12, 200  # the second one / GPUs
SWEEPS_UP_TO = 200  # kinds of groups
NUM_SHAKEN = 20  # times / GPUs
NUM_SHAKES = 3  # moves at random


def auto(problem: Problem, search: Search) -> Draft:
    """The best placement found. Raises ConfigError where a model fits nowhere."""
    capacity = Capacity(problem, search.estimator)
    starts = _starts(problem, search, capacity)
    layouts = [Layout(problem, capacity, start) for start in starts]
    layouts.sort(key=lambda layout: -layout.value)
    for layout in layouts[:NUM_IMPROVED]:
        improve(layout, search)
    best = max(layouts, key=lambda layout: layout.value)
    rng = Random(0)
    for _ in range(NUM_SHAKEN // problem.num_gpus):
        if search.is_over():
            break
        other = Layout(problem, capacity, best.draft)
        shake(other, rng)
        improve(other, search)
        if other.value > best.value:
            layouts.append(other)
            best = other
    for layout in layouts:
        use_idle(layout, search)
        tidy(layout, search)
    return choose(problem, search, [*(layout.draft for layout in layouts), *starts])


def _starts(problem: Problem, search: Search, capacity: Capacity) -> list[Draft]:
    """A packing, and what the other strategies place. Raises ConfigError where all fail."""
    others: tuple[Strategy, ...] = (spatial, muxserve)
    starts, failed = [], None
    try:
        starts.append(pack(problem, capacity))
    except ConfigError as error:
        failed = error
    for strategy in others if len(problem.demands) <= OTHERS_UP_TO else ():
        if search.is_over() and starts:
            break
        try:
            starts.append(tuple(capacity.tuned(group) for group in strategy(problem, search)))
        except ConfigError as error:
            failed = failed or error
    if not starts:
        assert failed is not None
        raise failed
    return starts


def improve(layout: Layout, search: Search) -> None:
    """Moves that gain, then shares of traffic that gain, until there are none."""
    while not search.is_over():
        gained = _until_stuck(layout, search, _moved)
        gained |= _until_stuck(layout, search, _tilted)
        if not gained or len(layout.kinds) > SWEEPS_UP_TO:
            break


Changes = Callable[[int], Iterable[Proposal | None]]  # of the kind with that number


def _until_stuck(layout: Layout, search: Search, changes_of: Callable[[Layout], Changes]) -> bool:
    """The first change that gains for each group, those that lose most first; whether any did.

    A group that found none is left alone until it changes itself.
    """
    stuck: set[int] = set()
    gained = False
    while left := layout.kinds.keys() - stuck:
        changes = changes_of(layout)
        for number in sorted(left, key=lambda number: (-_loss(layout, number), number)):
            if search.is_over():
                return gained
            search.tell(f"auto: goodput {layout.value:.1f}", len(stuck), len(layout.kinds))
            if number not in layout.kinds:
                continue
            if _gains(search, layout, changes(number)):
                gained = True
            else:
                stuck.add(number)
    return gained


def _moved(layout: Layout) -> Changes:
    free = releases(layout)
    return lambda number: (layout.propose(move) for move in moves(layout, number, free))


def _tilted(layout: Layout) -> Changes:
    return lambda number: tilts(layout, number)


def shake(layout: Layout, rng: Random) -> None:
    """A few moves at random, whatever they cost."""
    for _ in range(NUM_SHAKES):
        number = rng.choice(sorted(layout.kinds))
        found = [layout.propose(move) for move in moves(layout, number, [])]
        proposals = [proposal for proposal in found if proposal is not None]
        if proposals:
            layout.make(rng.choice(proposals), -inf)


def tidy(layout: Layout, search: Search) -> None:
    """Drop replicas from shared groups where they gain next to nothing: simpler is better."""
    loss = LEAST_GAIN * layout.value / layout.problem.num_gpus
    tried: set[int] = set()
    while (left := layout.kinds.keys() - tried) and not search.is_over():
        number = min(left)
        tried.add(number)
        for move in drops(layout, number):
            proposal = layout.propose(move) if move.come else None
            # Traffic that is dealt anew may empty another group: its GPUs would be idle.
            if proposal is not None and proposal.more_gpus == 0 and layout.make(proposal, -loss):
                break


def use_idle(layout: Layout, search: Search) -> None:
    """Replicas or wider meshes on GPUs that are left, even where no estimate asks for them."""
    while layout.has_free_gpus and not search.is_over():
        by_load = sorted(layout.kinds, key=lambda number: (-layout.loads[number], number))
        if not any(_grow(layout, number) for number in by_load):
            return


def _grow(layout: Layout, number: int) -> bool:
    """Give idle GPUs to a group, at next to no loss."""
    found = (layout.propose(move) for move in growth(layout, number))
    # Dealing traffic anew may empty another group: that would go on for ever.
    proposals = [p for p in found if p is not None and p.more_gpus > 0]
    proposals.sort(key=lambda proposal: -proposal.guess)
    loss = LARGEST_LOSS * layout.value
    return any(layout.make(proposal, -loss) for proposal in proposals[:NUM_TRIED])


def _gains(search: Search, layout: Layout, proposals: Iterable[Proposal | None]) -> bool:
    """Make the first of the most promising that gains; whether there was one."""
    least = LEAST_GAIN * layout.value / layout.problem.num_gpus
    tried = NUM_TRIED + MORE_TRIED // layout.problem.num_gpus
    found = (proposal for proposal in proposals if proposal is not None)
    for proposal in nlargest(tried, found, key=lambda proposal: proposal.guess):
        if layout.make(proposal, least):
            return True
        if search.is_over():
            break
    return False


def _loss(layout: Layout, number: int) -> float:
    """What a group is offered and does not serve; then its load."""
    group = layout.kinds[number].group
    lost = layout.capacity.most_value(group) - layout.values[number]
    return lost + 1e-3 * layout.loads[number]


def choose(problem: Problem, search: Search, candidates: list[Draft]) -> Draft:
    """The most goodput; of those that are close the most GPUs, then the most robust one."""
    scored = [(search.judge(draft).goodput_rps, draft) for draft in candidates]
    best = max(score for score, _ in scored)
    close = [draft for score, draft in scored if score >= (1 - CLOSE) * best]
    if len(close) == 1:
        return close[0]
    judges = [search.estimator.scaled(_wrong(problem, seed)) for seed in range(NUM_WRONG)]
    return max(
        close,
        key=lambda draft: (num_gpus(draft), sum(judge(draft).goodput_rps for judge in judges)),
    )


def _wrong(problem: Problem, seed: int) -> dict[str, float]:
    """Factors of rates that are twice or half of what was said."""
    rng = Random(seed)
    return {model: rng.choice((1 / WRONG, WRONG)) for model in sorted(problem.demands)}
