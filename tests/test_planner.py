"""The planner's parts: packing into nodes, the estimators, placements by GPU number."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import exp
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_world import demand, group, problem, search

from muxrt.config.cluster import KINDS
from muxrt.config.load import dump, load
from muxrt.config.placement import ModelSpec
from muxrt.config.serve import ServeConfig
from muxrt.errors import ConfigError
from muxrt.planner.assign import positions, to_placement
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Group, Part, packs_pool
from muxrt.planner.feasible import check_feasible
from muxrt.planner.meshes import mesh_groups, smallest_mesh
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.throughput import Guest, throughput_rps
from muxrt.planner.workload import Pool, Problem


def fits_by_trying(sizes: list[int], nodes: list[int]) -> bool:
    """Whether some way to put meshes into nodes works: every way is tried."""
    if not sizes:
        return True
    return any(
        fits_by_trying(sizes[1:], [*nodes[:i], room - sizes[0], *nodes[i + 1 :]])
        for i, room in enumerate(nodes)
        if room >= sizes[0]
    )


@given(
    sizes=st.lists(st.sampled_from([1, 2, 4, 8]), max_size=7),
    gpus=st.sampled_from([1, 2, 3, 4, 6, 8]),
    nodes=st.integers(1, 3),
)
@settings(max_examples=300, deadline=None)
def test_meshes_pack_exactly_when_some_way_works(sizes: list[int], gpus: int, nodes: int) -> None:
    pool = Pool(0, KINDS["a100-80g"], gpus, nodes)
    assert packs_pool(Counter(sizes), pool) == fits_by_trying(sizes, [gpus] * nodes)


def test_mesh_groups_are_counts_that_use_every_gpu() -> None:
    world = problem([demand("a")], gpus=8, nodes=4)
    groups = mesh_groups(world, most=2000)
    assert len(groups) == 165  # 715 with nodes told apart
    assert len({tuple(sorted(meshes.items())) for meshes in groups}) == 165
    assert all(sum(size * n for (_, size), n in meshes.items()) == 32 for meshes in groups)
    few = mesh_groups(problem([demand("a")], gpus=8, nodes=512), most=100)
    assert 10 <= len(few) <= 100


def test_a_model_gets_the_smallest_mesh_that_holds_it() -> None:
    names = {"s": "llama-7b", "m": "llama-30b", "l": "llama-65b"}
    world = problem([demand(name, 1.0, preset) for name, preset in names.items()], gpus=8)
    assert [smallest_mesh(world, name)[1] for name in names] == [1, 1, 2]
    small = problem([demand("l", 1.0, "llama-65b")], gpus=2, gpu="a100-40g")
    with pytest.raises(ConfigError, match=r"l fits nowhere: on 2 x a100-40g, its largest mesh, e"):
        smallest_mesh(small, "l")


def test_heads_that_no_mesh_divides() -> None:
    odd = demand("odd")
    odd = replace(odd, shape=replace(odd.shape, num_heads=33, intermediate_size=11007))
    assert smallest_mesh(problem([odd], gpus=8), "odd") == (0, 1)
    assert problem([odd], gpus=8).tps("odd", 0) == (1,)


@dataclass(frozen=True)
class Fixed:
    """Steps of a made-up machine."""

    prefill_token_s: float = 0.0
    decode_fixed_s: float = 0.0
    decode_batch_s: float = 0.0

    source = "made up"

    def at(self, share: float) -> "Fixed":
        return Fixed(self.prefill_token_s, self.decode_fixed_s / share, self.decode_batch_s / share)

    def prefill_s(self, tokens: float, squares: float) -> float:
        return self.prefill_token_s * tokens

    def mean_prefill_s(self, tokens: float, squares: float) -> float:
        return self.prefill_s(tokens, squares)

    def decode_s(self, batch: float, context: float) -> float:
        return self.decode_fixed_s + self.decode_batch_s * batch


class FixedCost:
    """A cost model that gives every model the same steps."""

    def __init__(self, steps: Fixed) -> None:
        self.step_times = steps

    def steps(self, *_: object) -> Fixed:
        return self.step_times


def fixed(world: Problem, steps: Fixed) -> Problem:
    world.cost = FixedCost(steps)  # type: ignore[assignment]
    return world


def test_equation_3_by_hand() -> None:
    """Two models; prefills add up, decodes overlap: b / (sum of prefills + output x own decode)."""
    demands = [demand("a", 1e9, prompt=100, output=50), demand("b", 1e9, prompt=300, output=20)]
    world = fixed(problem(demands), Fixed(1e-4, 0.02, 0.0))
    found = throughput_rps(world, 0, 1, [Guest("a", 50), Guest("b", 100)])
    # A rate that nobody meets: the largest batch that 256, or its share of the KV, allows.
    prefills_s = 256 * 100 * 1e-4 + batch_of_b(world) * 300 * 1e-4
    assert found[0] == pytest.approx(256 / (prefills_s + 50 * 0.04))
    assert found[1] == pytest.approx(batch_of_b(world) / (prefills_s + 20 * 0.02))


def batch_of_b(world: Problem) -> int:
    """b's share of the KV, by rate x bytes per token, holds so many of its 320 tokens."""
    token = world.bytes("b", 1).kv_per_token
    return min(256, int(world.kv_bytes(0, 1, ("a", "b")) / 2 / (token * 320)))


