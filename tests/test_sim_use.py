"""How full and how busy units were, over time."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_world import GB, burst, config, setting, steps, unit

from muxrt.sim.simulate import simulate
from muxrt.sim.use import MOST_INTERVALS, Gauge
from muxrt.workload.arrivals import Arrival


def test_samples_as_they_come() -> None:
    gauge = Gauge(("a", "b"), num_lanes=2)
    gauge.add([0.25, 0.5], [1.0, 0.0])
    gauge.add([0.5, 0.5], [1.5, 0.25])
    found = gauge.over_time()
    assert found.interval_s == 1.0
    assert found.kv == {"a": (0.25, 0.5), "b": (0.5, 0.5)}
    assert found.lanes == ((1.0, 0.5), (0.0, 0.25))
    assert gauge.peak == 1.0 and gauge.total == 1.75


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5 * MOST_INTERVALS))
def test_a_long_run_takes_no_more_room_and_keeps_its_means(shares: list[float]) -> None:
    gauge = Gauge(("a",), num_lanes=1)
    busy_s = 0.0
    for share in shares:
        busy_s += share
        gauge.add([share], [busy_s])
    found = gauge.over_time()
    assert len(found.kv["a"]) == len(found.lanes[0]) <= 2 * MOST_INTERVALS
    each = int(found.interval_s)
    for index, mean in enumerate(found.kv["a"]):
        part = shares[index * each : (index + 1) * each]
        assert mean == pytest.approx(sum(part) / len(part))
        assert found.lanes[0][index] == pytest.approx(sum(part) / len(part))
    assert (len(found.kv["a"]) - 1) * each < len(shares) <= len(found.kv["a"]) * each


def test_blocks_and_lanes_of_a_run() -> None:
    asked = [*burst("a", 1, prompt=1000, output=600), Arrival(4.5, "b", 100, 400)]
    spec = unit("a", "b", kv_bytes=20 * GB)
    (use,) = simulate(config(spec), setting("a", "b"), asked).units
    kv, (lane,) = use.over_time.kv, use.over_time.lanes
    # 1,000 and more tokens of 0.5 MiB each; the second model has none before its request.
    assert kv["a"][0] == pytest.approx(1060 * 524288 / 20e9, rel=0.05)
    assert not any(kv["b"][:4]) and kv["b"][5] > 0
    assert all(after >= before for before, after in pairwise(kv["a"][:6]))
    assert max(map(sum, zip(*kv.values(), strict=True))) == use.kv_peak
    # One lane works all the time while there is a request, a second at the end excepted.
    assert lane[0] == pytest.approx(1.0) and lane[5] == pytest.approx(1.0)


def test_a_long_batch_is_busy_while_it_runs() -> None:
    spec = unit("a", gpus=[0])
    asked = burst("a", 40, prompt=2000, output=1)
    (use,) = simulate(config(spec), setting("a"), asked).units
    assert steps().prefill_s(2000, 2000**2) > 0.1
    assert all(share == pytest.approx(1.0) for share in use.over_time.lanes[0])
