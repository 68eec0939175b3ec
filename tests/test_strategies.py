"""Strategies: what each promises, and that `auto` is never worse than the others."""

from itertools import chain, combinations, combinations_with_replacement
from random import Random

import pytest
from planner_world import demand, problem, search

from muxrt.errors import ConfigError
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, Group, Part, check_draft, num_gpus, packs
from muxrt.planner.explain import second_best
from muxrt.planner.moves import deal
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.search import Search
from muxrt.planner.strategies import STRATEGIES
from muxrt.planner.strategies.auto import auto
from muxrt.planner.strategies.muxserve import muxserve, parallel_candidates
from muxrt.planner.strategies.spatial import spatial
from muxrt.planner.strategies.temporal import temporal
from muxrt.planner.workload import Problem

PRESETS = ("llama-7b", "llama-7b", "llama-13b", "llama-30b")


def small(seed: int, models: int = 3, gpus: int = 4) -> Problem:
    """A random case: sizes, rates from idle to overload, lengths, targets."""
    rng = Random(seed)
    demands = [
        demand(
            f"m{index}",
            rng.choice((0.5, 2.0, 8.0, 25.0)) * rng.uniform(0.7, 1.4),
            rng.choice(PRESETS[: 2 + gpus // 2]),
            prompt=rng.choice((50, 200, 800)),
            output=rng.choice((30, 150, 400)),
            ttft_s=rng.choice((0.5, 2.0)),
            tpot_s=rng.choice((0.04, 0.1)),
        )
        for index in range(models)
    ]
    return problem(demands, gpus)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("seed", range(4))
def test_every_strategy_gives_a_placement_that_fits(name: str, seed: int) -> None:
    world = small(seed)
    try:
        draft = STRATEGIES[name](world, search(world))
    except ConfigError:
        if name == "auto":
            raise  # sharing always finds room in these cases
        return
    check_draft(draft, world)


def test_spatial_gives_every_model_gpus_of_its_own() -> None:
    world = problem([demand("a", 30.0), demand("b", 0.1), demand("c", 0.1, "llama-13b")], gpus=8)
    draft = spatial(world, search(world))
    sizes = {group.parts[0].model: group.size for group in draft}
    assert len(draft) == 3 and sizes["a"] > sizes["b"] == 1  # where wider helps


def test_spatial_says_how_many_gpus_it_needs() -> None:
    world = problem([demand(name) for name in "abc"], gpus=2)
    with pytest.raises(ConfigError, match=r"found 2 GPUs, expected at least 3 .*: strategies mux"):
        spatial(world, search(world))


def test_algorithm_2_takes_the_smallest_share_that_meets_the_rate() -> None:
    world = problem([demand("light", 0.2), demand("heavy", 1e6)], gpus=4)
    light, heavy = (parallel_candidates(world, name) for name in ("light", "heavy"))
    assert {mesh: guest.decode_pct for mesh, guest in light.items()} == dict.fromkeys(
        [(0, 1), (0, 2), (0, 4)], 30
    )
    assert {guest.decode_pct for guest in heavy.values()} == {90}  # none does


def test_muxserve_places_each_model_once_on_all_of_a_mesh() -> None:
    world = problem([demand(name, 2.0) for name in "abcde"], gpus=4)
    draft = muxserve(world, search(world))
    check_draft(draft, world)
    assert sorted(part.model for group in draft for part in group.parts) == list("abcde")
    assert all(part.traffic == 1.0 and part.decode_pct for group in draft for part in group.parts)


def test_temporal_is_muxserve_in_turns() -> None:
    world = problem([demand(name, 2.0) for name in "abcde"], gpus=4)
    lanes = {group.prefill_pct for group in temporal(world, search(world))}
    meshes = [(group.size, group.models) for group in temporal(world, search(world))]
    assert lanes == {None}
    assert meshes == [(group.size, group.models) for group in muxserve(world, search(world))]


def test_auto_replicates_what_one_mesh_cannot_serve() -> None:
    world = problem([demand("hot", 150.0), demand("cold", 0.2)], gpus=4)
    draft = auto(world, search(world))
    judge = QueueingJudge(world)
    check_draft(draft, world)
    assert sum("hot" in group.models for group in draft) > 1 and num_gpus(draft) == 4
    best_other = max(judge(STRATEGIES[n](world, search(world))).goodput_rps for n in ("muxserve",))
    assert judge(draft).goodput_rps > 1.1 * best_other


@pytest.mark.parametrize("seed", range(6))
def test_auto_is_never_worse_and_leaves_no_gpu_idle(seed: int) -> None:
    world = small(seed, models=4)
    judge = QueueingJudge(world)
    draft = auto(world, search(world))
    assert num_gpus(draft) == world.num_gpus
    for name in ("spatial", "muxserve", "temporal"):
        try:
            other = STRATEGIES[name](world, search(world))
        except ConfigError:
            continue
        assert judge(draft).goodput_rps >= (1 - 1e-3) * judge(other).goodput_rps, name


def every_draft(world: Problem, capacity: Capacity) -> list[Draft]:
    """All ways to fill meshes with subsets of the models, traffic dealt as `auto` deals it."""
    names = list(world.demands)
    subsets = list(chain.from_iterable(combinations(names, n) for n in range(1, len(names) + 1)))
    boxes = [(size, models) for size in (1, 2, 4) for models in subsets]
    boxes = [(size, models) for size, models in boxes if world.fits(0, size, models)]
    found = []
    for count in range(1, world.num_gpus + 1):
        for chosen in combinations_with_replacement(boxes, count):
            groups = [Group(0, size, tuple(map(Part, models))) for size, models in chosen]
            placed = {model for _, models in chosen for model in models}
            if len(placed) == len(names) and packs(tuple(groups), world.pools):
                for name in names:
                    groups = deal(capacity, groups, name)
                found.append(tuple(group for group in groups if group.parts))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_auto_is_close_to_the_best_of_all_placements(seed: int) -> None:
    """The issue asks for 2 % on 200 cases of up to 5 models; these are what CI has time for."""
    world = small(seed, models=2, gpus=2)
    judge = QueueingJudge(world)
    capacity = Capacity(world, judge)
    best = max(
        sum(capacity.goodput_rps(capacity.tuned(group)) for group in draft)
        for draft in every_draft(world, capacity)
    )
    assert judge(auto(world, Search(judge, judge))).goodput_rps >= 0.98 * best


def test_an_interrupted_search_gives_the_best_so_far() -> None:
    world = small(1, models=4)
    judge = QueueingJudge(world)
    draft = auto(world, Search(judge, judge, is_over=lambda: True))
    check_draft(draft, world)


def test_progress_is_told() -> None:
    world, told = small(0), []
    judge = QueueingJudge(world)
    auto(world, Search(judge, judge, tell=lambda what, done, total: told.append((what, done))))
    assert any(what.startswith("auto") for what, _ in told)


def test_traffic_is_dealt_by_room() -> None:
    world = problem([demand("a", 4.0), demand("b", 6.0)])
    capacity = Capacity(world, QueueingJudge(world))
    groups = [Group(0, 1, (Part("a"),)), Group(0, 1, (Part("a"), Part("b")))]
    dealt = [group.parts[0].traffic for group in deal(capacity, groups, "a")]
    assert sum(dealt) == pytest.approx(1) and dealt[0] > 0.5 > dealt[1]


def test_a_model_with_one_place_loses_all_elsewhere() -> None:
    world = problem([demand("big", 0.3, "llama-65b", tpot_s=0.5), demand("s", 1.0)], gpus=4)
    draft = (Group(0, 2, (Part("big"),)), Group(0, 1, (Part("s"),)))
    capacity = Capacity(world, QueueingJudge(world))
    found = {place.model: place for place in second_best(world, capacity, draft)}
    assert found["big"].onto is None and found["big"].loss_rps == pytest.approx(0.3)
    assert found["s"].onto == ("big",)


def test_mixed_gpus_are_all_used() -> None:
    world = problem([demand("a", 12.0), demand("b", 6.0)], gpus=2)
    cluster = world.cluster.__class__(
        nodes=(*world.cluster.nodes, type(world.cluster.nodes[0])(gpu="h100-80g", gpus=2))
    )
    mixed = Problem(cluster, list(world.demands.values()), world.cost)
    judge = QueueingJudge(mixed)
    draft = auto(mixed, Search(judge, judge))
    check_draft(draft, mixed)
    assert num_gpus(draft) == 4 and {group.pool for group in draft} == {0, 1}
