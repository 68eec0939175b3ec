"""What a workload asks of a planner: rates, and moments of lengths."""

from collections.abc import Sequence
from dataclasses import dataclass

from muxrt.config.placement import Slo
from muxrt.errors import ConfigError
from muxrt.workload.arrivals import (
    Arrival,
    arrivals,
    cut,
    joint_of,
    length_at,
    rates,
    scaled,
    shares,
)
from muxrt.workload.spec import Lengths, Traffic, Workload
from muxrt.workload.trace import TraceRow

NUM_QUANTILES = 400


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a distribution of lengths, tokens."""

    mean: float
    mean_square: float


@dataclass(frozen=True, slots=True)
class Offered:
    """The traffic of one model."""

    model: str
    rate_rps: float
    prompt: Moments
    output: Moments
    slo: Slo


def offered(
    workload: Workload, rows: Sequence[TraceRow] = (), *, hour: int | None = None
) -> list[Offered]:
    """What each model gets; `rows` is the trace where there is one, `hour` None is the busiest.

    A trace that does not name models has the same lengths for all of them, as its requests are
    dealt at random; one that does has its own for each. Gaps between requests and drift are not
    asked: rates are those of the first day. Raises ConfigError where a model has no targets, or the
    trace no requests in the time asked for.
    """
    if hour is not None and workload.diurnal is None:
        raise ConfigError(f"found hour {hour}, but the workload is the same all day: no `diurnal`")
    found = []
    replayed = arrivals(workload, rows) if workload.trace is not None else []
    names = any(row.model is not None for row in rows)
    for model in workload.models:
        slo = model.slo or workload.slo
        if slo is None:
            raise ConfigError(
                f"{model.name} has no slo, expected ttft_s and tpot_s for the model or the workload"
            )
        if workload.trace is not None:
            mine = [a for a in replayed if a.model == model.name] if names else replayed
            share = 1.0 if names else shares(workload)[model.name]
            rate_rps = model.rate_rps or len(mine) * share / workload.duration_s
            prompt, output = _of_trace(workload, mine or replayed)
        else:
            rate_rps = rates(workload)[model.name] * _busiest(workload, hour)
            prompt, output = _drawn(workload, model)
        found.append(Offered(model.name, rate_rps, prompt, output, slo))
    return found


def _drawn(workload: Workload, model: Traffic) -> tuple[Moments, Moments]:
    joint = joint_of(workload, model)
    if joint is not None:
        seen = [scaled(joint, one) for one in joint.seen]
        prompts = _moments([one.prompt_tokens for one in seen])
        return prompts, _moments([one.output_tokens for one in seen])
    prompt, output = model.prompt or workload.prompt, model.output or workload.output
    return moments(prompt), moments(output)


def moments(lengths: Lengths) -> Moments:
    """Mean and mean square, cut off as what is drawn is."""
    if lengths.seen:
        return _moments([cut(lengths, tokens) for tokens in lengths.seen])
    steps = [(index + 0.5) / NUM_QUANTILES for index in range(NUM_QUANTILES)]
    return _moments([length_at(lengths, share) for share in steps])


def _moments(lengths: Sequence[float]) -> Moments:
    mean = sum(lengths) / len(lengths)
    return Moments(mean, sum(length * length for length in lengths) / len(lengths))


def _of_trace(workload: Workload, replayed: Sequence[Arrival]) -> tuple[Moments, Moments]:
    if not replayed:
        raise ConfigError(f"the trace has no requests in the {workload.duration_s:g} s asked for")
    prompts = _moments([arrival.prompt_tokens for arrival in replayed])
    return prompts, _moments([arrival.output_tokens for arrival in replayed])


def _busiest(workload: Workload, hour: int | None) -> float:
    if workload.diurnal is None:
        return 1.0
    hours = workload.diurnal.hours
    return max(hours) if hour is None else hours[hour % len(hours)]