def test_a_rate_that_is_met_is_not_exceeded() -> None:
    world = problem([demand("a", 3.0), demand("b", 2.0)])
    found = throughput_rps(world, 0, 1, [Guest("a", 100), Guest("b", 100)])
    assert found == pytest.approx([3.0, 2.0])


def test_one_request_now_and_then_takes_its_own_time() -> None:
    world = fixed(problem([demand("a", 1e-4, cv=0.0)]), Fixed(1e-4, 0.01, 0.001))
    (found,) = QueueingJudge(world).group(group(1, "a")).parts
    assert found.ttft_s == pytest.approx(0.02 + 0.011 / 2, rel=0.02)  # and half a step of another
    assert found.tpot_s == pytest.approx(0.011, rel=0.02)
    assert found.attainment == pytest.approx(1.0, abs=1e-3)


def test_prefills_wait_as_in_an_m_d_1_queue() -> None:
    """Pollaczek-Khinchine: rho x service / 2 (1 - rho); decodes cost next to nothing here."""
    world = fixed(problem([demand("a", 30.0, cv=0.0, output=2)]), Fixed(1e-4, 1e-6, 0.0))
    found = QueueingJudge(world).group(group(1, "a"))
    assert found.prefill_busy == pytest.approx(0.6)
    wait_s = 0.6 * 0.02 / (2 * 0.4)
    assert found.parts[0].ttft_s == pytest.approx(0.02 + wait_s, rel=1e-3)
    late = 0.6 * exp(-(0.03 - 0.02) * 0.6 / wait_s)
    tight = fixed(
        problem([demand("a", 30.0, cv=0.0, output=2, ttft_s=0.03)]), Fixed(1e-4, 1e-6, 0.0)
    )
    unit = QueueingJudge(tight).group(group(1, "a")).parts[0]
    # Less than all is admitted as soon as that serves more; at the full rate so many are late.
    assert unit.goodput_rps >= 30 * (1 - late) * 0.99


def test_a_token_takes_a_round_of_all_models() -> None:
    """Little's law: n = rate x output x round, round = sum of (fixed + per sequence x n)."""
    demands = [demand(name, 5.0, cv=0.0, prompt=1, tpot_s=1.0) for name in ("a", "b")]
    world = fixed(problem(demands), Fixed(1e-9, 0.01, 0.0005))
    found = QueueingJudge(world).group(group(1, "a", "b"))
    round_s = 0.02 / (1 - 2 * 0.0005 * 5 * 100)
    assert [part.tpot_s for part in found.parts] == pytest.approx([round_s] * 2, rel=0.02)
    assert [part.batch for part in found.parts] == pytest.approx([500 * round_s] * 2, rel=0.02)


def test_what_does_not_fit_in_kv_is_late() -> None:
    roomy = problem([demand("a", 3.0, "llama-30b", tpot_s=5.0, output=500)])
    crowded = QueueingJudge(roomy).group(group(1, "a"))
    assert crowded.goodput_rps < 0.6 * 3.0  # 12 GB of KV, 0.8 GB a sequence
    assert crowded.kv_bytes <= crowded.kv_capacity_bytes
    assert QueueingJudge(roomy).group(group(4, "a")).goodput_rps == pytest.approx(3.0, rel=0.01)


def test_more_traffic_never_costs_goodput() -> None:
    served = []
    for rate in (1, 3, 10, 20, 30, 60, 200):
        world = problem([demand("a", rate), demand("b", 2.0, "llama-13b")])
        score = QueueingJudge(world).group(group(1, "a", "b", pct=30))
        served.append(score.goodput_rps)
        assert all(part.admitted_rps <= part.rate_rps for part in score.parts)
    assert all(more >= 0.93 * less for less, more in pairwise(served)), served


def test_groups_that_differ_in_names_only_score_alike() -> None:
    demands = [demand(name, rate) for name, rate in (("a", 3), ("b", 9), ("c", 3), ("d", 9))]
    judge = QueueingJudge(problem(demands))
    first, second = judge.group(group(1, "a", "b")), judge.group(group(1, "d", "c"))
    assert first.goodput_rps == second.goodput_rps
    assert {part.model: part.rate_rps for part in second.parts} == {"c": 3, "d": 9}


