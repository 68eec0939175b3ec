"""From a workload to its requests: the same seed gives the same requests."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from muxrt.workload.spec import Lengths, Trace, Traffic, Workload
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


def _poisson(workload: Workload, model: Traffic) -> Iterator[Arrival]:
    # A generator per model: changing one model's rate leaves the others' requests as they were.
    rng = Random(f"{workload.seed}/{model.name}")
    law = workload.power_law
    total_rps = law.rate_rps if law is not None else None
    rate_rps = model.rate_rps or shares(workload)[model.name] * (total_rps or 0.0)
    at_s = rng.expovariate(rate_rps)
    while at_s < workload.duration_s:
        prompt = draw(model.prompt or workload.prompt, rng)
        yield Arrival(at_s, model.name, prompt, draw(model.output or workload.output, rng))
        at_s += rng.expovariate(rate_rps)


def _replay(workload: Workload, trace: Trace, rows: Sequence[TraceRow]) -> Iterator[Arrival]:
    rng = Random(workload.seed)
    dealt = shares(workload)
    for row in rows:
        at_s = (row.at_s - trace.start_s) / trace.speed
        if 0 <= at_s < workload.duration_s:
            (model,) = rng.choices(list(dealt), list(dealt.values()))
            prompt = _scaled(row.prompt_tokens, trace.prompt_scale, trace.max_prompt_tokens)
            output = _scaled(row.output_tokens, trace.output_scale, trace.max_output_tokens)
            yield Arrival(at_s, model, prompt, output)


def _scaled(num_tokens: int, scale: float, most: int | None) -> int:
    scaled = round(num_tokens * scale)
    return max(1, min(scaled, most or scaled))


def draw(lengths: Lengths, rng: Random) -> int:
    """One length of the distribution, in tokens."""
    variance = math.log1p(lengths.cv**2)
    mean = math.log(lengths.mean_tokens) - variance / 2
    drawn = round(rng.lognormvariate(mean, math.sqrt(variance)))
    return max(lengths.min_tokens, min(drawn, lengths.max_tokens or drawn))
