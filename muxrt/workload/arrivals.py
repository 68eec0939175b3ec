"""From a workload to its requests: the same seed gives the same requests."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import NormalDist

from muxrt.errors import ConfigError
from muxrt.workload.spec import Diurnal, Lengths, Trace, Traffic, Workload
from muxrt.workload.trace import TraceRow


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes in `at_s` seconds after the start."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


def arrivals(workload: Workload, rows: Sequence[TraceRow] = ()) -> list[Arrival]:
    """All requests in order of time; `rows` is the trace where the workload replays one."""
    if workload.trace is not None:
        found = _replay(workload, workload.trace, rows)
    else:
        found = (a for model in workload.models for a in _poisson(workload, model))
    return sorted(found, key=lambda arrival: (arrival.at_s, arrival.model))


def shares(workload: Workload) -> dict[str, float]:
    """The part of all requests that each model gets; adds up to 1."""
    alpha = workload.power_law.alpha if workload.power_law else 0.0
    weights = {
        model.name: model.rate_rps or (rank + 1) ** -alpha
        for rank, model in enumerate(workload.models)
    }
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def rates(workload: Workload) -> dict[str, float]:
    """Requests/s of each model where no trace has them, before the hour's factor."""
    law, dealt = workload.power_law, shares(workload)
    total_rps = 0.0
    if law is not None and dealt:
        total_rps = law.rate_rps or (law.top_rate_rps or 0.0) / max(dealt.values())
    return {
        model.name: model.rate_rps or dealt[model.name] * total_rps for model in workload.models
    }


def factor(diurnal: Diurnal | None, at_s: float) -> float:
    """What a rate is multiplied by at a time after the start."""
    if diurnal is None:
        return 1.0
    return diurnal.hours[int(at_s / diurnal.hour_s) % len(diurnal.hours)]


def _poisson(workload: Workload, model: Traffic) -> Iterator[Arrival]:
    # A generator per model: changing one model's rate leaves the others' requests as they were.
    rng = Random(f"{workload.seed}/{model.name}")
    peak = max(workload.diurnal.hours) if workload.diurnal else 1.0
    rate_rps = rates(workload)[model.name] * peak
    at_s = rng.expovariate(rate_rps)
    while at_s < workload.duration_s:
        # Thinning (Lewis & Shedler 1979): at the peak's rate, and some of them do not come.
        if workload.diurnal is None or rng.random() * peak < factor(workload.diurnal, at_s):
            prompt = draw(model.prompt or workload.prompt, rng)
            yield Arrival(at_s, model.name, prompt, draw(model.output or workload.output, rng))
        at_s += rng.expovariate(rate_rps)


def _replay(workload: Workload, trace: Trace, rows: Sequence[TraceRow]) -> Iterator[Arrival]:
    rng = Random(workload.seed)
    dealt = shares(workload)
    for row in rows:
        at_s = (row.at_s - trace.start_s) / trace.speed
        if 0 <= at_s < workload.duration_s:
            model = row.model or rng.choices(list(dealt), list(dealt.values()))[0]
            if model not in dealt:
                raise ConfigError(
                    f"{trace.file}: asks for {model!r}, the workload has: {', '.join(dealt)}"
                )
            prompt = _scaled(row.prompt_tokens, trace.prompt_scale, trace.max_prompt_tokens)
            output = _scaled(row.output_tokens, trace.output_scale, trace.max_output_tokens)
            yield Arrival(at_s, model, prompt, output)


def _scaled(num_tokens: int, scale: float, most: int | None) -> int:
    scaled = round(num_tokens * scale)
    return max(1, min(scaled, most or scaled))


def draw(lengths: Lengths, rng: Random) -> int:
    """One length of the distribution, in tokens."""
    if lengths.mean_tokens is None:
        drawn = round(_at_quantile(lengths, rng.random()))
    else:
        drawn = round(rng.lognormvariate(*_normal(lengths, lengths.mean_tokens)))
    return max(lengths.min_tokens, min(drawn, lengths.max_tokens or drawn))


def length_at(lengths: Lengths, share: float) -> float:
    """The length that `share` of all lengths do not exceed, in (0, 1)."""
    if lengths.mean_tokens is None:
        tokens = _at_quantile(lengths, share)
    else:
        mean, deviation = _normal(lengths, lengths.mean_tokens)
        tokens = math.exp(mean + deviation * NormalDist().inv_cdf(share))
    return max(lengths.min_tokens, min(tokens, lengths.max_tokens or tokens))


def _normal(lengths: Lengths, mean_tokens: float) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm."""
    variance = math.log1p(lengths.cv**2)
    return math.log(mean_tokens) - variance / 2, math.sqrt(variance)


def _at_quantile(lengths: Lengths, share: float) -> float:
    before, low = 0.0, float(lengths.min_tokens)
    for quantile in lengths.quantiles:
        if share <= quantile.share:
            return low + (quantile.tokens - low) * (share - before) / (quantile.share - before)
        before, low = quantile.share, float(quantile.tokens)
    return low
