"""`auto` with both kinds of placement: some models' phases apart, the others colocated."""

import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from planner_world import demand, problem, search

from muxrt.config.cluster import Cluster, NodeGroup
from muxrt.config.placement import Placement
from muxrt.cost.model import CostModel
from muxrt.errors import ConfigError
from muxrt.planner.apart import offer, part_of, within
from muxrt.planner.assign import in_order
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import check_draft
from muxrt.planner.mix import Kept, Mix, apart_units, to_placement
from muxrt.planner.phase_plan import Objective, PhasePlan
from muxrt.planner.phase_plan import to_placement as phases_to_placement
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.rest import Rest, Span, at_most, left_by, rest_of, whole
from muxrt.planner.search import Search
from muxrt.planner.strategies.auto import auto
from muxrt.planner.strategies.distserve import Options, distserve
from muxrt.planner.strategies.mixed import Found, Terms, mixed
from muxrt.planner.strategies.muxserve import muxserve
from muxrt.planner.strategies.spatial import spatial
from muxrt.planner.workload import Demand, Engine, Problem

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from auto_worlds import SMALL, asked_of  # a script, so its folder comes first


def chat(rate_rps: float, name: str = "chat") -> Demand:
    """Long prompts, and tokens that a neighbour's prompt makes late."""
    return demand(
        name, rate_rps, "llama2-13b", prompt=1000, output=150, ttft_s=0.5, tpot_s=0.03,
        max_tokens=4096,
    )  # fmt: skip


@cache
def small(number: int) -> Problem:
    """A workload that a test has time for: code alone, or chat and code; OPT-13B on 8 GPUs."""
    return asked_of(SMALL[number]).problem


def code(factor: float = 1.0) -> Problem:
    """Long prompts and few tokens: 1.5 times the goodput per GPU apart."""
    return small(0).scaled({"code-0": factor})


def both(factor: float = 1.0) -> Problem:
    """Chat is better off colocated, and code apart."""
    return small(1).scaled({"chat-0": factor, "code-1": factor})


def predicting(world: Problem, **more: object) -> Terms:
    """The predictions decide."""
    return replace(Terms(lambda mix: mix.predicted(world)), **more)


def refusing(mix: Mix) -> Kept:
    raise AssertionError("nobody is to be judged")


def check(world: Problem, mix: Mix) -> Placement:
    """Every GPU once and inside its node; every model colocated, or in units of both roles."""
    placement = to_placement(world, mix)
    used: Counter[tuple[int | None, int]] = Counter()
    roles: dict[str, set[str]] = {}
    nodes = [pool.gpus_per_node for pool in world.pools for _ in range(pool.num_nodes)]
    for unit in placement.units:
        assert unit.mesh.node is not None and unit.mesh.gpus
        used.update((unit.mesh.node, gpu) for gpu in unit.mesh.gpus)
        assert max(unit.mesh.gpus) < nodes[unit.mesh.node]
        for part in unit.models:
            roles.setdefault(part.name, set()).add(part.role)
    assert set(used.values()) == {1} and sum(used.values()) == mix.num_gpus
    assert roles.keys() == world.demands.keys()
    split = {"prefill", "decode"}
    assert all(found in ({"mixed"}, split, split | {"mixed"}) for found in roles.values())
    if mix.together:
        check_draft(mix.together, mix.rest.problem)
    return placement


def apart(found: Found) -> set[str]:
    return {plan.model for plan in found.mix.apart.models}


# -- parts of a cluster ------------------------------------------------------------------------


def test_what_is_left_of_a_cluster_is_a_cluster() -> None:
    world = problem([chat(1.0), demand("quiet")], gpus=8, nodes=3)
    spans = (Span(0, 0, 6, 2), Span(0, 1, 3, 5), Span(0, 2, 3, 5))
    rest = rest_of(world, spans, ["quiet"])
    assert [(p.gpus_per_node, p.num_nodes) for p in rest.problem.pools] == [(5, 2), (2, 1)]
    assert set(rest.problem.demands) == {"quiet"} and rest.problem.num_gpus == 12
    judge = QueueingJudge(rest.problem)
    draft = in_order(rest.problem, auto(rest.problem, Search(judge, judge)))
    mix = Mix(PhasePlan(()), rest, draft, judge(draft))
    used = {(u.mesh.node, gpu) for u in to_placement(world, mix).units for gpu in u.mesh.gpus or ()}
    free = {(span.node, span.first + gpu) for span in spans for gpu in range(span.gpus)}
    assert len(used) > 8 and used <= free


