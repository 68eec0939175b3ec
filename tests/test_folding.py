"""Runs of decode steps folded or step by step: the same to the last bit, and much quicker."""

from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replace_struct
from sim_world import GB, SLO, burst, config, setting, unit

from muxrt.config.cluster import KINDS
from muxrt.config.placement import (
    Lanes,
    Memory,
    ModelSpec,
    Role,
    Scheduling,
    UnitModel,
    UnitSpec,
)
from muxrt.config.plan import EngineFacts
from muxrt.config.serve import ServeConfig
from muxrt.core import Phase
from muxrt.cost.latency import BatchShape
from muxrt.sim.executor import Job, MeshExecutor
from muxrt.sim.group import Simulation, groups
from muxrt.sim.setting import Failure
from muxrt.sim.simulate import Run, simulate
from muxrt.sim.sprint import LOG_STEPS
from muxrt.workload.arrivals import Arrival

FACTS = EngineFacts(control_s=1e-4, control_step_s=3e-4, interference=0.15)
LANES = {
    f"{kind} {len(sm_pct or '1')} lanes, depth {depth}": Lanes(
        kind=kind,  # type: ignore[arg-type]
        sm_pct=sm_pct,
        depth=depth,
    )
    for (kind, sm_pct), depth in product(
        [("stream", None), ("stream", (50, 50)), ("green", (40, 60)), ("mps", (90, 50, 50))], [1, 2]
    )
}
ONE_LANE, TWO_LANES = LANES["stream 1 lanes, depth 2"], LANES["green 2 lanes, depth 2"]
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
    unfolded, folded = both(config(unit("a", lanes=ONE_LANE)), asked)
    assert folded == unfolded
    assert {served.output_tokens for served in folded.served} == {148}


