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

PER_DAY, WEEK = 4, 7
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


def weekly(num_days: int, first_day: int = 0) -> npt.NDArray[np.bool_]:
    """Bins of weekends in so many days, of which the first has this number in its week."""
    days = (first_day + np.arange(num_days)) % WEEK >= 5
    return np.repeat(days, PER_DAY)


def dipped(num_days: int, part: float) -> Floats:
    """Days of one shape, with weekends that have `part` of it."""
    usual = np.tile(np.array([40.0, 80.0, 120.0, 80.0]), num_days)
    return np.where(weekly(num_days), part * usual, usual)


@pytest.mark.parametrize("part", [0.1, 0.4, 1.0, 2.5])
@pytest.mark.parametrize("num_bins", [0, 3, 8, 15, 27])
def test_weekends_that_repeat_are_forecast_exactly(part: float, num_bins: int) -> None:
    """Whenever in the week it is made, on whole days or not."""
    whole = dipped(6 * WEEK, part)
    end = 3 * WEEK * PER_DAY + num_bins
    told = at_quantile(whole[:end], 9 * PER_DAY, PER_DAY, 0.5, weekly(6 * WEEK))
    np.testing.assert_allclose(told, whole[end : end + 9 * PER_DAY], rtol=1e-6)


def test_less_than_two_weeks_have_no_weekends() -> None:
    counts = dipped(13, 0.2)
    told = at_quantile(counts, PER_DAY, PER_DAY, 0.5, weekly(14))
    np.testing.assert_allclose(told, at_quantile(counts, PER_DAY, PER_DAY, 0.5))


def test_a_silent_weekend_does_not_silence_the_monday() -> None:
    counts = dipped(3 * WEEK, 0.0)
    monday = at_quantile(counts, PER_DAY, PER_DAY, 0.5, weekly(4 * WEEK))
    np.testing.assert_allclose(monday, counts[:PER_DAY], rtol=0.05)


def test_a_weekend_of_its_own_hours_keeps_them() -> None:
    counts = dipped(5 * WEEK, 1.0)
    counts[weekly(5 * WEEK)] = np.tile([60.0, 60.0, 30.0, 90.0], 10)
    saturday = (3 * WEEK + 5) * PER_DAY
    told = at_quantile(counts[:saturday], PER_DAY, PER_DAY, 0.5, weekly(5 * WEEK))
    np.testing.assert_allclose(told, [60.0, 60.0, 30.0, 90.0], rtol=0.02)


def test_weekends_are_told_apart_for_models_that_have_them() -> None:
    rng = np.random.default_rng(1)
    office, home = rng.poisson(dipped(4 * WEEK, 0.3)), rng.poisson(dipped(4 * WEEK, 1.0))
    counts = {"office": office.astype(float), "home": home.astype(float)}
    told = forecast(History(counts, 10.0, PER_DAY, weekly(5 * WEEK)), 6 * PER_DAY)
    assert "office" in told.weekly
    friday, saturday = (told.rates_rps["office"][d * PER_DAY : (d + 1) * PER_DAY] for d in (4, 5))
    assert saturday.sum() == pytest.approx(0.3 * friday.sum(), rel=0.1)
    friday, saturday = (told.rates_rps["home"][d * PER_DAY : (d + 1) * PER_DAY] for d in (4, 5))
    assert saturday.sum() == pytest.approx(friday.sum(), rel=0.1)


def test_weekends_gain_where_there_are_some_and_cost_little_where_there_are_none() -> None:
    for dips, most in ((slice(None), 0.8), (backtest_forecast.NOBODY, 1.02)):
        counts = backtest_forecast.synthetic(28, 0.2, 3, drift=True, hours=True, dips=dips)
        losses = backtest_forecast.backtest(counts, 24, backtest_forecast.FIRST_OF_WEEKS)
        ours, alike = (losses[rule]["mean"] for rule in ("forecast", backtest_forecast.ALIKE))
        assert ours < most * alike
