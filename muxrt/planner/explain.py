"""Why a placement is as it is: loads, memory, headroom, and what other places would cost."""

from dataclasses import dataclass
from math import inf

from muxrt.planner.capacity import HEADROOM, Capacity
from muxrt.planner.draft import Draft, Group, Part
from muxrt.planner.moves import NUM_PARTNERS, Layout, Move
from muxrt.planner.queueing import GroupScore
from muxrt.planner.workload import Problem


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
    found = []
    for model in problem.demands:
        layout = Layout(problem, capacity, draft)
        hosts = {
            index: part.traffic
            for index, group in layout.groups.items()
            for part in group.parts
            if part.model == model
        }
        home = max(hosts, key=lambda index: hosts[index])
        found.append(_second_best(layout, model, home, capacity))
    return found


def _second_best(layout: Layout, model: str, home: int, capacity: Capacity) -> SecondBest:
    group = layout.groups[home]
    left = group.with_parts(part for part in group.parts if part.model != model)
    places = []
    for other, host in layout.groups.items():
        if other == home or model in host.models:
            continue
        more = host.with_parts((*host.parts, Part(model, 0.5)))
        proposal = layout.propose(
            Move("shift", (home, other), (*([left] if left.parts else []), more))
        )
        if proposal is not None:
            places.append((proposal, host.models))
    places.sort(key=lambda place: -place[0].guess)
    best: SecondBest | None = None
    for proposal, models in places[:NUM_PARTNERS]:
        tuned = [capacity.tuned(come) for come in proposal.come]
        before = sum(layout.goodput_rps(index) for index in proposal.gone)
        loss = before - sum(capacity.goodput_rps(come) for come in tuned)
        doubled = sum(capacity.doubled_rps(layout.groups[index]) for index in proposal.gone)
        doubled -= sum(capacity.doubled_rps(come) for come in tuned)
        place = SecondBest(model, models, max(0.0, loss), max(0.0, doubled))
        if best is None or _cost(place) < _cost(best):
            best = place
    # Nowhere else: all that the model is served here is lost.
    own = {part.model: part for part in group.parts}[model].traffic
    served = layout.problem.demands[model].rate_rps * own
    return best or SecondBest(model, None, served, 2 * served)


def _cost(place: SecondBest) -> float:
    return place.loss_rps + HEADROOM * place.loss_doubled_rps
