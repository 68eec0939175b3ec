"""Quotas: initial entitlement and how it moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxrt.errors import ConfigError
from muxrt.sched.quota import Demand, Usage, adapt, initial_quotas, split


def test_quotas_follow_rate_times_need() -> None:
    demands = [Demand("a", 10, 3.0), Demand("b", 10, 1.0)]
    assert initial_quotas(demands, 400) == {"a": 300, "b": 100}


def test_no_quota_is_below_one_sequence_of_maximum_length() -> None:
    demands = [Demand("big", 80, 0.01), Demand("hot", 10, 100.0)]
    assert initial_quotas(demands, 100) == {"big": 80, "hot": 20}


def test_a_configured_share_is_kept() -> None:
    demands = [Demand("a", 1, 1.0, share=0.5), Demand("b", 1, 1.0), Demand("c", 1, 3.0)]
    assert initial_quotas(demands, 80) == {"a": 40, "b": 10, "c": 30}


def test_an_arena_below_the_floors_is_refused_with_the_figures() -> None:
    with pytest.raises(ConfigError, match=r"holds 15 blocks.*needs 20 \(a 12, b 8\)"):
        initial_quotas([Demand("a", 12, 1.0), Demand("b", 8, 1.0)], 15)


def usage(quota: int, peak: int, wanted: int = 0, floor: int = 10) -> Usage:
    return Usage(quota, floor, peak, wanted)


def test_blocks_move_from_idle_to_full_and_queueing() -> None:
    quotas = adapt({"full": usage(100, 100, wanted=20), "idle": usage(100, 10)})
    assert quotas == {"full": 120, "idle": 80}


def test_donors_give_in_proportion_to_what_they_spare() -> None:
    quotas = adapt(
        {"full": usage(100, 95, 24), "x": usage(100, 0, floor=40), "y": usage(100, 0, floor=80)}
    )
    assert quotas == {"full": 124, "x": 82, "y": 94}


@pytest.mark.parametrize(
    ("name", "usages"),
    [
        ("nobody is hungry", {"a": usage(100, 50), "b": usage(100, 100)}),
        ("nobody can spare", {"a": usage(100, 100, 50), "b": usage(100, 99)}),
        (
            "a queue without a full quota waits for something else",
            {"a": usage(100, 20, 50), "b": usage(100, 0)},
        ),
    ],
)
def test_quotas_stay_when(name: str, usages: dict[str, Usage]) -> None:
    assert adapt(usages) == {model: u.quota_blocks for model, u in usages.items()}


USAGES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=2),
    st.builds(
        lambda floor, more, peak, wanted: Usage(floor + more, floor, peak, wanted),
        st.integers(1, 50),
        st.integers(0, 500),
        st.integers(0, 700),
        st.integers(0, 200),
    ),
    min_size=1,
)


@given(USAGES)
def test_adaptation_keeps_the_sum_and_the_floors(usages: dict[str, Usage]) -> None:
    quotas = adapt(usages)
    assert sum(quotas.values()) == sum(u.quota_blocks for u in usages.values())
    assert all(quotas[model] >= u.floor_blocks for model, u in usages.items())


DEMANDS = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0.01, 100), st.none() | st.floats(0.01, 0.3)),
    min_size=1,
    max_size=6,
)


@given(DEMANDS, st.integers(0, 1000))
def test_initial_quotas_hand_out_every_block(
    parts: list[tuple[int, float, float | None]], spare: int
) -> None:
    demands = [
        Demand(str(i), floor, weight, share) for i, (floor, weight, share) in enumerate(parts)
    ]
    num_blocks = sum(demand.floor_blocks for demand in demands) + spare
    quotas = initial_quotas(demands, num_blocks)
    assert sum(quotas.values()) == num_blocks
    assert all(quotas[d.model] >= d.floor_blocks for d in demands)


@given(st.integers(0, 1000), st.dictionaries(st.text(max_size=3), st.integers(0, 500), max_size=8))
def test_split_adds_up_and_stays_within_the_weights(amount: int, weights: dict[str, int]) -> None:
    amount = min(amount, sum(weights.values()))
    parts = split(amount, weights)
    assert sum(parts.values()) == amount
    assert all(part <= weights[key] for key, part in parts.items())
