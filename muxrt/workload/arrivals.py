"""From a workload to its requests: the same seed gives the same requests."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import NormalDist

from muxrt.errors import ConfigError
from muxrt.workload.spec import Diurnal, Joint, Lengths, Seen, Trace, Traffic, Workload
from muxrt.workload.trace import TraceRow


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes in `at_s` seconds after the start."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


def arrivals(workload: Workload, rows: Sequence[TraceRow] = ()) -> list[Arrival]:
    """All requests in order of time; `rows` is the trace where the workload replays one.

    Raises ConfigError where the trace asks for a model that the workload does not have.
    """
    if workload.trace is not None:
        found = _replay(workload, workload.trace, rows)
    elif workload.drift is None and workload.gap_cv == 1:
        found = (a for model in workload.models for a in _poisson(workload, model))
    else:
        found = (a for model in workload.models for a in _renewals(workload, model))
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
            yield _arrival(workload, model, at_s, rng)
        at_s += rng.expovariate(rate_rps)


def _renewals(workload: Workload, model: Traffic) -> Iterator[Arrival]:
    """Gamma gaps on a clock that runs as fast as the rate is high (time rescaling).

    Shape 1 / cv^2 gives gaps of that coefficient of variation (at cv 1 they are exponential).
    """
    rng, spread = Random(f"{workload.seed}/{model.name}"), workload.gap_cv**2
    base_rps, waited = rates(workload)[model.name], 0.0
    drifts = _walks(workload)[model.name]
    edges = _edges(workload)
    due = rng.gammavariate(1 / spread, spread)  # mean 1
    for start_s, end_s in pairwise(edges):
        day = int(start_s / workload.drift.day_s) if workload.drift else 0
        rate_rps = base_rps * factor(workload.diurnal, start_s) * drifts[day]
        while rate_rps > 0 and waited + (end_s - start_s) * rate_rps >= due:
            start_s += (due - waited) / rate_rps
            waited = due
            yield _arrival(workload, model, start_s, rng)
            due += rng.gammavariate(1 / spread, spread)
        waited += (end_s - start_s) * rate_rps


def _edges(workload: Workload) -> list[float]:
    """The times between which no rate changes."""
    edges = {0.0, workload.duration_s}
    periods = [workload.diurnal.hour_s] if workload.diurnal else []
    periods += [workload.drift.day_s] if workload.drift else []
    for period_s in periods:
        count = math.ceil(workload.duration_s / period_s)
        edges |= {number * period_s for number in range(1, count)}
    return sorted(edges)


def _walks(workload: Workload) -> dict[str, list[float]]:
    """What each model's rate is multiplied by, day by day."""
    base, drift = rates(workload), workload.drift
    if drift is None:
        return {name: [1.0] for name in base}
    days = math.ceil(workload.duration_s / drift.day_s)
    levels, found = dict.fromkeys(base, 1.0), {name: [1.0] for name in base}
    rng = Random(f"{workload.seed}/drift")
    for _ in range(1, days):
        levels = {n: level * math.exp(rng.gauss(0.0, drift.sigma)) for n, level in levels.items()}
        scale = sum(base.values()) / sum(base[name] * level for name, level in levels.items())
        for name, level in levels.items():
            found[name].append(level * scale)
    return found


def _replay(workload: Workload, trace: Trace, rows: Sequence[TraceRow]) -> Iterator[Arrival]:
    rng = Random(workload.seed)
    dealt = shares(workload)
    for row in rows:
        at_s = (row.at_s - trace.start_s) / trace.speed
        if 0 <= at_s < workload.duration_s:
            model = row.model or rng.choices(list(dealt), list(dealt.values()))[0]
            if model not in dealt:
                known = ", ".join(dealt)
                raise ConfigError(
                    f"{trace.file}: the trace asks for {model!r}, the workload has: {known}"
                )
            prompt = _scaled(row.prompt_tokens, trace.prompt_scale, trace.max_prompt_tokens)
            output = _scaled(row.output_tokens, trace.output_scale, trace.max_output_tokens)
            yield Arrival(at_s, model, prompt, output)


def joint_of(workload: Workload, model: Traffic) -> Joint | None:
    """From what prompt and output of a model are drawn together; None: each by itself."""
    has_own = model.prompt is not None and model.output is not None
    return model.joint or (None if has_own else workload.joint)


def scaled(joint: Joint, one: Seen) -> Seen:
    """A request that was seen, scaled and cut off."""
    return Seen(
        _scaled(one.prompt_tokens, joint.prompt_scale, joint.max_prompt_tokens),
        _scaled(one.output_tokens, joint.output_scale, joint.max_output_tokens),
    )


def _arrival(workload: Workload, model: Traffic, at_s: float, rng: Random) -> Arrival:
    """A request of that time with lengths of its model's."""
    joint = joint_of(workload, model)
    if joint is not None:
        one = scaled(joint, rng.choice(joint.seen))
        return Arrival(at_s, model.name, one.prompt_tokens, one.output_tokens)
    prompt = draw(model.prompt or workload.prompt, rng)
    return Arrival(at_s, model.name, prompt, draw(model.output or workload.output, rng))


def _scaled(num_tokens: int, scale: float, most: int | None) -> int:
    scaled = round(num_tokens * scale)
    return max(1, min(scaled, most or scaled))


def draw(lengths: Lengths, rng: Random) -> int:
    """One length of the distribution, in tokens."""
    if lengths.seen:
        return round(cut(lengths, rng.choice(lengths.seen)))
    if lengths.mean_tokens is not None:
        return round(
            cut(lengths, round(rng.lognormvariate(*_normal(lengths, lengths.mean_tokens))))
        )
    return round(cut(lengths, round(_at_quantile(lengths, rng.random()))))


def length_at(lengths: Lengths, share: float) -> float:
    """The length that `share` of all lengths do not exceed, in (0, 1); not of those seen."""
    if lengths.mean_tokens is None:
        return cut(lengths, _at_quantile(lengths, share))
    mean, deviation = _normal(lengths, lengths.mean_tokens)
    return cut(lengths, math.exp(mean + deviation * NormalDist().inv_cdf(share)))


def cut(lengths: Lengths, tokens: float) -> float:
    """`tokens` within the bounds."""
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
