"""Our own: replicas, unequal tp, shared meshes and lanes, for the most goodput under SLO.

It starts from the best of a packing by capacities and the other strategies, and improves by local
search: groups that lose the most try moves first; the first that gains is made, until none does or
the time is up. What counts is goodput as the queueing estimator sees it, plus a little of the
goodput at twice the rates, so that idle GPUs become headroom. The judge decides between the final
candidates, on the rates as given and on rates that are wrong by a factor of two.
"""

from heapq import nlargest
from random import Random

from muxrt.errors import ConfigError
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, num_gpus
from muxrt.planner.layout import Layout
from muxrt.planner.moves import Release, growth, moves, releases
from muxrt.planner.pack import Packer
from muxrt.planner.search import Search, Strategy
from muxrt.planner.strategies.muxserve import muxserve
from muxrt.planner.strategies.spatial import spatial
from muxrt.planner.workload import Problem

LEAST_GAIN = 2e-4  # relative; below it two placements are the same
NUM_IMPROVED = 2  # starts that are improved
NUM_TRIED = 12  # moves of a group that are looked at closely: those that capacities speak for
LARGEST_LOSS = 1e-3  # relative; what headroom on an idle GPU may cost
CLOSE = 1e-5  # candidates within this share of the best are told apart by robustness
NUM_WRONG, WRONG = 4, 2.0  # scenarios of wrong rates, and by how much
OTHERS_UP_TO = 64  # models; beyond it the other strategies are no start that is worth their time


def auto(problem: Problem, search: Search) -> Draft:
    """The best placement found. Raises ConfigError where a model fits nowhere."""
    capacity = Capacity(problem, search.estimator)
    starts = _starts(problem, search, capacity)
    starts.sort(key=lambda draft: -sum(capacity.lanes(group).value for group in draft))
    candidates = list(starts)
    for start in starts[:NUM_IMPROVED]:
        candidates.append(improve(problem, search, capacity, start))
        if search.is_over():
            break
    return choose(problem, search, candidates)


def _starts(problem: Problem, search: Search, capacity: Capacity) -> list[Draft]:
    others: tuple[Strategy, ...] = (spatial, muxserve)
    starts, failed = [], None
    try:
        starts.append(Packer(problem, capacity).pack())
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


def improve(problem: Problem, search: Search, capacity: Capacity, start: Draft) -> Draft:
    """Moves that gain, until there are none."""
    layout = Layout(problem, capacity, start)
    step, made = 0, True
    while made and not search.is_over():
        made = False
        order = sorted(layout.kinds, key=lambda number: (-_loss(layout, number), number))
        free = releases(layout)
        for number in order:
            if search.is_over():
                break
            step += 1
            search.tell(f"auto: goodput {layout.value:.1f}", step, step + len(order))
            if number in layout.kinds:
                made |= _improve_group(search, layout, number, free)
    use_idle(layout)
    return layout.draft


def use_idle(layout: Layout) -> None:
    """Replicas or wider meshes on GPUs that are left, even where no estimate asks for them."""
    made = True
    while made and layout.has_free_gpus:
        proposals = [
            proposal
            for number in layout.kinds
            for move in growth(layout, number)
            if (proposal := layout.propose(move)) is not None
            # Dealing traffic anew may empty another group: that would go on for ever.
            and proposal.more_gpus > 0
        ]
        proposals.sort(key=lambda proposal: -proposal.guess)
        loss = LARGEST_LOSS * layout.value
        made = any(layout.make(proposal, -loss) for proposal in proposals[:NUM_TRIED])


def _improve_group(
    search: Search, layout: Layout, number: int, free: list[Release]
) -> bool:
    """Make the first move that gains; whether there was one."""
    least = LEAST_GAIN * max(layout.value, 1.0)
    found = (layout.propose(move) for move in moves(layout, number, free))
    proposals = nlargest(
        NUM_TRIED, (p for p in found if p is not None), key=lambda proposal: proposal.guess
    )
    for proposal in proposals:
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