def test_a_scaled_problem_has_other_rates_and_the_same_tables() -> None:
    judge = QueueingJudge(problem([demand("a", 2.0)]))
    doubled = judge.scaled({"a": 2.0})
    assert doubled.problem.demands["a"].rate_rps == 4.0 and doubled.tables is judge.tables
    assert doubled.group(group(1, "a")).parts[0].rate_rps == 4.0


def test_all_lanes_at_once_are_each_of_them_in_turn() -> None:
    world = problem([demand("a", 20.0), demand("b", 4.0, "llama-13b")])
    judge, pcts = QueueingJudge(world), (None, 30, 70)
    found = judge.with_lanes(group(1, "a", "b"), pcts, (1.0, 2.0))
    alone = [group(1, "a", "b", pct=pct) for pct in pcts]
    assert [first for first, _ in found] == [judge.goodput_rps(each) for each in alone]
    # Later multiples are found to less precision.
    doubled = [judge.goodput_rps(each, 2.0) for each in alone]
    assert [second for _, second in found] == pytest.approx(doubled, rel=0.1)
    assert len({rps for row in found for rps in row}) > 4


def test_capacity_is_the_rate_that_keeps_its_targets() -> None:
    world = problem([demand("a", 1.0)])
    capacity = Capacity(world, QueueingJudge(world))
    rps = capacity.rps("a", (0, 1))

    def attainment(rate: float) -> float:
        choices = (group(1, "a", pct=pct) for pct in (None, 30, 50, 70))
        judge = QueueingJudge(world)
        return max(judge.goodput_rps(choice, rate) for choice in choices) / rate

    assert attainment(0.97 * rps) >= 0.9 > attainment(1.05 * rps)
    assert capacity.load(Group(0, 1, (Part("a", rps / 2),))) == pytest.approx(0.5)


def test_a_rate_beyond_the_cluster_names_what_would_do() -> None:
    world = problem([demand("a", 5000.0)])
    with pytest.raises(
        ConfigError, match=r"a: found 5000 requests/s, expected at most \d+\.\d: .* times the GPUs"
    ):
        check_feasible(world, Capacity(world, QueueingJudge(world)))


def test_targets_that_no_mesh_keeps_name_what_would_do() -> None:
    world = problem([demand("a", 1.0, tpot_s=1e-4)])
    with pytest.raises(ConfigError, match=r"tpot_s 0.0001, which no mesh .* expected about ttft_s"):
        check_feasible(world, Capacity(world, QueueingJudge(world)))


def test_a_placement_names_gpus_once_and_loads_again(tmp_path: Path) -> None:
    demands = [demand("a", 4.0), demand("b", 2.0), demand("c", 1.0, "llama-13b")]
    world = problem(demands, gpus=4, nodes=2)
    draft = (
        Group(0, 1, (Part("a", 0.25), Part("b")), 30),
        Group(0, 4, (Part("a", 0.75),)),
        group(2, "c"),
    )
    placement = to_placement(world, draft, QueueingJudge(world)(draft))
    taken = [(u.mesh.node, gpu) for u in placement.units for gpu in u.mesh.gpus or ()]
    assert len(taken) == len(set(taken)) == 7 and set(dict(taken)) == {0, 1}
    shared = placement.units[0]
    assert shared.scheduling.prefill_tokens == world.engine.memory.prefill_tokens  # as estimated
    assert shared.lanes.sm_pct == (30, 70) and [m.traffic for m in shared.models] == [0.25, 1.0]
    assert sum(model.quota or 0 for model in shared.models) <= 1
    assert shared.memory.kv_bytes == world.kv_bytes(0, 1, ("a", "b"))
    expected = shared.models[0].expected
    assert expected is not None and expected.rate_rps == 1.0
    models = tuple(ModelSpec(name=name, preset="llama-7b") for name in "abc")
    config = ServeConfig(models=models, units=placement.units)
    path = tmp_path / "placement.yaml"
    path.write_text(dump(config))
    assert load(path) == config


def test_meshes_stay_in_one_node() -> None:
    world = problem([demand("a")], gpus=4, nodes=2)
    draft = tuple(group(size, "a") for size in (1, 2, 1, 4))
    meshes = positions(world, draft)
    for mesh in meshes:
        assert mesh.gpus is not None and max(mesh.gpus) < 4
    assert sorted(product((0, 1), range(4))) == sorted(
        (mesh.node or 0, gpu) for mesh in meshes for gpu in mesh.gpus or ()
    )


def test_a_search_that_is_over_still_answers() -> None:
    world = problem([demand("a", 4.0)])
    given = search(world)
    assert not given.is_over() and given.judge((group(1, "a"),)).goodput_rps > 3.9
