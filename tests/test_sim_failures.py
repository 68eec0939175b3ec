"""Units that die: what becomes of their requests is what the endpoint does with real ones."""

from dataclasses import replace

import pytest
from sim_world import SLO, burst, config, setting, steps, unit

from muxrt.config.placement import Lanes, Memory, ModelSpec, Scheduling, UnitSpec
from muxrt.config.serve import ServeConfig
from muxrt.core import FinishReason
from muxrt.errors import ConfigError
from muxrt.sim.report import make_report
from muxrt.sim.setting import Failure
from muxrt.sim.simulate import Run, simulate, targets
from muxrt.workload.arrivals import Arrival


def run(placement: ServeConfig, asked: list[Arrival], *failures: Failure, fold: bool = True) -> Run:
    names = [spec.name for spec in placement.models]
    return simulate(placement, replace(setting(*names), failures=failures, fold=fold), asked)


def test_what_runs_and_what_waits_is_lost_without_a_replica() -> None:
    asked = [*burst("a", 2, output=400), *burst("a", 1, at_s=0.99, prompt=2000)]
    done = run(config(unit("a")), asked, Failure("u", 1.0))
    assert [(s.finish, s.refused) for s in done.served] == [(FinishReason.ERROR, 503)] * 3
    first, _, last = done.served
    assert first.first_s is not None and first.last_s is not None and first.last_s <= 1.0
    # It keeps the tokens that it got: one per step until the unit died.
    step_s = steps().decode_s(2, 300)
    assert first.output_tokens == pytest.approx((1.0 - first.first_s) / step_s, rel=0.1)
    assert last.first_s is None and not last.is_retried


def test_who_comes_while_it_is_dead_is_turned_away_and_later_it_serves_again() -> None:
    asked = [*burst("a", 1, at_s=1.5), *burst("a", 1, at_s=3.0)]
    done = run(config(unit("a")), asked, Failure("u", 1.0, down_s=2.0))
    dead, served = done.served
    assert (dead.refused, dead.unit) == (503, None)
    assert served.is_answered and served.first_s == pytest.approx(
        3.0 + steps().prefill_s(100, 100**2)
    )
    (use,) = done.units
    assert (use.deaths, use.down_s) == (1, 2.0)


def test_a_lane_was_busy_until_its_unit_died() -> None:
    asked = burst("a", 8, prompt=2047, output=1)  # prefills, one after the other
    assert 8 * steps().prefill_s(2047, 2047**2) > 0.8
    later = Arrival(3.0, "a", 10, 1)
    (use,) = run(config(unit("a")), [*asked, later], Failure("u", 0.7, down_s=1.0)).units
    assert use.over_time.lanes[0] == pytest.approx((0.7, 0.0, 0.0))


def test_a_dead_unit_refuses_nobody() -> None:
    """Whose deadline passes while nobody is there has been told already."""
    patient = ModelSpec(name="a", preset="llama-7b", slo=SLO, queue_timeout_s=1.0)
    asked = [*burst("a", 9, prompt=2047, output=1), *burst("a", 1, at_s=5.0)]
    done = run(config(unit("a"), models=[patient]), asked, Failure("u", 0.5))
    assert [s.refused for s in done.served if not s.is_answered] == [503] * (
        10 - sum(s.is_answered for s in done.served)
    )
    assert done.served[-2].refused == 503


def replicas(**knobs: object) -> ServeConfig:
    return config(unit("a", name="u0", **knobs), unit("a", name="u1", gpus=[1], **knobs))  # type: ignore[arg-type]


def test_what_gave_nothing_starts_over_in_a_replica_once() -> None:
    # Prefills of half a second: at 0.3 s nobody has a token.
    asked = burst("a", 2, prompt=2047, output=5)
    homes = {s.unit for s in run(replicas(), asked).served}
    assert homes == {"u0", "u1"}
    start_s = steps().prefill_s(2047, 2047**2)
    dies_s = start_s / 2
    done = run(replicas(), asked, Failure("u0", dies_s))
    assert all(s.is_answered and s.unit == "u1" for s in done.served)
    assert [s.is_retried for s in done.served] == [True, False]
    # The survivor's request is not disturbed; the other's prefill comes after it.
    assert done.served[1].first_s == pytest.approx(start_s)
    assert done.served[0].first_s == pytest.approx(2 * start_s, rel=0.05)
    twice = run(replicas(), asked, Failure("u0", dies_s, 0.01), Failure("u1", dies_s + 0.02))
    # The one that started over is lost for good, the other may start over for the first time.
    lost, retried = twice.served
    assert (lost.refused, lost.is_retried) == (503, True)
    assert retried.is_answered and retried.is_retried and retried.unit == "u0"


