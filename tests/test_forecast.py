"""The forecast: exact where days repeat, never negative, in proportion to the traffic."""

import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxrt.planner.forecast import (
    Forecast,
    History,
    NoHistory,
    SeenLengths,
    at_quantile,
    expected,
    forecast,
    sample_lengths,
)

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import backtest_forecast

PER_DAY = 4
Floats = npt.NDArray[np.float64]

counts = st.lists(st.integers(0, 500), min_size=1, max_size=30).map(lambda c: np.array(c, float))
quantiles = st.sampled_from([0.05, 0.5, 0.9, 0.99])


def of(*many: float) -> Forecast:
    return forecast(History({"a": np.array(many, float)}, 10.0, PER_DAY), 6)


@given(
    day=st.lists(st.integers(0, 500), min_size=PER_DAY, max_size=PER_DAY),
    num_days=st.integers(2, 6),
    rest=st.integers(0, PER_DAY - 1),
    quantile=quantiles,
)
def test_what_repeats_is_forecast_exactly(
    day: list[int], num_days: int, rest: int, quantile: float
) -> None:
    """Whenever in the day it is made."""
    past = np.array(day * num_days, float)[: num_days * PER_DAY - rest or None]
    future = np.array(day * 4, float)[(PER_DAY - rest) % PER_DAY :][:6]
    if len(past) // PER_DAY >= 2:
        np.testing.assert_allclose(at_quantile(past, 6, PER_DAY, quantile), future, atol=1e-6)
    else:
        np.testing.assert_allclose(expected(past, 6, PER_DAY), future, atol=1e-6)


@given(counts, quantiles)
def test_a_rate_is_never_negative(found: Floats, quantile: float) -> None:
    told = at_quantile(found, 9, PER_DAY, quantile)
    assert told.shape == (9,) and np.isfinite(told).all() and (told >= 0).all()


@given(st.lists(st.integers(0, 500), min_size=2 * PER_DAY, max_size=30), quantiles)
def test_twice_the_traffic_is_twice_the_forecast(found: list[int], quantile: float) -> None:
    once = np.array(found, float)
    np.testing.assert_allclose(
        at_quantile(3 * once, 6, PER_DAY, quantile),
        3 * at_quantile(once, 6, PER_DAY, quantile),
        atol=1e-6,
    )


@given(counts)
def test_a_higher_quantile_is_no_less(found: Floats) -> None:
    told = [at_quantile(found, 6, PER_DAY, quantile) for quantile in (0.05, 0.5, 0.9, 0.99)]
    assert all((more >= less - 1e-9).all() for less, more in pairwise(told))


def test_nine_in_ten_bins_hold_no_more_than_the_ninth_decile() -> None:
    rng = np.random.default_rng(0)
    found = rng.poisson(np.tile(40 * np.array([0.3, 1.0, 1.7, 1.0]), 200)).astype(float)
    ends = range(20 * PER_DAY, len(found), PER_DAY)
    held = [found[e : e + PER_DAY] <= at_quantile(found[:e], PER_DAY, PER_DAY, 0.9) for e in ends]
    assert 0.86 < np.mean(held) < 0.94


def test_the_level_is_that_of_the_newest_days() -> None:
    told = of(*[10, 20, 30, 20] * 5, *[20, 40, 60, 40]).rates_rps["a"]
    assert told[0] == pytest.approx(2.0, rel=0.05) and told[2] == pytest.approx(3 * told[0])


def test_the_newest_hours_of_a_day_move_the_level() -> None:
    steady, moved = (expected(np.array([10, 20, 30, 20] * 5 + [10, 20, *last], float), 4, PER_DAY)
                     for last in ([30, 20], [60, 40]))  # fmt: skip
    assert (moved > 1.6 * steady).all() and (moved < 2.1 * steady).all()


def test_less_than_a_day_is_a_recent_mean() -> None:
    told = of(0, 6, 8)
    assert told.num_days == 0 and told.rates_rps["a"].tolist() == pytest.approx([0.8] * 6, rel=0.2)
    np.testing.assert_allclose(expected(np.array([0.0, 6.0, 8.0]), 2, PER_DAY), 8.0)


def test_nothing_is_refused() -> None:
    for history in (History({}, 10.0, PER_DAY), History({"a": np.zeros(9)}, 10.0, PER_DAY)):
        with pytest.raises(NoHistory, match="nothing to forecast from"):
            forecast(history, 6)


def test_a_silent_model_among_others_stays_silent() -> None:
    both = {"a": np.full(12, 9.0), "b": np.zeros(12)}
    told = forecast(History(both, 3.0, PER_DAY), 4, 0.9)
    assert told.rates_rps["a"].tolist() == pytest.approx([3.0] * 4)
    assert told.rates_rps["b"].tolist() == [0.0] * 4


def test_newer_lengths_are_more_likely() -> None:
    old = [SeenLengths(4 * 86400.0, 1, 1)] * 1000
    new = [SeenLengths(0.0, 2, 2)] * 1000
    found = sample_lengths(old + new, 200, Random(0))
    assert len(found) == 200 and found[0].prompt_tokens == 2
    assert 0 < sum(one.prompt_tokens == 1 for one in found) < 40  # a sixteenth of the weight
    assert len(sample_lengths(old, 2000, Random(0))) == 1000


def test_it_beats_yesterdays_mean_where_days_have_hours_and_popularity_drifts() -> None:
    counts = backtest_forecast.synthetic(5, 0.2, 7, drift=True, hours=True)
    losses = backtest_forecast.backtest(counts, 24, 2)
    ours, theirs = losses["forecast"], losses["yesterday's mean"]
    assert ours["mean"] < 0.85 * theirs["mean"] and ours["0.5"] < 0.85 * theirs["0.5"]
