"""Workloads: what a file may say, and which requests follow from it."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import mean, stdev

import pytest

from muxrt.config.placement import Slo
from muxrt.errors import ConfigError
from muxrt.workload.arrivals import arrivals, draw, length_at, rates, shares
from muxrt.workload.offered import moments, offered
from muxrt.workload.spec import (
    Diurnal,
    Drift,
    Lengths,
    PowerLaw,
    Quantile,
    Trace,
    Traffic,
    Workload,
    adjusted,
    load_workload,
    with_models,
)
from muxrt.workload.trace import TraceRow, read_trace

CONFIGS = Path(__file__).parent.parent / "configs"
AB = (Traffic(name="a"), Traffic(name="b"))
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

BROKEN = {
    "no rates": (
        "duration_s: 1",
        ":1: models: nothing gives the rates, expected rate_rps for every model, power_law,"
        " or trace",
    ),
    "a model without a rate": (
        "models: [{name: a, rate_rps: 1}, {name: b}]",
        ":1: models: nothing gives the rates, expected rate_rps for every model, power_law,"
        " or trace",
    ),
    "a power law without a rate": (
        "power_law: {alpha: 1}",
        ":1: power_law: found neither of rate_rps (of all models together) and top_rate_rps (of the"
        " most popular one), expected exactly one of them",
    ),
    "two sources of rates": (
        "power_law: {alpha: 1, rate_rps: 2}\nmodels: [{name: a, rate_rps: 1}]",
        ":2: models[0].rate_rps: power_law gives the rates: remove one of the two",
    ),
    "a trace and a total rate": (
        "trace: {file: x.csv}\npower_law: {alpha: 1, rate_rps: 2}",
        ":2: power_law.rate_rps: the trace has the rate: remove this or use trace.speed",
    ),
    "a trace and a model's rate": (
        "trace: {file: x.csv}\nmodels: [{name: a, rate_rps: 2}]",
        ":2: models[0].rate_rps: the trace has the rate: remove this,"
        " or use trace.speed and power_law.alpha",
    ),
    "a model twice": (
        "models: [{name: a, rate_rps: 2}, {name: a, rate_rps: 1}]",
        ":1: models[1].name: 'a' is already in the list",
    ),
    "a misspelt key": (
        "durations: 1",
        ":1: durations: unknown key; did you mean duration_s?; allowed here: title, duration_s,"
        " seed, models, power_law, diurnal, drift, gap_cv, trace, prompt, output, slo",
    ),
    "a trace and a top rate": (
        "trace: {file: x.csv}\npower_law: {alpha: 1, top_rate_rps: 2}",
        ":2: power_law.top_rate_rps: the trace has the rate: remove this or use trace.speed",
    ),
    "a trace and bursts": (
        "trace: {file: x.csv}\ngap_cv: 2",
        ":2: gap_cv: the trace has its own times: remove one of the two",
    ),
    "a trace and a drift": (
        "trace: {file: x.csv}\ndrift: {sigma: 1}",
        ":2: drift: the trace has its own times: remove one of the two",
    ),
    "a trace and a curve": (
        "trace: {file: x.csv}\ndiurnal: {hours: [1]}",
        ":2: diurnal: the trace has its own times: remove one of the two",
    ),
    "a curve of nothing": (
        "power_law: {alpha: 1, rate_rps: 2}\ndiurnal: {hours: [0, 0]}",
        ":2: diurnal.hours: found no traffic in any hour, expected factors",
    ),
    "lengths twice": (
        "power_law: {alpha: 1, rate_rps: 2}\nprompt: {mean_tokens: 1, quantiles: [{share: 1,"
        " tokens: 2}]}",
        ":2: prompt: found both of mean_tokens and quantiles, expected exactly one of them",
    ),
    "quantiles that fall": (
        "models: [{name: a, rate_rps: 2, output: {quantiles: [{share: 1, tokens: 2},"
        " {share: 0.5, tokens: 3}]}}]",
        ":1: models[0].output.quantiles: shares and tokens must rise from one to the next",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_file_gets_one_error(case: str, tmp_path: Path) -> None:
    text, expected = BROKEN[case]
    path = tmp_path / "workload.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_workload(path)
    assert caught.value.message == f"{path}{expected}"


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "workloads").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_shipped_workloads_load_and_have_requests(path: Path) -> None:
    workload = with_models(load_workload(path), ["pydoc-s", "pydoc-m", "pydoc-l"])
    rows = read_trace(Path(workload.trace.file)) if workload.trace else []
    plan = arrivals(workload, rows)
    assert len(plan) > 200 and {arrival.model for arrival in plan} == set(shares(workload))
    if path.stem == "muxserve":  # for plans of larger models than the demo's
        return
    # The demo's models know 1,024 positions; prompts come out up to a third longer than asked.
    assert max(1.33 * arrival.prompt_tokens + arrival.output_tokens for arrival in plan) < 1024


def test_rates_and_lengths_come_out_as_asked() -> None:
    workload = Workload(
        duration_s=2000,
        models=(Traffic(name="a", rate_rps=3), Traffic(name="b", rate_rps=1)),
        prompt=Lengths(mean_tokens=200, cv=1.0),
        output=Lengths(mean_tokens=50, cv=0.5),
    )
    plan = arrivals(workload)
    counts = [sum(arrival.model == name for arrival in plan) for name in "ab"]
    assert counts == [pytest.approx(6000, rel=0.1), pytest.approx(2000, rel=0.1)]
    mean = sum(arrival.prompt_tokens for arrival in plan) / len(plan)
    assert mean == pytest.approx(200, rel=0.1)
    assert sorted(plan, key=lambda arrival: arrival.at_s) == plan


def test_the_same_seed_gives_the_same_requests() -> None:
    workload = Workload(models=AB, power_law=PowerLaw(alpha=1, rate_rps=5))
    again = adjusted(workload, duration_s=None, speed=1.0, seed=1)
    assert arrivals(workload) == arrivals(workload) != arrivals(again)


def test_one_models_rate_leaves_the_others_requests_as_they_were() -> None:
    def of_b(rate_rps: float) -> list[object]:
        models = (Traffic(name="a", rate_rps=rate_rps), Traffic(name="b", rate_rps=2))
        return [a for a in arrivals(Workload(models=models)) if a.model == "b"]

    assert of_b(1) == of_b(20)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0, [0.5, 0.5]), (1, [2 / 3, 1 / 3]), (2, [0.8, 0.2])]
)
def test_a_power_law_shares_by_rank(alpha: float, expected: list[float]) -> None:
    workload = Workload(models=AB, power_law=PowerLaw(alpha=alpha, rate_rps=1))
    assert list(shares(workload).values()) == pytest.approx(expected)


def test_a_power_law_by_its_top_rate() -> None:
    law = PowerLaw(alpha=1, top_rate_rps=6)
    assert rates(Workload(models=AB, power_law=law)) == pytest.approx({"a": 6, "b": 3})


def test_a_curve_is_followed_hour_by_hour() -> None:
    curve = Diurnal(hours=(0.5, 2.0, 0.0), hour_s=300)
    workload = Workload(duration_s=900, models=(Traffic(name="a", rate_rps=4),), diurnal=curve)
    counts = [0, 0, 0]
    for arrival in arrivals(workload):
        counts[int(arrival.at_s / 300)] += 1
    assert counts == [pytest.approx(600, rel=0.15), pytest.approx(2400, rel=0.1), 0]


def test_lengths_by_quantiles() -> None:
    quantiles = (Quantile(share=0.5, tokens=100), Quantile(share=1.0, tokens=1000))
    lengths, rng = Lengths(quantiles=quantiles), Random(0)
    drawn = sorted(draw(lengths, rng) for _ in range(4000))
    assert drawn[1800] == pytest.approx(90, rel=0.1) and drawn[-1] <= 1000
    assert drawn[3000] == pytest.approx(550, rel=0.1) == length_at(lengths, 0.75)


def test_the_moments_of_lengths_are_those_of_what_is_drawn() -> None:
    rng = Random(1)
    for lengths in (
        Lengths(mean_tokens=100, cv=1.0, min_tokens=10, max_tokens=300),
        Lengths(mean_tokens=60),
        Lengths(quantiles=(Quantile(share=0.9, tokens=100), Quantile(share=1.0, tokens=900))),
    ):
        drawn = [draw(lengths, rng) for _ in range(20000)]
        found = moments(lengths)
        assert found.mean == pytest.approx(sum(drawn) / 20000, rel=0.02)
        assert found.mean_square == pytest.approx(sum(n * n for n in drawn) / 20000, rel=0.04)


def test_what_a_workload_offers_to_a_planner() -> None:
    workload = Workload(
        models=(Traffic(name="a", slo=Slo(ttft_s=9, tpot_s=1)), Traffic(name="b")),
        power_law=PowerLaw(alpha=1, top_rate_rps=6),
        diurnal=Diurnal(hours=(0.5, 2.0)),
        prompt=Lengths(mean_tokens=10),
        slo=Slo(ttft_s=1, tpot_s=1),
    )
    a, b = offered(workload)
    assert (a.rate_rps, b.rate_rps) == (12, 6)  # in the busiest hour
    assert a.slo == Slo(ttft_s=9, tpot_s=1) and b.slo == workload.slo
    assert a.prompt.mean == pytest.approx(10)
    assert offered(workload, hour=0)[0].rate_rps == 3


def test_what_a_trace_offers_to_a_planner() -> None:
    rows = [TraceRow(at, 100 * (at + 1), 10) for at in range(8)]
    trace = Trace(file="x", start_s=2, speed=2, prompt_scale=0.5)
    workload = Workload(
        duration_s=2,
        models=AB,
        trace=trace,
        power_law=PowerLaw(alpha=0),
        slo=Slo(ttft_s=1, tpot_s=1),
    )
    a, _ = offered(workload, rows)
    assert a.rate_rps == pytest.approx(1.0)  # rows 2 to 5 in two seconds, dealt to two models
    assert a.prompt.mean == pytest.approx((150 + 200 + 250 + 300) / 4)


def test_a_planner_needs_targets() -> None:
    workload = Workload(models=(Traffic(name="a", rate_rps=1),))
    with pytest.raises(ConfigError, match="a has no slo, expected ttft_s and tpot_s"):
        offered(workload)


def test_lengths_stay_within_their_bounds() -> None:
    lengths = Lengths(mean_tokens=100, cv=2.0, min_tokens=50, max_tokens=120)
    drawn = {draw(lengths, Random(seed)) for seed in range(200)}
    assert min(drawn) == 50 and max(drawn) == 120
    assert draw(Lengths(mean_tokens=100), Random(0)) == 100


def test_a_trace_is_scaled_in_time_and_length() -> None:
    rows = [TraceRow(0.0, 1000, 100), TraceRow(4.0, 10, 1), TraceRow(8.0, 9999, 9999)]
    trace = Trace(
        file="x", start_s=2, speed=2, prompt_scale=0.5, output_scale=0.1, max_prompt_tokens=600
    )
    workload = Workload(duration_s=10, models=(Traffic(name="a"),), trace=trace)
    found = [(a.at_s, a.prompt_tokens, a.output_tokens) for a in arrivals(workload, rows)]
    assert found == [(1.0, 5, 1), (3.0, 600, 1000)]


def test_speed_multiplies_every_kind_of_rate() -> None:
    given = Workload(
        models=(Traffic(name="a", rate_rps=2),),
        power_law=PowerLaw(alpha=1, rate_rps=3),
        trace=Trace(file="x", speed=4),
        slo=Slo(ttft_s=1, tpot_s=1),
    )
    fast = adjusted(given, duration_s=7, speed=10, seed=None)
    assert fast.models[0].rate_rps == 20
    assert fast.power_law == PowerLaw(alpha=1, rate_rps=30)
    assert fast.trace == Trace(file="x", speed=40)
    assert (fast.duration_s, fast.seed, fast.slo) == (7, given.seed, given.slo)


def test_traces_are_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        HEADER + "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.9799600,4808,10\n"
    )
    first, second = read_trace(path)
    assert (first, second.prompt_tokens) == (TraceRow(0.0, 4808, 10), 3180)
    assert second.at_s == pytest.approx(0.052, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ": no column of the time, expected a CSV with a header such as TIMESTAMP,"),
        ("TIMESTAMP,ContextTokens\n1,2\n", ": no column of the output, expected a CSV"),
        (HEADER, ": the trace has no requests"),
        (HEADER + "1,2,3\nsoon,2,3\n", ":3: found soon,2,3, expected a time and two whole numbers"),
        (HEADER + "1,2\n", ":2: found 1,2,None, expected a time and two whole numbers"),
    ],
)
def test_a_wrong_trace_gets_one_error(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert caught.value.message.startswith(f"{path}{expected}")


def test_a_trace_may_name_its_models(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("model,Time,output,prompt\nb,10.5,3,7\na,10,2,5\nb,11,1,9\n")
    rows = read_trace(path)
    assert rows[1] == TraceRow(0.5, 7, 3, "b")
    slo = Slo(ttft_s=1, tpot_s=1)
    workload = Workload(duration_s=2, models=AB, trace=Trace(file="x"), slo=slo)
    assert [a.model for a in arrivals(workload, rows)] == ["a", "b", "b"]
    first, second = offered(workload, rows)
    assert (first.rate_rps, second.rate_rps) == (0.5, 1.0)
    assert (first.prompt.mean, second.prompt.mean) == (5, 8)
    alone = Workload(duration_s=2, models=AB[:1], trace=Trace(file="x"), slo=slo)
    with pytest.raises(ConfigError, match="the trace asks for 'b', the workload has: a"):
        arrivals(alone, rows)


def gaps(workload: Workload) -> list[float]:
    times = [arrival.at_s for arrival in arrivals(workload)]
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize("cv", [0.5, 3.0])
def test_gaps_have_the_spread_asked_for(cv: float) -> None:
    rated = (Traffic(name="a", rate_rps=20.0),)
    found = gaps(Workload(duration_s=1000, models=rated, gap_cv=cv))
    assert mean(found) == pytest.approx(0.05, rel=0.06)
    assert stdev(found) / mean(found) == pytest.approx(cv, rel=0.1)


def test_bursts_follow_the_hours() -> None:
    rated = (Traffic(name="a", rate_rps=20.0),)
    hours = Diurnal(hours=(2.0, 0.0, 0.5), hour_s=100)
    workload = Workload(duration_s=600, models=rated, gap_cv=2.0, diurnal=hours)
    times = [arrival.at_s for arrival in arrivals(workload)]
    counts = [sum(hour <= t % 300 < hour + 100 for t in times) for hour in (0, 100, 200)]
    assert counts[1] == 0
    assert counts[0] == pytest.approx(8000, rel=0.1)
    assert counts[2] == pytest.approx(2000, rel=0.15)


def test_popularity_drifts_and_the_total_stays() -> None:
    models = tuple(Traffic(name=name, rate_rps=20.0) for name in "abcd")
    drift = Drift(sigma=1.0, day_s=100)
    found = arrivals(Workload(duration_s=500, models=models, drift=drift))
    days = [Counter(a.model for a in found if int(a.at_s / 100) == day) for day in range(5)]
    assert all(sum(day.values()) == pytest.approx(8000, rel=0.05) for day in days)
    assert all(days[0][name] == pytest.approx(2000, rel=0.1) for name in "abcd")
    assert max(days[4].values()) > 2 * min(days[4].values())


def test_the_excerpt_has_its_attribution_and_stays_small() -> None:
    excerpt = CONFIGS / "traces" / "azure_conv_excerpt.csv"
    assert excerpt.stat().st_size < 50_000 and len(read_trace(excerpt)) == 1015
    assert "CC-BY 4.0" in (excerpt.parent / "ATTRIBUTION.md").read_text()
