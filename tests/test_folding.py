"""Runs of decode steps folded or step by step: the same to the last bit, and much quicker."""

from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_world import GB, SLO, burst, config, setting, unit

from muxrt.config.placement import Lanes, ModelSpec, Scheduling, UnitSpec
from muxrt.config.plan import EngineFacts
from muxrt.config.serve import ServeConfig
from muxrt.sim.executor import Job, MeshExecutor
from muxrt.sim.simulate import Run, simulate
from muxrt.workload.arrivals import Arrival

FACTS = EngineFacts(control_s=1e-4, interference=0.15)
LANES = {
    f"{kind} {depth}": Lanes(kind=kind, sm_pct=sm_pct, depth=depth)  # type: ignore[arg-type]
    for (kind, sm_pct), depth in product(
        [("stream", None), ("green", (40, 60)), ("mps", (90, 50, 50))], [1, 2]
    )
}
POLICIES = ["adbs", "fcfs", "round-robin", "slo"]


def traffic(models: str, rate_rps: float, num: int, seed: int) -> list[Arrival]:
    """Requests with gaps long enough for runs, and bursts that cut them short."""
    rng, at_s, found = Random(seed), 0.0, list[Arrival]()
    for _ in range(num):
        at_s += rng.choice([0.0, rng.expovariate(rate_rps), 3 / rate_rps])
        found.append(Arrival(at_s, rng.choice(models), rng.randint(1, 900), rng.randint(1, 400)))
    return found


def both(placement: ServeConfig, asked: list[Arrival]) -> tuple[Run, Run]:
    """Without and with folding."""
    known = setting(*(spec.name for spec in placement.models), facts=FACTS)
    unfolded = simulate(placement, replace(known, fold=False), asked)
    return unfolded, simulate(placement, known, asked)


def units(lanes: Lanes, policy: str, kv_bytes: int, **knobs: object) -> list[UnitSpec]:
    """Two models together, one of them elsewhere too."""
    scheduling = Scheduling(policy=policy, prefill_tokens=512, **knobs)  # type: ignore[arg-type]
    return [
        unit("a", "b", name="u0", lanes=lanes, kv_bytes=kv_bytes, scheduling=scheduling),
        unit("a", name="u1", lanes=lanes, kv_bytes=kv_bytes, scheduling=scheduling),
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lanes", LANES)
def test_folding_changes_nothing(lanes: str, policy: str) -> None:
    placement = config(*units(LANES[lanes], policy, 30 * GB, max_sequences=12))
    unfolded, folded = both(placement, traffic("ab", 2.0, 20, seed=1))
    assert folded == unfolded
    assert all(served.is_answered for served in folded.served)


@pytest.mark.parametrize("borrow", [True, False])
@pytest.mark.parametrize("lanes", LANES)
def test_folding_changes_nothing_where_blocks_are_short(lanes: str, borrow: bool) -> None:
    tight = units(LANES[lanes], "adbs", 3 * GB, borrow=borrow, quota_period_s=0.3)
    unfolded, folded = both(config(*tight), traffic("ab", 4.0, 30, seed=2))
    assert folded == unfolded
    preemptions = [m.preemptions_recompute for use in folded.units for m in use.models]
    assert sum(preemptions) > 0


@settings(max_examples=10, deadline=None)
@given(
    lanes=st.sampled_from(sorted(LANES)),
    policy=st.sampled_from(POLICIES),
    rate_rps=st.sampled_from([0.5, 3.0, 12.0]),
    kv_gb=st.sampled_from([3, 5, 30]),
    seed=st.integers(0, 10**6),
    timeout_s=st.sampled_from([None, 0.5]),
)
def test_folding_changes_nothing_anywhere(
    lanes: str, policy: str, rate_rps: float, kv_gb: int, seed: int, timeout_s: float | None
) -> None:
    placed = units(LANES[lanes], policy, kv_gb * GB, max_sequences=6)
    slos = (SLO, SLO if policy == "slo" else None)
    models = [
        ModelSpec(name=name, preset="llama-7b", queue_timeout_s=timeout_s, slo=slo)
        for name, slo in zip("ab", slos, strict=True)
    ]
    unfolded, folded = both(config(*placed, models=models), traffic("ab", rate_rps, 15, seed))
    assert folded == unfolded


def test_the_end_of_the_model_ends_a_run() -> None:
    asked = burst("a", 3, prompt=1900, output=900)
    unfolded, folded = both(config(unit("a", lanes=LANES["stream 2"])), asked)
    assert folded == unfolded
    assert {served.output_tokens for served in folded.served} == {148}


@pytest.mark.parametrize("lanes", ["stream 1", "stream 2", "green 2"])
def test_the_brain_itself_sees_few_of_the_steps(
    lanes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, land = [], MeshExecutor.land

    def counted(self: MeshExecutor, job: Job, elapsed_s: float) -> None:
        seen.append(job)
        land(self, job, elapsed_s)

    monkeypatch.setattr(MeshExecutor, "land", counted)
    placement = config(unit("a", lanes=LANES[lanes]))
    run = simulate(placement, setting("a"), burst("a", 8, output=1000))
    assert run.units[0].num_batches > 1000
    assert len(seen) < 60
