"""Goodput against offered rate: runs at rising rates, and what they add up to."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_serving import shares_of

from muxrt.bench.job import Status, Target
from muxrt.bench.report import make_report
from muxrt.bench.run import Run, run_all
from muxrt.config.placement import Slo
from muxrt.workload.spec import Lengths, Trace, Traffic, Workload
from muxrt.workload.trace import read_trace

# Twice the longest answer within its SLO: whoever waits longer has missed it anyway.
GIVE_UP_S = 30.0
WANTED = 0.9  # of all requests within their SLO
STEP = 1.25  # of the rate, beyond the list
MOST_STEPS = 8
FALLEN = 0.7  # of the best goodput: beyond the peak, nothing more to see
HOPELESS = 0.25  # attainment: no higher rate brings more requests within their SLO
WARM_UP_S = 5.0  # of load before the first figure, on either side
WARM_UP_SEED = 1_000  # other requests than those that are measured


@dataclass(frozen=True, slots=True)
class Load:
    """Requests for several models; their rate comes later."""

    models: tuple[str, ...]
    weights: tuple[float, ...]  # of the models' traffic
    prompt: Lengths
    output: Lengths
    slo: Slo
    trace: Path | None = None  # arrival times and lengths from there, instead of Poisson

    def workload(self, rate_rps: float, duration_s: float, seed: int) -> Workload:
        """The load at a rate of all models together."""
        shares = zip(self.models, shares_of(self.weights), strict=True)
        return Workload(
            duration_s=duration_s,
            seed=seed,
            models=tuple(Traffic(name=name, rate_rps=rate_rps * part) for name, part in shares),
            prompt=self.prompt,
            output=self.output,
            slo=self.slo,
            trace=self._replayed(rate_rps),
        )

    def _replayed(self, rate_rps: float) -> Trace | None:
        """The trace at the speed that gives this rate; lengths scaled to the same means."""
        if self.trace is None:
            return None
        rows = read_trace(self.trace)
        recorded_rps = len(rows) / rows[-1].at_s
        mean_prompt = sum(row.prompt_tokens for row in rows) / len(rows)
        mean_output = sum(row.output_tokens for row in rows) / len(rows)
        return Trace(
            file=str(self.trace),
            speed=rate_rps / recorded_rps,
            prompt_scale=self.prompt.mean_tokens / mean_prompt,
            output_scale=self.output.mean_tokens / mean_output,
            max_prompt_tokens=self.prompt.max_tokens,
            max_output_tokens=self.output.max_tokens,
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One run of one setting at one rate."""

    setting: str
    rate_rps: float  # as asked
    offered_rps: float  # as it came out
    served_rps: float  # answered, over the time until the last answer
    attainment: float  # share of all requests within their SLO
    goodput_rps: float  # requests within their SLO, over the time in which requests came
    requests: int
    failed: int
    refused: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    output_tokens: int
    blocks_used: int | None  # the most at one time; muxrt only
    preempted: int | None
    client_lag_p99_s: float
    errors: dict[str, int]


def make_point(setting: str, rate_rps: float, run: Run) -> Point:
    """The figures of a run."""
    report = make_report(run)
    total, duration_s = report.total, run.workload.duration_s
    answered = sum(outcome.status is Status.OK for outcome in run.outcomes)
    attainment = total.attainment or 0.0
    return Point(
        setting=setting,
        rate_rps=rate_rps,
        offered_rps=total.requests / duration_s,
        served_rps=answered / report.wall_s,
        attainment=attainment,
        goodput_rps=attainment * total.requests / duration_s,
        requests=total.requests,
        failed=total.failed,
        refused=total.refused,
        ttft_p50_s=total.ttft_p50_s,
        ttft_p99_s=total.ttft_p99_s,
        tpot_p50_s=total.tpot_p50_s,
        tpot_p99_s=total.tpot_p99_s,
        output_tokens=total.output_tokens,
        blocks_used=total.blocks.used if total.blocks else None,
        preempted=total.blocks.preempted if total.blocks else None,
        client_lag_p99_s=report.client_lag_p99_s,
        errors=report.errors,
    )


def measure(
    setting: str,
    urls: Sequence[str],
    load: Load,
    rate_rps: float,
    duration_s: float,
    seed: int,
) -> Point:
    """Send `load` at one rate, and wait for what comes of it."""
    targets = [Target(url, timeout_s=GIVE_UP_S) for url in urls]
    workload = load.workload(rate_rps, duration_s, seed)
    run = asyncio.run(run_all(targets, workload, lambda _: None))
    if len(run.outcomes) < run.num_planned:  # the client takes Ctrl-C as "show me what you have"
        raise KeyboardInterrupt
    return make_point(setting, rate_rps, run)


def warm_up(urls: Sequence[str], load: Load, rate_rps: float) -> None:
    """Some seconds of load that nobody counts."""
    measure("warm-up", urls, load, rate_rps, WARM_UP_S, WARM_UP_SEED)


def rising(rates: Sequence[float], points: Sequence[Point]) -> Iterator[float]:
    """`rates`, and on in steps of a quarter, until `points` (which grows) has passed the peak."""
    further = (rates[-1] * STEP**number for number in range(1, 1 + MOST_STEPS))
    for rate_rps in (*rates, *further):
        if has_passed_peak(points):
            return
        yield rate_rps


def has_passed_peak(points: Sequence[Point]) -> bool:
    """Twice in a row too many requests missed their SLO, and fewer kept it than at a lower rate.

    Once may be the machine's fault.
    """
    best_rps = max((point.goodput_rps for point in points), default=0.0)
    return len(points) > 1 and all(_is_beyond_peak(point, best_rps) for point in points[-2:])


def _is_beyond_peak(point: Point, best_rps: float) -> bool:
    if point.attainment >= WANTED:
        return False
    return point.goodput_rps < FALLEN * best_rps or point.attainment < HOPELESS


def best_per_rate(points: Iterable[Point]) -> list[Point]:
    """At each rate the setting with the highest attainment; lowest rate first."""
    best: dict[float, Point] = {}
    for point in points:
        if point.rate_rps not in best or point.attainment > best[point.rate_rps].attainment:
            best[point.rate_rps] = point
    return [best[rate_rps] for rate_rps in sorted(best)]


def most_goodput(points: Sequence[Point]) -> Point:
    """The point with the highest goodput."""
    return max(points, key=lambda point: point.goodput_rps)


@dataclass(frozen=True, slots=True)
class Sustained:
    """The highest rate at which enough requests are within their SLO."""

    rate_rps: float
    how: str  # where the figure comes from


def sustained(points: Sequence[Point], wanted: float = WANTED) -> Sustained:
    """Interpolated linearly between the last rate that attains `wanted` and the next measured one.

    Below the lowest measured rate the line starts at (0, 1): nothing offered, nothing missed.
    """
    measured = sorted((point.offered_rps, point.attainment) for point in points)
    curve = [(0.0, 1.0), *measured]
    last = max(index for index, (_, attained) in enumerate(curve) if attained >= wanted)
    low_rps, low = curve[last]
    if last == len(curve) - 1:
        return Sustained(low_rps, "at least: the highest rate measured")
    high_rps, high = curve[last + 1]
    part = (low - wanted) / (low - high)
    how = "between two measured rates" if last else "between 0 and the lowest rate measured"
    return Sustained(low_rps + part * (high_rps - low_rps), how)
