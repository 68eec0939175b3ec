"""The largest rate that keeps the targets: bisection, and stopping as soon as it is certain."""

from typing import Any

import pytest
from sim_world import SLO, config, setting, unit

from muxrt.config.placement import Lanes
from muxrt.sim.group import GroupResult, Simulation
from muxrt.sim.report import make_report
from muxrt.sim.search import MOST_DOUBLINGS, Tally, attains, find_speed
from muxrt.sim.simulate import simulate
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Lengths, Traffic, Workload, adjusted

LENGTHS = Lengths(mean_tokens=200, cv=1.0, max_tokens=900)
LOAD = Workload(
    duration_s=20,
    models=(Traffic(name="a", rate_rps=8.0), Traffic(name="b", rate_rps=4.0)),
    prompt=LENGTHS,
    output=LENGTHS,
)
PLACED = config(
    unit("a", "b", name="u0", lanes=Lanes(kind="green", sm_pct=(40, 60))),
    unit("a", name="u1"),
)
SLOS = {"a": SLO, "b": SLO}


def asked(speed: float) -> list[Arrival]:
    return arrivals(adjusted(LOAD, duration_s=None, speed=speed, seed=None))


def attainment(speed: float) -> float:
    run = simulate(PLACED, setting("a", "b"), asked(speed))
    return make_report(run.served, run.units, SLOS, LOAD.duration_s).total.attainment or 0.0


@pytest.mark.parametrize("limit", [0.013, 0.5, 0.99, 1.0, 1.7, 37.0])
def test_the_limit_is_found(limit: float) -> None:
    found = find_speed(lambda speed: speed <= limit, precision=0.01)
    assert found.speed <= limit < found.too_fast
    assert found.too_fast <= found.speed * 1.01
    assert found.num_tried < 20


def test_what_never_holds_or_always_does_ends_the_search() -> None:
    assert find_speed(lambda speed: False).speed == 0
    always = find_speed(lambda speed: True)
    assert always.speed >= 2 ** (MOST_DOUBLINGS - 1)
    assert always.num_tried < 100


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0, 4.0])
def test_stopping_early_gives_the_same_answer(speed: float, target: float) -> None:
    found = attains(PLACED, setting("a", "b"), asked(speed), SLOS, target)
    assert found == (attainment(speed) >= target)


def test_a_hopeless_rate_is_not_simulated_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[float] = []
    run = Simulation.run

    def noted(self: Simulation, items: list[tuple[int, Arrival]], *more: Any) -> GroupResult:
        result = run(self, items, *more)
        ends.append(self.loop.now_s)
        return result

    monkeypatch.setattr(Simulation, "run", noted)
    assert not attains(PLACED, setting("a", "b"), asked(8.0), SLOS, 0.99)
    simulate(PLACED, setting("a", "b"), asked(8.0))
    early, whole = ends
    assert early < whole / 2


def test_the_found_rate_keeps_its_target_and_a_larger_one_does_not() -> None:
    found = find_speed(lambda s: attains(PLACED, setting("a", "b"), asked(s), SLOS, 0.9), 0.1)
    assert attainment(found.speed) >= 0.9 > attainment(found.too_fast)


def test_a_tally_is_certain_when_the_rest_cannot_matter() -> None:
    tally = Tally(10, 0.9, SLOS)
    assert (tally.is_enough, tally.is_certain) == (False, False)
    tally.num_missed = 1
    assert not tally.is_certain
    tally.num_missed = 2
    assert (tally.is_enough, tally.is_certain) == (False, True)
    tally.num_missed, tally.num_met = 1, 9
    assert (tally.is_enough, tally.is_certain) == (True, True)
