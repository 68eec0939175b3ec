"""Placements under the simulator: what can be said exactly, and what must not matter."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

import pytest
from sim_world import GB, SLO, burst, config, setting, steps, unit

from muxrt.config.placement import Lanes, ModelSpec, Scheduling, Slo, UnitModel
from muxrt.config.plan import EngineFacts
from muxrt.core import FinishReason
from muxrt.engine.build import plan_unit
from muxrt.errors import ConfigError
from muxrt.sim.group import GroupResult, Served, groups
from muxrt.sim.report import make_report
from muxrt.sim.simulate import Run, SimJudge, Task, simulate, targets, tasks
from muxrt.workload.arrivals import Arrival

TWO_LANES = Lanes(kind="green", sm_pct=(50, 50))


def traffic(models: str, rate_rps: float, duration_s: float, seed: int = 0) -> list[Arrival]:
    """Poisson requests dealt to models of one letter each."""
    rng, at_s, found = Random(seed), 0.0, list[Arrival]()
    while (at_s := at_s + rng.expovariate(rate_rps)) < duration_s:
        lengths = rng.randint(10, 600), rng.randint(1, 200)
        found.append(Arrival(at_s, rng.choice(models), *lengths))
    return found


def test_a_request_alone_takes_its_prefill_and_its_steps() -> None:
    facts = EngineFacts(control_s=0.002)
    run = simulate(config(unit("a")), setting("a", facts=facts), burst("a", 1, at_s=3.0))
    (one,) = run.served
    prefill_s = steps().prefill_s(100, 100**2)
    # The first token comes with the prefill, nine more with steps over 101, 102, ... tokens.
    step_s = [steps().decode_s(1, 101 + i) + 0.002 for i in range(9)]
    assert one.first_s == pytest.approx(3.0 + prefill_s)
    assert one.last_s == pytest.approx(3.0 + prefill_s + sum(step_s))
    assert (one.output_tokens, one.finish, one.unit) == (10, FinishReason.STOP, "u")


def test_the_endpoint_adds_to_the_first_token_only() -> None:
    facts = EngineFacts(request_s=0.004)
    asked = burst("a", 2, at_s=3.0)
    plain, late = (
        simulate(config(unit("a")), setting("a", facts=some), asked).served
        for some in (EngineFacts(), facts)
    )
    for one, other in zip(plain, late, strict=True):
        assert one.first_s is not None and one.last_s is not None
        assert (one.at_s, other.at_s) == (3.0, 3.0)
        assert other.first_s == pytest.approx(one.first_s + 0.004)
        assert other.last_s == pytest.approx(one.last_s + 0.004)


@pytest.mark.parametrize("knows", [True, False])
def test_a_step_past_the_end_is_launched_only_by_who_cannot_know_the_end(knows: bool) -> None:
    world = replace(setting("a"), asks_exactly=knows)
    spec = unit("a", lanes=Lanes(kind="stream", depth=2))
    asked = [*burst("a", 1, output=10), *burst("a", 1, at_s=99.0, output=1)]
    run = simulate(config(spec), world, asked)
    assert [one.output_tokens for one in run.served] == [10, 1]
    assert run.units[0].num_batches == (11 if knows else 12)


def test_tensor_parallel_ranks_share_the_work() -> None:
    run = simulate(config(unit("a", gpus=range(4))), setting("a"), burst("a", 1))
    assert run.served[0].first_s == pytest.approx(steps(tp=4).prefill_s(100, 100**2))


def test_a_prefill_batch_holds_what_fits_its_budget() -> None:
    spec = unit("a", scheduling=Scheduling(prefill_tokens=250))
    run = simulate(config(spec), setting("a"), burst("a", 3, output=1))
    both, third = steps().prefill_s(200, 2 * 100**2), steps().prefill_s(100, 100**2)
    # The first starts alone: it came before the others.
    assert [s.last_s for s in run.served] == pytest.approx([third, third + both, third + both])


def test_a_prefill_runs_beside_decodes_on_two_lanes() -> None:
    long, late = burst("a", 1, output=400), burst("b", 1, at_s=1.0, prompt=1000, output=1)
    facts = EngineFacts(interference=0.25)
    spec = unit("a", "b", lanes=TWO_LANES)
    run = simulate(config(spec), setting("a", "b", facts=facts), long + late)
    beside_s = 1.25 * steps(0.5).prefill_s(1000, 1000**2)
    assert run.served[1].last_s == pytest.approx(1.0 + beside_s)
    alone = simulate(config(spec), setting("a", "b", facts=facts), late)
    assert alone.served[0].last_s == pytest.approx(1.0 + steps().prefill_s(1000, 1000**2))


def test_a_gpu_holds_half_precision() -> None:
    """Presets are float16, which a CPU would widen: here K and V take two bytes a value."""
    spec = unit("a", kv_bytes=2 * GB)
    plan = plan_unit(spec, {"a": config(spec).models[0]}, setting("a").shapes)
    layout = plan.models["a"].layout
    token_bytes = 2 * 32 * 32 * 128 * 2
    tokens = plan.num_blocks // layout.blocks_per_group * layout.block_tokens
    assert tokens == 2 * GB // (16 * token_bytes) * 16


@pytest.mark.parametrize(
    ("prompt", "spec", "status"),
    [
        (2048, ModelSpec(name="a", preset="llama-7b"), 400),
        (300, ModelSpec(name="a", preset="llama-7b", max_model_len=300), 400),
        (100, ModelSpec(name="a", preset="llama-7b", max_queue=1), 429),
        (100, ModelSpec(name="a", preset="llama-7b", queue_timeout_s=0.01), 429),
    ],
)
def test_what_the_endpoint_refuses(prompt: int, spec: ModelSpec, status: int) -> None:
    one_at_a_time = unit("a", scheduling=Scheduling(max_sequences=1))
    asked = [*burst("a", 1), *burst("a", 3, at_s=0.001, prompt=prompt)]
    run = simulate(config(one_at_a_time, models=[spec]), setting("a"), asked)
    assert run.served[0].is_answered
    assert status in [served.refused for served in run.served]
    assert all(s.is_answered != (s.refused is not None) for s in run.served)


def test_an_answer_ends_where_the_model_ends() -> None:
    run = simulate(config(unit("a")), setting("a"), burst("a", 1, prompt=2000, output=500))
    assert (run.served[0].output_tokens, run.served[0].finish) == (48, FinishReason.LENGTH)


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 0.45, 0.55), (3.0, 0.2, 0.4)])
def test_replicas_share_by_their_traffic(share: float, least: float, most: float) -> None:
    parts = [UnitModel(name="a", traffic=1.0), UnitModel(name="a", traffic=share)]
    units = [unit(name=f"u{i}", parts=[part]) for i, part in enumerate(parts)]
    run = simulate(config(*units), setting("a"), traffic("a", 20.0, 30.0))
    small = sum(served.unit == "u0" for served in run.served)
    assert least < small / len(run.served) < most


def test_overload_preempts_and_everybody_is_served() -> None:
    tight = unit("a", "b", kv_bytes=2 * 2048 * 2**19 + GB, lanes=TWO_LANES)
    run = simulate(config(tight), setting("a", "b"), traffic("ab", 20.0, 20.0))
    report = make_report(run.served, run.units, targets(config(tight).models), 20.0)
    assert report.total.preemptions > 0
    assert report.total.answered + report.total.refused == report.total.requests
    assert run.units[0].kv_peak > 0.9


# -- what must not matter ------------------------------------------------------------------------


def backwards(run: Callable[[Task], GroupResult], tasks: Iterable[Task]) -> Iterable[GroupResult]:
    """A pool whose last task is done first."""
    return [run(task) for task in reversed(list(tasks))][::-1]


def placement() -> tuple[Run, Run]:
    units = [
        unit("a", "b", name="u0", lanes=TWO_LANES),
        unit("b", name="u1"),
        unit("c", name="u2"),
    ]
    asked, known = traffic("abc", 10.0, 10.0), setting("a", "b", "c")
    return (
        simulate(config(*units), known, asked),
        simulate(config(*units), known, asked, backwards),
    )


def test_the_order_of_groups_does_not_matter() -> None:
    first, second = placement()
    assert first == second
    assert [use.unit for use in first.units] == ["u0", "u1", "u2"]


def test_groups_are_units_with_models_in_common() -> None:
    units = [unit("a", name="u0"), unit("c", name="u1"), unit("a", "b", name="u2")]
    found = groups(units, config(*units).models)
    assert [[u.name for u in group.units] for group in found] == [["u1"], ["u0", "u2"]]
    assert [[m.name for m in group.models] for group in found] == [["c"], ["a", "b"]]


def test_processes_begin_with_the_groups_that_have_the_most_requests() -> None:
    placed = config(unit("a", name="one"), unit("b", name="two"), unit("c", name="three"))
    asked = [*burst("a", 2), *burst("b", 5), *burst("c", 3)]
    parts = tasks(placed, setting("abc"), asked)
    assert [len(part.arrivals) for part in parts] == [5, 3, 2]


def test_a_model_in_no_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match="requests ask for 'z', which is in no unit"):
        simulate(config(unit("a")), setting("a"), burst("z", 1))


# -- figures -------------------------------------------------------------------------------------


def served(
    *, ttft_s: float, tpot_s: float, tokens: int = 11, finish: FinishReason = FinishReason.STOP
) -> Served:
    last_s = 5.0 + ttft_s + tpot_s * (tokens - 1)
    return Served(0, "a", 5.0, 10, "u", tokens, 5.0 + ttft_s, last_s, finish)


def test_both_targets_count_and_so_does_everybody() -> None:
    asked = [
        served(ttft_s=0.9, tpot_s=0.04),
        served(ttft_s=1.1, tpot_s=0.04),
        served(ttft_s=0.9, tpot_s=0.06),
        served(ttft_s=0.9, tpot_s=0.06, tokens=1),
        Served(4, "a", 6.0, 10, finish=FinishReason.ERROR, refused=429),
    ]
    report = make_report(asked, (), {"a": SLO}, 10.0)
    assert report.total.attainment == pytest.approx(2 / 5)
    assert report.total.goodput_rps == pytest.approx(0.2)
    assert (report.total.answered, report.total.refused) == (4, 1)
    assert report.total.tpot_s.p50 == pytest.approx(0.04)


def test_requests_of_the_warm_up_are_not_counted() -> None:
    early, late = served(ttft_s=3.0, tpot_s=0.01), served(ttft_s=0.1, tpot_s=0.01)
    late = replace(late, at_s=8.0, first_s=8.1, last_s=8.2)
    report = make_report([early, late], (), {"a": SLO}, 10.0, warmup_s=6.0)
    assert (report.total.requests, report.total.attainment) == (1, 1.0)
    assert report.total.goodput_rps == pytest.approx(1 / 4)


def test_a_model_without_targets_has_no_goodput() -> None:
    report = make_report([served(ttft_s=9, tpot_s=9)], (), {"a": None}, 10.0)
    assert (report.total.goodput_rps, report.total.attainment) == (None, None)


# -- the judge -----------------------------------------------------------------------------------


def test_a_judge_prefers_what_serves_more_in_time() -> None:
    asked = traffic("ab", 24.0, 30.0)
    models = config(unit("a", "b")).models
    judge = SimJudge(models, setting("a", "b"), asked, 30.0)
    together = config(unit("a", "b")).placement
    apart = config(unit("a", name="u0"), unit("b", name="u1", gpus=[1])).placement
    assert judge(apart) > 1.2 * judge(together)
    lax = SimJudge(models, setting("a", "b"), asked, 30.0, dict.fromkeys("ab", Slo(99, 99)))
    assert lax(together) == pytest.approx(len(asked) / 30.0)


def test_a_judge_simulates_a_unit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = SimJudge(config(unit("a", "b")).models, setting("a", "b"), traffic("ab", 2.0, 5.0), 5.0)
    first, alone = unit("a", name="u0"), unit("b", name="u1")
    report = judge.report(config(first, alone).placement)
    monkeypatch.setattr("muxrt.sim.group.Simulation.run", lambda *_: pytest.fail("run again"))
    assert judge.report(config(first, alone).placement) == report
    assert judge.report(config(alone, first).placement).total == report.total
