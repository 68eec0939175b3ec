"""Workloads: what a file may say, and which requests follow from it."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import correlation, fmean, mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
PARTS = ("prompt", "output")
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
        " seed, models, power_law, diurnal, drift, gap_cv, trace, prompt, output, joint, slo",
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
        ":2: prompt: found mean_tokens and quantiles, expected exactly one of mean_tokens,"
        " quantiles, seen, file",
    ),
    "no lengths": (
        "power_law: {alpha: 1, rate_rps: 2}\noutput: {cv: 1}",
        ":2: output: found none, expected exactly one of mean_tokens, quantiles, seen, file",
    ),
    "lengths from no file": (
        "power_law: {alpha: 1, rate_rps: 2}\noutput: {file: nowhere.csv}",
        "/nowhere.csv: no such trace",
    ),
    "joint lengths and others": (
        "power_law: {alpha: 1, rate_rps: 2}\njoint: {file: x.csv}\nprompt: {mean_tokens: 3}",
        ":2: joint: draws prompt and output together: remove those, or this",
    ),
    "a model's joint lengths and others": (
        "models: [{name: a, rate_rps: 2, joint: {file: x.csv}, output: {mean_tokens: 3}}]",
        ":1: models[0].joint: draws prompt and output together: remove those, or this",
    ),
    "half of joint lengths": (
        "joint: {file: x.csv}\nmodels: [{name: a, rate_rps: 2, output: {mean_tokens: 3}}]",
        ":2: models[0]: found one of prompt and output, which joint draws together",
    ),
    "a trace and joint lengths": (
        "trace: {file: x.csv}\njoint: {file: x.csv}",
        ":2: joint: the trace has its own lengths: remove one of the two",
    ),
    "joint lengths twice": (
        "power_law: {alpha: 1, rate_rps: 2}\njoint: {file: x.csv, seen: [{prompt_tokens: 1,"
        " output_tokens: 2}]}",
        ":2: joint: found both of file and seen, expected exactly one of them",
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
    place = path.parent if expected.startswith("/") else path
    assert caught.value.message == f"{place}{expected}"


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


# -- moments -------------------------------------------------------------------------------------

# Of so many draws a mean is off by five of its standard deviations once in two million times.
SIGMAS = 5.0
NUM = 20_000


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4000), st.floats(0.05, 1.2), st.integers(0, 99))
def test_lognormal_lengths_have_their_mean_and_spread(mean: int, cv: float, seed: int) -> None:
    rng, lengths = Random(seed), Lengths(mean_tokens=mean + 50, cv=cv)
    drawn = [draw(lengths, rng) for _ in range(NUM)]
    mean_of = fmean(drawn)
    # Rounding to whole tokens moves a mean by less than 0.05 where lengths spread over many.
    assert abs(mean_of - (mean + 50)) < SIGMAS * cv * (mean + 50) / NUM**0.5 + 0.05
    logs = [math.log(one) for one in drawn]
    sigma = math.sqrt(math.log1p(cv**2))
    assert stdev(logs) == pytest.approx(sigma, rel=SIGMAS / (2 * NUM) ** 0.5, abs=0.01)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 50), st.floats(0.3, 4.0), st.integers(0, 99))
def test_gaps_have_their_mean_and_spread(rate_rps: float, cv: float, seed: int) -> None:
    models = (Traffic(name="a", rate_rps=rate_rps),)
    asked = Workload(duration_s=5000 / rate_rps, models=models, gap_cv=cv, seed=seed)
    # Of a renewal process with n gaps of that spread: n^0.5 cv is the deviation of the count.
    assert abs(len(arrivals(asked)) - 5000) < SIGMAS * cv * 5000**0.5 + cv**2 + 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999))
def test_poisson_counts_vary_as_much_as_their_mean(seed: int) -> None:
    models = (Traffic(name="a", rate_rps=8.0),)
    times = [a.at_s for a in arrivals(Workload(duration_s=1000, models=models, seed=seed))]
    counts = Counter(int(at_s) for at_s in times)
    numbers = [counts[second] for second in range(1000)]
    assert abs(fmean(numbers) - 8) < SIGMAS * (8 / 1000) ** 0.5
    # The variance of 1,000 counts has a relative deviation of about (2 / 1000)^0.5.
    assert stdev(numbers) ** 2 == pytest.approx(8, rel=SIGMAS * (2 / 1000) ** 0.5)


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 2.5), st.integers(2, 12), st.integers(0, 99))
def test_popularity_follows_its_power(alpha: float, num: int, seed: int) -> None:
    models = tuple(Traffic(name=f"m{rank}") for rank in range(num))
    law = PowerLaw(alpha=alpha, rate_rps=100)
    found = arrivals(Workload(duration_s=100, models=models, power_law=law, seed=seed))
    counts = Counter(arrival.model for arrival in found)
    weights = [(rank + 1) ** -alpha for rank in range(num)]
    for rank, weight in enumerate(weights):
        wanted = 10_000 * weight / sum(weights)
        assert abs(counts[f"m{rank}"] - wanted) < SIGMAS * wanted**0.5 + 3


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 3), min_size=2, max_size=6), st.sampled_from([1.0, 2.0]))
def test_every_hour_has_its_rate(hours: list[float], cv: float) -> None:
    if not any(hours):
        return
    models = (Traffic(name="a", rate_rps=10.0),)
    curve = Diurnal(hours=tuple(hours), hour_s=100)
    asked = Workload(duration_s=100 * len(hours), models=models, diurnal=curve, gap_cv=cv)
    counts = Counter(int(a.at_s / 100) for a in arrivals(asked))
    for hour, factor in enumerate(hours):
        wanted = 1000 * factor
        assert abs(counts[hour] - wanted) < SIGMAS * cv * wanted**0.5 + cv**2 + 3


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(0, 99))
def test_seen_lengths_come_again_as_often(seen: list[int], seed: int) -> None:
    lengths, rng = Lengths(seen=tuple(seen)), Random(seed)
    drawn = [draw(lengths, rng) for _ in range(NUM)]
    assert set(drawn) <= set(seen)
    for tokens, times in Counter(seen).items():
        share = times / len(seen)
        deviation = (share * (1 - share) / NUM) ** 0.5
        assert abs(drawn.count(tokens) / NUM - share) <= SIGMAS * deviation
    assert moments(lengths).mean == pytest.approx(fmean(seen))


def rows_file(folder: Path) -> None:
    """Long prompts have short outputs."""
    lines = [f"{n},{10 * n},{1000 - 10 * n}" for n in range(1, 100)]
    (folder / "rows.csv").write_text("time,prompt,output\n" + "\n".join(lines))


def loaded(folder: Path, text: str) -> Workload:
    rows_file(folder)
    (folder / "workload.yaml").write_text(text)
    return load_workload(folder / "workload.yaml")


def test_lengths_of_a_file_each_by_itself(tmp_path: Path) -> None:
    asked = loaded(
        tmp_path,
        "duration_s: 500\nmodels: [{name: a, rate_rps: 20}]\nprompt: {file: rows.csv,"
        " max_tokens: 800}\noutput: {file: rows.csv}\nslo: {ttft_s: 1, tpot_s: 1}",
    )
    found = arrivals(asked)
    prompts, outputs = ([getattr(a, f"{what}_tokens") for a in found] for what in PARTS)
    assert max(prompts) == 800 and max(outputs) == 990
    assert fmean(outputs) == pytest.approx(500, rel=0.03)
    assert abs(correlation(prompts, outputs)) < 0.06
    (offer,) = offered(asked)
    assert offer.prompt.mean == pytest.approx(fmean(prompts), rel=0.03)


def test_joint_lengths_come_together(tmp_path: Path) -> None:
    asked = loaded(
        tmp_path,
        "duration_s: 500\nmodels: [{name: a, rate_rps: 20}, {name: b, rate_rps: 1, prompt:"
        " {mean_tokens: 7}, output: {mean_tokens: 8}}]\njoint: {file: rows.csv, prompt_scale: 0.5,"
        " max_output_tokens: 900}\nslo: {ttft_s: 1, tpot_s: 1}",
    )
    found = [a for a in arrivals(asked) if a.model == "a"]
    assert all(a.output_tokens == min(900, 1000 - 2 * a.prompt_tokens) for a in found)
    assert len({a.prompt_tokens for a in found}) == 99
    assert {(a.prompt_tokens, a.output_tokens) for a in arrivals(asked) if a.model == "b"} == {
        (7, 8)
    }
    offer, own = offered(asked)
    assert offer.prompt.mean == pytest.approx(250) and own.prompt.mean == pytest.approx(7)
    assert offer.output.mean == pytest.approx(fmean(min(900, 1000 - 10 * n) for n in range(1, 100)))


def test_a_models_own_joint_lengths(tmp_path: Path) -> None:
    asked = loaded(tmp_path, "models: [{name: a, rate_rps: 20, joint: {file: rows.csv}}]")
    assert all(a.prompt_tokens + a.output_tokens == 1000 for a in arrivals(asked))
