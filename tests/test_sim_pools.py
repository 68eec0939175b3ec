"""Routing policies in the simulator: what borrowing is worth, and when there is none."""

from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from sim_world import SLO, burst, config, setting
from test_sim_handoff import side

from muxrt.config.placement import UnitModel, UnitSpec
from muxrt.config.routing import Routing
from muxrt.config.serve import ServeConfig
from muxrt.sim.group import groups
from muxrt.sim.report import meets
from muxrt.sim.simulate import Run, simulate
from muxrt.workload.arrivals import Arrival

UNITS = [side("prefill", "p", 0), side("decode", "d", 1), side("decode", "e", 2)]
NEVER = Routing(policy="splitwise", borrow=False)
POOLS = Routing(policy="splitwise")


def served(routing: Routing, asked: list[Arrival], units: list[UnitSpec] = UNITS) -> Run:
    return simulate(with_routing(config(*units), routing), setting("a"), asked)


def with_routing(placed: ServeConfig, routing: Routing) -> ServeConfig:
    return msgspec.structs.replace(placed, routing=routing)


def attained(run: Run) -> float:
    return sum(meets(one, SLO) for one in run.served) / len(run.served)


def trickle(seconds: int, prompt: int = 400) -> list[Arrival]:
    """Two requests a second."""
    return [a for at in range(2 * seconds) for a in burst("a", 1, at_s=at / 2, prompt=prompt)]


def bursts() -> list[Arrival]:
    """Every five seconds more prompts than one unit computes in time."""
    asked = trickle(20) + [a for i in range(4) for a in burst("a", 16, at_s=5.1 * i, prompt=1600)]
    return sorted(asked, key=lambda arrival: arrival.at_s)


def test_bursts_of_prompts_are_better_served_by_borrowing() -> None:
    alone, helped = (served(routing, bursts()) for routing in (NEVER, POOLS))
    assert not alone.switches
    assert attained(helped) > attained(alone) + 0.1
    lent = Counter(switch.unit for _, switch in helped.switches if switch.after == "mixed")
    assert set(lent) == {"d", "e"} and all(one.is_answered for one in helped.served)
    # Every unit is at home at the end.
    home = Counter(switch.unit for _, switch in helped.switches if switch.after != "mixed")
    assert home == lent


def test_where_nothing_is_short_nothing_is_borrowed() -> None:
    assert not served(POOLS, trickle(20)).switches


def test_answers_without_memory_are_taken_by_prefill_units() -> None:
    units = [side("prefill", "p", 0), side("prefill", "q", 1)]
    units.append(side("decode", "d", 2, kv_bytes=3 * 10**9))
    asked = burst("a", 14, prompt=400, output=150)
    alone, helped = (served(routing, asked, units) for routing in (NEVER, POOLS))
    lent = {switch.unit for _, switch in helped.switches}
    assert lent and lent <= {"p", "q"}
    ends = [max(one.last_s or 0.0 for one in run.served) for run in (alone, helped)]
    assert ends[1] < ends[0]


def test_units_for_both_phases_are_folded_unless_others_have_roles() -> None:
    # What is handed to m comes at no time that a run of decode steps could know of before.
    full = side("decode", "d", 1, kv_bytes=3 * 10**9)
    mixed = msgspec.structs.replace(side("decode", "m", 2), models=(UnitModel(name="a"),))
    units = [UNITS[0], full, mixed]
    asked = [a for at in range(40) for a in burst("a", 1, at_s=at / 8, prompt=400, output=150)]
    run = served(POOLS, asked, units)
    assert sum(one.unit == "m" and one.handoff is not None for one in run.served) > 5
    placed = with_routing(config(*units), POOLS)
    slow = simulate(placed, replace(setting("a"), fold=False), asked)
    assert slow == run


@pytest.mark.parametrize("policy", ["distserve", "splitwise"])
def test_the_routing_of_a_placement_reaches_the_router(policy: str) -> None:
    routing = msgspec.convert({"policy": policy}, Routing)
    placed = with_routing(config(*UNITS), routing)
    (group,) = groups(placed.units, placed.models, placed.routing)
    assert group.routing == routing