def landed(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The batches that the brain is told of, from now on."""
    seen, land = list[Job](), MeshExecutor.land

    def counted(self: MeshExecutor, job: Job, elapsed_s: float) -> None:
        seen.append(job)
        land(self, job, elapsed_s)

    monkeypatch.setattr(MeshExecutor, "land", counted)
    return seen


@pytest.mark.parametrize(
    ("policy", "models"),
    # Under fcfs the second model waits until the first is done: that is no run.
    [("adbs", "a"), ("adbs", "abc"), ("round-robin", "abc"), ("fcfs", "a")],
)
@pytest.mark.parametrize("lanes", LANES)
def test_the_brain_itself_sees_few_of_the_steps(
    lanes: str, models: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, scheduling = landed(monkeypatch), Scheduling(policy=policy, prefill_tokens=2048)  # type: ignore[arg-type]
    placement = config(unit(*models, lanes=LANES[lanes], scheduling=scheduling))
    asked = [arrival for name in models for arrival in burst(name, 4, output=1000)]
    run = simulate(placement, setting(*models), asked)
    assert run.units[0].num_batches > 900 * len(models)
    assert len(seen) < 80 * len(models)


@pytest.mark.parametrize("lanes", LANES)
def test_folding_changes_nothing_while_blocks_are_copied(lanes: str) -> None:
    """Sequences on their way back from host memory run, but do not decode yet."""
    tight = [
        replace_struct(spec, memory=Memory(kv_bytes=3 * GB, swap_bytes=20 * GB))
        for spec in units(LANES[lanes], "adbs", 3 * GB, preempt="swap")
    ]
    unfolded, folded = both(config(*tight), traffic("ab", 4.0, 30, seed=2))
    assert folded == unfolded
    assert sum(m.preemptions_swap for use in folded.units for m in use.models) > 0


@pytest.mark.parametrize("lanes", LANES)
def test_models_in_step_are_folded_in_the_order_of_their_events(lanes: str) -> None:
    """Equal models with equal requests end their steps at the same instant, on several lanes."""
    placement = config(unit("a", "b", "c", lanes=LANES[lanes]))
    asked = [arrival for name in "abc" for arrival in burst(name, 2, output=300)]
    unfolded, folded = both(placement, [*asked, *burst("b", 1, at_s=1.0)])
    assert folded == unfolded


def test_a_run_may_be_longer_than_its_log() -> None:
    longest = LOG_STEPS + 1500
    models = [ModelSpec(name="a", preset="mistral-7b", max_model_len=2 * longest)]
    placement = config(unit("a", lanes=ONE_LANE), models=models)
    asked = burst("a", 2, output=longest)
    known = setting("a", preset="mistral-7b", facts=FACTS)
    unfolded = simulate(placement, replace(known, fold=False), asked)
    assert simulate(placement, known, asked) == unfolded


@pytest.mark.parametrize("num_cores", [4, 5])  # one is free for control, or none
@pytest.mark.parametrize("depth", [1, 2])
def test_lanes_of_cores_fold_too(depth: int, num_cores: int) -> None:
    """There a model may decode on several lanes at once: its batches are not kept whole."""
    kind = KINDS["a100-80g"]
    cores = replace_struct(kind, name="cores", device="cpu", sms=num_cores)
    facts = EngineFacts(control_step_s=1e-3) if num_cores > 4 else EngineFacts(interference=0.1)
    known = setting("a", "b", facts=facts)
    known = replace(known, gpus={"cores": cores})
    lanes = Lanes(kind="cores", split=(2, 2), depth=depth)
    spec = unit("a", "b", lanes=lanes)
    spec = replace_struct(spec, mesh=replace_struct(spec.mesh, device="cpu", kind="cores"))
    asked = traffic("ab", 2.0, 25, seed=3)
    unfolded = simulate(config(spec), replace(known, fold=False), asked)
    folded = simulate(config(spec), known, asked)
    assert folded == unfolded


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("policy", POLICIES)
def test_quotas_move_while_a_run_goes_on(policy: str, lanes: str) -> None:
    """A model that waits for blocks after long runs finds the quotas where they would be."""
    placement = config(*units(LANES[lanes], policy, 4 * GB, quota_period_s=0.1))
    asked = [
        *burst("a", 2, output=1500),
        *burst("b", 6, at_s=8.0, prompt=400, output=300),
        *burst("a", 9, at_s=14.0, prompt=300, output=200),
    ]
    unfolded, folded = both(placement, asked)
    assert folded == unfolded
    first = folded.units[0].models
    assert len({use.quota_blocks for use in first}) > 1  # they have moved


@settings(max_examples=15, deadline=None)
@given(
    lanes=st.sampled_from(sorted(LANES)),
    policy=st.sampled_from(POLICIES),
    num_models=st.integers(1, 4),
    rate_rps=st.sampled_from([0.5, 3.0, 12.0]),
    kv_gb=st.sampled_from([5, 30]),
    seed=st.integers(0, 10**6),
    timeout_s=st.sampled_from([None, 0.5]),
    period_s=st.sampled_from([0.05, 1.0]),
)
def test_the_brain_is_left_as_it_would_be(
    lanes: str,
    policy: str,
    num_models: int,
    rate_rps: float,
    kv_gb: int,
    seed: int,
    timeout_s: float | None,
    period_s: float,
) -> None:
    """Not only what clients saw is the same: estimates, quotas and peaks are, and all adds up."""
    names = "abcd"[:num_models]
    scheduling = Scheduling(policy=policy, max_sequences=8, quota_period_s=period_s)  # type: ignore[arg-type]
    spec = unit(*names, lanes=LANES[lanes], kv_bytes=kv_gb * GB, scheduling=scheduling)
    models = [
        ModelSpec(
            name=name,
            preset="llama-7b",
            queue_timeout_s=timeout_s,
            slo=SLO if policy == "slo" else slo,
        )
        for name, slo in zip(names, (SLO, None, SLO, None), strict=False)
    ]
    placement = config(spec, models=models)
    (group,) = groups(placement.units, placement.models)
    asked = list(enumerate(traffic(names, rate_rps, 20, seed)))
    known = setting(*names, facts=FACTS)
    left = []
    for is_folded in (False, True):
        simulation = Simulation(group, replace(known, fold=is_folded))
        simulation.run(asked)
        brain = simulation.units["u"].unit
        assert brain.check()
        predicted = [brain.scheduler.latency.predict(n, BatchShape(3, 900)) for n in names]
        left.append((brain.stats(), predicted, brain.next_timer()))
    assert left[0] == left[1]


# -- units with roles ----------------------------------------------------------------------------


def apart(kv_gb: float, policy: str = "fcfs", mixed: bool = False, **knobs: object) -> ServeConfig:
    """Two units that prefill, two that decode, of two models; and one that does both of one."""
    scheduling = Scheduling(policy=policy, prefill_tokens=512, **knobs)  # type: ignore[arg-type]
    roles: list[tuple[str, Role]] = [(f"p{n}", "prefill") for n in range(2)]
    roles += [(f"d{n}", "decode") for n in range(2)] + ([("m", "mixed")] if mixed else [])
    return config(
        *(
            unit(
                name=name,
                gpus=(gpu,),
                parts=[UnitModel(name=model, role=role) for model in "ab"],
                kv_bytes=int(kv_gb * GB),
                scheduling=scheduling,
            )
            for gpu, (name, role) in enumerate(roles)
        )
    )


@pytest.mark.parametrize("stream_tokens", [1, 256, 10**6])
@pytest.mark.parametrize("policy", ["fcfs", "adbs", "slo"])
def test_folding_units_with_roles_changes_nothing(policy: str, stream_tokens: int) -> None:
    placed = apart(30, policy, stream_tokens=stream_tokens)
    asked = traffic("ab", 3.0, 60, seed=3)
    unfolded, folded = both(placed, asked)
    assert folded == unfolded
    assert all(served.is_answered for served in folded.served)


@settings(max_examples=20, deadline=None)
@given(
    rate_rps=st.sampled_from([0.5, 3.0, 12.0]),
    kv_gb=st.sampled_from([3, 30]),
    seed=st.integers(0, 10**6),
    mixed=st.booleans(),
    stream_tokens=st.sampled_from([1, 256, 10**6]),
    failure_s=st.sampled_from([None, 1.0, 4.0]),
)
def test_folding_units_with_roles_changes_nothing_anywhere(
    rate_rps: float, kv_gb: int, seed: int, mixed: bool, stream_tokens: int, failure_s: float | None
) -> None:
    placed = apart(kv_gb, "adbs", mixed, stream_tokens=stream_tokens)
    asked = traffic("ab", rate_rps, 30, seed)
    known = setting("a", "b", facts=FACTS)
    if failure_s is not None:
        unit_name = "d0" if seed % 2 else "p0"
        known = replace(known, failures=(Failure(unit_name, failure_s, 2.0),))
    unfolded, folded = (
        simulate(placed, replace(known, fold=fold), asked) for fold in (False, True)
    )
    assert folded == unfolded


def test_most_steps_of_units_that_decode_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Arrival(0.5 * n, "a", 300, 900) for n in range(20)]
    seen, known = landed(monkeypatch), setting("a", "b", facts=FACTS)
    told = []
    for fold in (False, True):
        seen.clear()
        simulate(apart(30), replace(known, fold=fold), asked)
        told.append(sum(job.runner.phase is Phase.DECODE for job in seen))
    assert told[0] > 1000 and told[1] < 0.3 * told[0]