def test_what_gave_a_token_does_not_start_over() -> None:
    asked = burst("a", 2, output=300)
    done = run(replicas(), asked, Failure("u0", 1.0))
    first, second = done.served
    assert (first.refused, first.is_retried, second.is_answered) == (503, False, True)


def test_the_router_leaves_a_dead_unit_out() -> None:
    asked = [a for n in range(20) for a in burst("a", 1, at_s=1.0 + n / 10)]
    done = run(replicas(), asked, Failure("u0", 0.5, down_s=1.5))
    homes = [s.unit for s in done.served]
    assert set(homes[:9]) == {"u1"} and "u0" in homes[11:]
    assert all(s.is_answered for s in done.served)


def test_figures_tell_lost_and_retried_apart_from_refused() -> None:
    asked = [*burst("a", 2, prompt=2047), *burst("a", 2, at_s=3.0, output=400)]
    placement = replicas()
    done = run(placement, asked, Failure("u0", 0.01, 1.0), Failure("u1", 4.0))
    report = make_report(done.served, done.units, targets(placement.models), 5.0)
    assert (report.total.failed, report.total.retried, report.total.refused) == (1, 1, 0)
    assert report.total.answered == 3
    assert [unit.deaths for unit in report.units] == [1, 1]
    assert report.units[1].down_s == pytest.approx(report.wall_s - 4.0)


@pytest.mark.parametrize("dies_s", [0.7, 1.3, 2.9, 4.0])
def test_folding_changes_nothing(dies_s: float) -> None:
    asked = [a for n in range(12) for a in burst("a", 1, at_s=n / 4, output=60 + 9 * n)]
    placement = replicas(lanes=Lanes(kind="green", sm_pct=(40, 60)))
    failures = Failure("u1", dies_s, 0.5), Failure("u0", dies_s + 0.2, 1.0)
    folded, unfolded = (run(placement, asked, *failures, fold=fold) for fold in (True, False))
    assert folded == unfolded
    assert any(s.refused == 503 for s in folded.served)


def test_copies_on_their_way_are_lost_with_their_unit() -> None:
    spec = UnitSpec(
        name="u",
        models=unit("a").models,
        memory=Memory(kv_bytes=2500 * (1 << 20), swap_bytes=4 << 30),
        mesh=unit("a").mesh,
        lanes=unit("a").lanes,
        scheduling=Scheduling(prefill_tokens=2048, preempt="swap", prefix_reuse=False),
    )
    model = ModelSpec(name="a", preset="llama-7b", slo=SLO, max_model_len=2048)
    placement = config(spec, models=[model])
    asked = burst("a", 6, prompt=900, output=600)
    whole = run(placement, asked)
    assert whole.units[0].models[0].preemptions_swap > 0
    for dies_s in (2.0, 5.0, 8.0, 11.0):
        done = run(placement, [*asked, *burst("a", 1, at_s=30.0)], Failure("u", dies_s, 1.0))
        assert done.served[-1].is_answered
        assert done.units[0].models[0].preemptions_swap <= whole.units[0].models[0].preemptions_swap
    ends_s = max(s.last_s or 0.0 for s in whole.served)
    again = [replace(one, at_s=ends_s + 2.0) for one in asked]
    both = run(placement, [*asked, *again], Failure("u", ends_s + 0.5, 1.0)).units[0].models[0]
    assert both.preemptions_swap == 2 * whole.units[0].models[0].preemptions_swap


def test_a_unit_dies_only_while_it_lives() -> None:
    with pytest.raises(ConfigError, match="u: found a failure at 3 s, expected one after it is ba"):
        run(config(unit("a")), burst("a", 1), Failure("u", 2.0), Failure("u", 3.0))
    with pytest.raises(ConfigError, match="found a failure of 'v', expected one of: u"):
        run(config(unit("a")), burst("a", 1), Failure("v", 2.0))
