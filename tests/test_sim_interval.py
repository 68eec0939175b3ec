"""Means over seeds, and how far off they may be."""

from random import Random

import pytest
from sim_world import burst, config, setting, unit

from muxrt.sim.interval import Interval, across_as_json, interval
from muxrt.sim.report import make_report
from muxrt.sim.simulate import simulate, targets


def test_the_quantiles_are_students() -> None:
    # t(0.975) with 2 and 9 degrees of freedom, from the table: 4.3027 and 2.2622.
    assert interval([1.0, 2.0, 3.0]) == Interval(2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4), 3)
    ten = interval(float(number) for number in range(1, 11))
    assert ten == Interval(5.5, pytest.approx(2.2622 * 3.02765 / 10**0.5, rel=1e-4), 10)


def test_unknown_values_and_lonely_ones() -> None:
    assert interval([None, None]) is None
    assert interval([None, 4.0]) == Interval(4.0, None, 1)


def test_of_such_intervals_95_percent_hold_the_truth() -> None:
    rng = Random(3)
    held = 0
    for _ in range(2000):
        found = interval(rng.gauss(10.0, 3.0) for _ in range(5))
        assert found is not None and found.half is not None
        held += abs(found.mean - 10.0) <= found.half
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_every_figure_of_a_report_gets_one() -> None:
    placement = config(unit("a"))
    reports = []
    for num in (1, 2, 3):
        run = simulate(placement, setting("a"), burst("a", num))
        reports.append(make_report(run.served, run.units, targets(placement.models), 10.0))
    data = across_as_json(reports)
    assert data["num_seeds"] == 3
    (row,) = data["rows"]
    assert row["model"] == "a" and data["total"]["model"] == "all"
    assert row["requests"] == {
        "mean": 2.0,
        "half": pytest.approx(4.3027 / 3**0.5, rel=1e-4),
        "num": 3,
    }
    assert row["ttft_s"]["p50"]["mean"] == pytest.approx(
        sum(report.total.ttft_s.p50 or 0 for report in reports) / 3
    )
    assert data["scaled"][3] == [1.0, {"mean": 1.0, "half": 0.0, "num": 3}]
    assert data["units"][0]["num_batches"] == reports[0].units[0].num_batches