def test_the_whole_cluster_is_the_problem_itself() -> None:
    world = both()
    assert rest_of(world, whole(world), world.demands).problem is world
    assert rest_of(world, whole(world), ["quiet"]).problem is not world


def test_kinds_of_gpus_stay_what_they_are() -> None:
    nodes = (NodeGroup(gpu="a100-80g", gpus=4), NodeGroup(gpu="h100-80g", gpus=8))
    world = Problem(Cluster(nodes=nodes), [demand("quiet")], CostModel(), Engine())
    rest = rest_of(world, (Span(0, 0, 2, 2), Span(1, 1, 0, 3)), ["quiet"])
    assert [(pool.gpu.name, pool.gpus_per_node) for pool in rest.problem.pools] == [
        ("a100-80g", 2),
        ("h100-80g", 3),
    ]


def test_gpus_that_units_leave() -> None:
    world = problem([chat(20.0)], gpus=8, nodes=2)
    found = distserve(world)
    units = phases_to_placement(world, found).units
    spans = left_by(world, units)
    assert sum(span.gpus for span in spans) == 16 - found.num_gpus
    taken = {(unit.mesh.node, gpu) for unit in units for gpu in unit.mesh.gpus or ()}
    assert not taken & {(span.node, span.first + n) for span in spans for n in range(span.gpus)}
    assert left_by(world, ()) == whole(world)


def test_at_most_so_many_gpus() -> None:
    spans = (Span(0, 0, 6, 2), Span(0, 1, 0, 8))
    assert at_most(spans, 5) == (Span(0, 0, 6, 2), Span(0, 1, 0, 3))
    assert at_most(spans, 2) == (Span(0, 0, 6, 2),)
    assert at_most(spans, 99) == spans


# -- what phases apart take --------------------------------------------------------------------


def test_more_gpus_serve_more_in_time() -> None:
    world = problem([chat(16.0)], gpus=8, nodes=2)
    capacity = Capacity(world, QueueingJudge(world))
    one = offer(world, capacity, "chat", Options(), lambda: False)
    assert one is not None
    least = next(plan for plan in one.plans if plan.split.nodes is None)
    more = within(world, one.judge, least, {0: 16})
    assert more is not None and least.gpus.total() < more.gpus.total() <= 16
    assert more.seen.attainment > least.seen.attainment >= 0.9
    assert within(world, one.judge, least, {0: 1}) is None


