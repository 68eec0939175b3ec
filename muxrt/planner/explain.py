"""Why a placement is as it is: loads, memory, headroom, and what other places would cost."""

from dataclasses import dataclass
from heapq import nsmallest
from math import inf

from muxrt.planner.capacity import DOUBLE, HEADROOM, Capacity
from muxrt.planner.draft import Draft, Group, Part
from muxrt.planner.layout import Layout, Move, Proposal
from muxrt.planner.moves import NUM_PARTNERS
from muxrt.planner.queueing import GroupScore
from muxrt.planner.workload import Problem

NUM_PLACES = 64  # the least loaded groups are asked first, and no more than these


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """One unit, per GPU."""

    weights_bytes: dict[str, int]
    other_bytes: int  # activations, runtime, and what is left free on purpose
    kv_bytes: int
    kv_used_bytes: float
    headroom: float  # how many times its traffic it would serve; inf: it gets none
    source: str  # where the step times are from


@dataclass(frozen=True, slots=True)
class SecondBest:
    """Where a model would go if it could not stay, and what that would cost."""

    model: str
    onto: tuple[str, ...] | None  # the models it would join; None: there is no other place
    loss_rps: float  # goodput of the whole placement
    loss_doubled_rps: float  # the same at twice the rates: what tells places apart at low load


def group_facts(
    problem: Problem, capacity: Capacity, group: Group, score: GroupScore
) -> GroupFacts:
    """Memory and headroom of one unit."""
    weights = {m: problem.bytes(m, group.size).weights for m in group.models}
    kv = problem.kv_bytes(group.pool, group.size, group.models)
    other = problem.pools[group.pool].gpu.memory_bytes - kv - sum(weights.values())
    load = capacity.load(group)
    sources = {
        problem.cost.steps(
            problem.demands[m].shape, group.size, problem.pools[group.pool].gpu
        ).source
        for m in group.models
    }
    return GroupFacts(
        weights, other, kv, score.kv_bytes, 1 / load if load else inf, ", ".join(sorted(sources))
    )


def second_best(problem: Problem, capacity: Capacity, draft: Draft) -> list[SecondBest]:
    """For each model, its largest share of traffic moved to the best other unit."""
    layout = Layout(problem, capacity, draft)
    found = []
    for model, hosts in layout.hosts.items():
        home = max(hosts, key=lambda number: layout.kinds[number].group.traffic(model))
        found.append(_second_best(layout, model, home))
    return found


def _second_best(layout: Layout, model: str, home: int) -> SecondBest:
    group = layout.kinds[home].group
    left = group.with_parts(part for part in group.parts if part.model != model)
    places = []
    for other in nsmallest(NUM_PLACES, layout.kinds, key=lambda number: layout.loads[number]):
        host = layout.kinds[other].group
        if other == home or model in host.models:
            continue
        more = host.with_parts((*host.parts, Part(model, 0.5)))
        come = (left, more) if left.parts else (more,)
        proposal = layout.propose(Move("shift", (home, other), come))
        if proposal is not None:
            places.append((proposal, host.models))
    places.sort(key=lambda place: -place[0].guess)
    found = [_priced(layout, model, *place) for place in places[:NUM_PARTNERS]]
    # Nowhere else: all that the model is served here is lost.
    served = layout.capacity.rate_rps(model) * group.traffic(model)
    return min(found, key=_cost, default=SecondBest(model, None, served, DOUBLE * served))


def _priced(layout: Layout, model: str, proposal: Proposal, beside: tuple[str, ...]) -> SecondBest:
    """What the move costs, now and at twice the rates."""
    before = [layout.kinds[number] for number in proposal.gone]
    loss = doubled = 0.0
    for sign, kinds in ((1, before), (-1, proposal.come)):
        for kind in kinds:
            lanes = layout.capacity.lanes(kind.group)
            loss += sign * lanes.goodput_rps * kind.copies
            doubled += sign * lanes.doubled_rps * kind.copies
    return SecondBest(model, beside, max(0.0, loss), max(0.0, doubled))


def _cost(place: SecondBest) -> float:
    return place.loss_rps + HEADROOM * place.loss_doubled_rps
