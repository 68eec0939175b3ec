"""What Algorithms 1 and 2 promise, on small clusters."""

from pathlib import Path

import pytest
from planner_world import demand, problem, search

from muxrt.config.cluster import KINDS
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.errors import ConfigError
from muxrt.planner.draft import check_draft
from muxrt.planner.strategies.muxserve import OVERLOAD_PCT, muxserve, parallel_candidates
from muxrt.planner.throughput import Guest, throughput_rps
from muxrt.planner.workload import Problem

PROFILE = Path(__file__).parent.parent / "configs" / "profiles" / "llama_a100.yaml"


def test_degrees_are_those_that_were_profiled() -> None:
    given = problem([demand("a", 0.1, "llama-30b"), demand("b", 0.1, "llama2-70b")])
    assert sorted(tp for _, tp in parallel_candidates(given, "a")) == [1, 2, 4]
    profiled = Problem(given.cluster, list(given.demands.values()), measured())
    assert sorted(tp for _, tp in parallel_candidates(profiled, "a")) == [2, 4]
    assert sorted(tp for _, tp in parallel_candidates(profiled, "b")) == [
        2,
        4,
    ]  # nobody measured it


def measured() -> CostModel:
    return CostModel([load_profile(PROFILE)], KINDS)


def test_degrees_that_miss_the_rate_are_for_want_of_better_ones() -> None:
    given = problem([demand("a", 60.0)], gpus=4)
    most = {tp: throughput_rps(given, 0, tp, [Guest("a", 90)])[0] for tp in (1, 2, 4)}
    assert most[1] < 60 <= most[4]
    assert (0, 1) not in parallel_candidates(given, "a")
    assert parallel_candidates(given, "a", every=True)[0, 1] == Guest("a", 90)
    hopeless = problem([demand("a", 3000.0)], gpus=4)
    assert set(parallel_candidates(hopeless, "a")) == {(0, 1), (0, 2), (0, 4)}


def test_an_overloaded_cluster_has_a_placement() -> None:
    given = problem([demand(name, 60.0) for name in "abcd"], gpus=4)
    assert all((0, 1) not in parallel_candidates(given, name) for name in "abcd")
    draft = muxserve(given, search(given))
    check_draft(draft, given)
    assert sum(len(group.parts) for group in draft) == 4


@pytest.mark.parametrize("rate", [0.1, 5.0, 12.0])
def test_decodes_of_a_mesh_have_no_more_sms_than_there_are(rate: float) -> None:
    given = problem([demand(f"m{i}", rate / (i + 1)) for i in range(8)], gpus=4)
    for group in muxserve(given, search(given)):
        shares = [part.decode_pct or 0 for part in group.parts]
        assert all(share >= 30 for share in shares) and sum(shares) <= 100 + OVERLOAD_PCT


def test_more_models_than_sms_are_refused_with_a_way_out() -> None:
    given = problem(
        [demand(f"m{i}", 0.01, max_tokens=128) for i in range(5)], gpus=1, gpu="h200-141g"
    )
    assert given.fits(0, 1, tuple(given.demands))  # memory is not the reason
    with pytest.raises(ConfigError, match=r"holds 5 models once each with at least 30 % .* auto"):
        muxserve(given, search(given))


def test_of_equal_places_the_least_loaded_is_taken() -> None:
    rates = {"a": 0.04, "b": 0.03, "c": 0.02, "d": 0.01}
    given = problem([demand(name, rate) for name, rate in rates.items()], gpus=4, nodes=2)
    draft = muxserve(given, search(given))
    assert sorted(group.models for group in draft) == [("a", "d"), ("b", "c")]


def test_an_interrupted_search_gives_the_first_that_holds_all() -> None:
    given = problem([demand(name, 2.0) for name in "abc"], gpus=8)
    asked = search(given)
    draft = muxserve(given, type(asked)(asked.estimator, asked.judge, is_over=lambda: True))
    check_draft(draft, given)
    assert [group.size for group in draft] == [8]  # the largest meshes are tried first