def test_too_few_gpus_serve_a_part() -> None:
    world = problem([chat(60.0)], gpus=8, nodes=8)
    capacity = Capacity(world, QueueingJudge(world))
    one = offer(world, capacity, "chat", Options(), lambda: False)
    assert one is not None
    least = next(plan for plan in one.plans if plan.split.nodes is None)
    half = within(world, one.judge, least, {0: least.gpus.total() // 2})
    assert half is not None and half.gpus.total() <= least.gpus.total() // 2
    assert 0.3 < half.seen.attainment < 0.7  # what exceeds its rate is refused, not all late


def test_a_part_of_the_cluster_keeps_the_goal_for_a_share_of_the_requests() -> None:
    world = problem([chat(60.0)], gpus=8, nodes=8)
    capacity = Capacity(world, QueueingJudge(world))
    one = offer(world, capacity, "chat", Options(), lambda: False)
    assert one is not None
    for plan in (one.plans[0], next(p for p in one.plans if p.split.nodes is not None)):
        shares = []
        for most in (8, 16):
            part = part_of(world, one.judge, plan, {0: most})
            assert part is not None and part.gpus.total() <= most
            assert part.seen.attainment >= 0.9
            more = replace(part.split, num_prefill=part.copies * part.split.num_prefill,
                           num_decode=part.copies * part.split.num_decode)  # fmt: skip
            counts = more.prefill, more.num_prefill, more.decode, more.num_decode
            assert one.judge.see_split(*counts, 1.5 * part.share * 60.0).attainment < 0.9
            shares.append(part.share)
        assert 0.2 < shares[0] / shares[1] < 0.6 and shares[1] < 1
        assert part_of(world, one.judge, plan, {0: 1}) is None
    whole_of_it = part_of(world.scaled({"chat": 0.05}), one.judge, one.plans[0], {0: 16})
    assert whole_of_it is not None and whole_of_it.share == 1.0


def test_a_model_in_both_ways_is_placed_counted_and_weighed() -> None:
    world = problem([chat(30.0), demand("quiet")], gpus=8)
    capacity = Capacity(world, QueueingJudge(world))
    one = offer(world, capacity, "chat", Options(), lambda: False)
    assert one is not None
    part = part_of(world, one.judge, one.plans[0], {0: 6})
    assert part is not None and part.share < 1
    others = world.scaled({"chat": 1 - part.share})
    units = apart_units(world, PhasePlan((part,)))
    assert units is not None
    rest = rest_of(others, left_by(world, units), ("chat", "quiet"))
    judge = QueueingJudge(rest.problem)
    draft = in_order(rest.problem, auto(rest.problem, Search(judge, judge)))
    mix = Mix(PhasePlan((part,)), rest, draft, judge(draft))
    placement = check(world, mix)
    rates = Counter[str]()
    traffic = Counter[str]()
    for unit in placement.units:
        for model in unit.models:
            if model.name == "chat":
                assert model.expected is not None
                rates[model.role] += model.expected.rate_rps
                traffic[model.role] += model.traffic
    assert rates["prefill"] + rates["mixed"] == pytest.approx(30.0, rel=1e-3)
    assert traffic["prefill"] / traffic["mixed"] == pytest.approx(
        part.share / (1 - part.share), rel=1e-3
    )
    kept = mix.predicted(world)
    assert kept.goodput_rps <= 31.0 and kept.least <= 1.0


# -- the search --------------------------------------------------------------------------------


def test_a_model_that_is_too_much_for_either_way_is_tried_in_both() -> None:
    world = both(1.3)
    judged: list[Mix] = []

    def listening(mix: Mix) -> Kept:
        judged.append(mix)
        return mix.predicted(world)

    mixed(world, search(world), Terms(listening))
    in_both = [mix for mix in judged if any(one.share < 1 for one in mix.apart.models)]
    assert in_both
    for mix in in_both:
        check(world, mix)
        (one,) = (one for one in mix.apart.models if one.share < 1)
        assert one.model in {part.model for group in mix.together for part in group.parts}


def test_a_model_that_gains_is_apart_and_the_other_colocated() -> None:
    world = both()
    found = mixed(world, search(world), predicting(world))
    check(world, found.mix)
    assert apart(found) == {"code-1"} and found.mix.together
    judge = QueueingJudge(world)
    before = judge(auto(world, Search(judge, judge))).goodput_rps
    assert found.kept is not None and found.kept.goodput_rps > 1.05 * before
    assert found.reasons["code-1"].startswith("apart: 0.9 x the goodput per GPU (4 GPUs for")
    assert "prefills no longer delay its tokens: TPOT" in found.reasons["code-1"]
    assert found.reasons["chat-0"].startswith("colocated: apart it would have 0.")


def test_nobody_is_judged_where_colocation_serves_everything() -> None:
    world = problem([demand("a", 4.0), demand("b", 1.0)], gpus=8)
    found = mixed(world, search(world), Terms(refusing))
    assert not apart(found) and found.num_judged == 0 and not found.notes
    check(world, found.mix)


def test_without_a_second_gpu_nobody_is_apart() -> None:
    world = problem([demand("a", 25.0), demand("b", 25.0)], gpus=1)
    found = mixed(world, search(world), Terms(refusing))
    assert not apart(found) and found.mix.predicted(world).attainment < 0.99


def test_nobody_is_apart_without_leave() -> None:
    world = both()
    found = mixed(world, search(world), Terms(refusing, may_split=False))
    assert not apart(found)


def test_the_judge_decides() -> None:
    world = both()
    every = mixed(world, search(world), predicting(world))

    def against(mix: Mix) -> Kept:
        kept = mix.predicted(world)
        return replace(kept, goodput_rps=kept.goodput_rps * (0.5 if mix.apart.models else 1))

    assert apart(every) and not apart(mixed(world, search(world), Terms(against)))


def test_the_judge_sees_what_the_other_strategies_would_do() -> None:
    world = both()
    judged: list[Mix] = []

    def listening(mix: Mix) -> Kept:
        judged.append(mix)
        return mix.predicted(world)

    found = mixed(world, search(world), Terms(listening))
    assert found.num_judged == len(judged) == len({mix.key for mix in judged})
    colocated = [mix for mix in judged if not mix.apart.models]
    alone = QueueingJudge(world)
    for strategy in (spatial, muxserve):
        draft = in_order(world, strategy(world, Search(alone, alone)))
        assert draft in [mix.together for mix in colocated]
    assert {"chat-0", "code-1"} in [{one.model for one in mix.apart.models} for mix in judged]


def test_the_simpler_one_stays_at_a_tie() -> None:
    world = both()
    found = mixed(world, search(world), Terms(lambda mix: Kept(1.0, 0.5, 0.5)))
    assert not apart(found) and found.num_judged > 1


def test_when_the_time_is_up_it_says_what_was_not_looked_at() -> None:
    world = both()
    found = mixed(world, replace(search(world), is_over=lambda: True), predicting(world))
    assert not apart(found)
    assert found.notes == ("prefills and decodes apart: the time was up",)


def test_small_models_among_many_are_not_looked_at() -> None:
    """`large` fills more than one GPU and gains apart or not; the others hardly use theirs."""
    others = [demand(f"small-{n}", 6.0) for n in range(7)]
    world = problem([chat(15.0, "large"), *others], gpus=8)
    told: list[str] = []
    found = mixed(
        world,
        replace(search(world), tell=lambda what, done, total: told.append(what)),
        predicting(world),
    )
    assert found.notes == ("the phases of all but the 1 largest models",)
    assert {what for what in told if what.startswith("phases apart")} == {"phases apart: large"}


def test_who_hardly_gains_is_not_tried_alone() -> None:
    world = problem([chat(12.0, f"chat-{n}") for n in range(2)], gpus=8)
    told: list[str] = []
    mixed(
        world,
        replace(search(world), tell=lambda what, done, total: told.append(what)),
        predicting(world),
    )
    tried = {what for what in told if what.startswith("apart: ")}
    assert tried == {"apart: chat-0, chat-1"}


def test_what_colocation_cannot_keep_may_be_kept_apart() -> None:
    world = code(1.2)
    with pytest.raises(ConfigError, match="expected at most"):
        mixed(world, search(world), predicting(world, may_split=False))
    found = mixed(world, search(world), predicting(world))
    check(world, found.mix)
    assert apart(found) == {"code-0"} and found.mix.predicted(world).least >= 0.9


def test_nobody_keeps_what_cannot_be_kept() -> None:
    world = problem([chat(4000.0)], gpus=8, nodes=2)
    with pytest.raises(ConfigError, match="found 4000 requests/s, expected at most"):
        mixed(world, search(world), predicting(world))


# -- the least for the traffic -----------------------------------------------------------------


def test_an_objective_takes_the_least_that_keeps_the_goal() -> None:
    world = problem([demand("a", 20.0), demand("b", 5.0)], gpus=8)
    most = mixed(world, search(world), predicting(world))
    least = mixed(world, search(world), predicting(world, objective=Objective.GPU))
    check(world, least.mix)
    assert most.mix.num_gpus == 8 > least.mix.num_gpus
    assert least.mix.predicted(world).least >= 0.9


def test_an_objective_weighs_both_kinds() -> None:
    world = code(0.9)
    together, either = (
        mixed(world, search(world), predicting(world, objective=Objective.GPU, may_split=split))
        for split in (False, True)
    )
    assert either.mix.num_gpus < together.mix.num_gpus and apart(either) == {"code-0"}
    assert either.mix.predicted(world).least >= 0.9
    check(world, either.mix)


def test_the_objective_decides_between_kinds_of_gpus() -> None:
    nodes = (NodeGroup(gpu="h100-80g", gpus=4), NodeGroup(gpu="l40s-48g", gpus=4))
    world = Problem(Cluster(nodes=nodes), [demand("a", 6.0)], CostModel(), Engine())
    terms = predicting(world, objective=Objective.WATT, may_split=False)
    found = mixed(world, search(world), terms)
    kinds = {unit.mesh.kind for unit in check(world, found.mix).units}
    assert kinds == {"l40s-48g"} and found.mix.price(world, Objective.WATT) < 1000
    with pytest.raises(ConfigError, match="has no price_per_hour"):
        mixed(world, search(world), replace(terms, objective=Objective.DOLLAR))


def test_a_rest_without_models_is_idle() -> None:
    world = both()
    rest = rest_of(world, whole(world), ())
    assert isinstance(rest, Rest) and rest.problem.num_gpus == 8 and not rest.problem.demands
