"""TTFT, TPOT, percentiles, attainment, goodput."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxrt.config.placement import Slo
from muxrt.metrics import Timing, attainment, goodput_rps, is_met, percentile, tpot_s

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
FLOATS = st.floats(-1e6, 1e6)


@given(st.lists(FLOATS, min_size=1), st.floats(0, 100))
def test_a_percentile_is_numpys(values: list[float], pct: float) -> None:
    assert percentile(values, pct) == pytest.approx(np.percentile(values, pct), abs=1e-6)


def test_a_percentile_of_nothing_is_nothing() -> None:
    assert percentile([], 99) is None


@pytest.mark.parametrize("pct", [-1, 101])
def test_a_percentile_has_bounds(pct: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], pct)


@pytest.mark.parametrize(("tokens", "expected"), [(0, None), (1, None), (2, 3.0), (4, 1.0)])
def test_time_per_output_token_counts_from_the_second(tokens: int, expected: float | None) -> None:
    assert tpot_s(1.0, 4.0, tokens) == expected


@pytest.mark.parametrize(
    ("timing", "met"),
    [
        (Timing(1.0, 0.1), True),  # on the dot is in time
        (Timing(1.1, 0.1), False),
        (Timing(1.0, 0.11), False),
        (Timing(0.5, None), True),  # one token: no time between tokens to miss
        (Timing(None, None), False),
    ],
)
def test_both_targets_must_be_met(timing: Timing, met: bool) -> None:
    assert is_met(timing, SLO) is met


def test_attainment_is_a_share_of_all_requests() -> None:
    timings = [Timing(0.5, 0.05), Timing(0.5, 0.5), Timing(2.0, 0.05), Timing(None, None)]
    assert attainment(timings, SLO) == 0.25
    assert attainment([], SLO) is None


def test_goodput_counts_what_met_both() -> None:
    timings = [Timing(0.5, 0.05), Timing(0.5, 0.05), Timing(2.0, 0.05)]
    assert goodput_rps(timings, SLO, wall_s=4.0) == 0.5
    with pytest.raises(ValueError, match="duration"):
        goodput_rps(timings, SLO, wall_s=0.0)
