"""The figures of a simulated run, per model and in all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from muxrt.config.placement import Slo
from muxrt.errors import Unavailable
from muxrt.metrics import Timing, is_met, percentile, tpot_s
from muxrt.sim.group import Served
from muxrt.sim.use import UnitUse

ALL = "all"
PERCENTILES = (50, 90, 99)
# Factors of both targets at which attainment is reported: tight to lax, as the papers' figures.
SLO_SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of one measure, seconds; None where nothing was measured."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One model's figures (or all models')."""

    model: str
    requests: int
    answered: int
    refused: int  # at the queue's limit, at their deadline, or too long
    failed: int  # as their unit died, or none was there
    retried: int  # in another unit, as theirs died before their first token
    ttft_s: Spread  # of those that got a token
    tpot_s: Spread  # of those that got two
    e2e_s: Spread  # of those that got all
    attainment: float | None  # share of ALL requests that met both targets; None without targets
    goodput_rps: float | None  # those, per second of the time in which requests came
    throughput_rps: float  # answered, per second until the last token
    output_tokens_per_s: float  # likewise
    prompt_tokens: int  # of the answered
    output_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Report:
    """What `muxrt simulate` prints and writes."""

    rows: tuple[Row, ...]
    total: Row
    scaled: tuple[tuple[float, float], ...]  # attainment by factor of all targets; () without
    units: tuple[UnitUse, ...]
    duration_s: float  # in which the counted requests came
    wall_s: float  # from then until the last token


def make_report(
    served: Sequence[Served],
    units: Sequence[UnitUse],
    slos: Mapping[str, Slo | None],
    duration_s: float,
    warmup_s: float = 0.0,
) -> Report:
    """Figures of requests that came over `duration_s` seconds; `slos` by model.

    Those of the first `warmup_s` met an emptier system than the rest: they are not counted. Raises
    ValueError unless `duration_s` > `warmup_s` >= 0.
    """
    if not 0 <= warmup_s < duration_s:
        raise ValueError(f"figures need time: duration_s={duration_s}, warmup_s={warmup_s}")
    served = [one for one in served if one.at_s >= warmup_s]
    duration_s -= warmup_s
    last_s = max((one.last_s for one in served if one.last_s is not None), default=warmup_s)
    wall_s = last_s - warmup_s
    preempted: dict[str, int] = dict.fromkeys(slos, 0)
    for unit in units:
        for use in unit.models:
            preempted[use.model] += use.preemptions_swap + use.preemptions_recompute
    by_model: dict[str, list[Served]] = {name: [] for name in slos}
    for one in served:
        by_model[one.model].append(one)
    rows = tuple(
        _row(name, mine, slos, duration_s, wall_s, preempted[name])
        for name, mine in by_model.items()
    )
    total = _row(ALL, served, slos, duration_s, wall_s, sum(preempted.values()))
    scaled = _scaled(served, slos) if total.attainment is not None else ()
    return Report(rows, total, scaled, tuple(units), duration_s, wall_s)


def _scaled(
    served: Sequence[Served], slos: Mapping[str, Slo | None]
) -> tuple[tuple[float, float], ...]:
    found = []
    for scale in SLO_SCALES:
        wanted = {
            name: slo and Slo(ttft_s=scale * slo.ttft_s, tpot_s=scale * slo.tpot_s)
            for name, slo in slos.items()
        }
        met = sum(meets(one, wanted[one.model]) for one in served)
        found.append((scale, met / len(served)))
    return tuple(found)


def timing(one: Served) -> Timing:
    """What the client saw of a request."""
    if one.first_s is None or one.last_s is None:
        return Timing(None, None)
    return Timing(one.first_s - one.at_s, tpot_s(one.first_s, one.last_s, one.output_tokens))


def meets(one: Served, slo: Slo | None) -> bool:
    """It was answered, within both targets where there are some."""
    return one.is_answered and (slo is None or is_met(timing(one), slo))


def _row(
    name: str,
    served: Sequence[Served],
    slos: Mapping[str, Slo | None],
    duration_s: float,
    wall_s: float,
    preemptions: int,
) -> Row:
    answered = [one for one in served if one.is_answered]
    timings = [timing(one) for one in served]
    has_targets = any(slos[one.model] for one in served)
    num_met = sum(meets(one, slos[one.model]) for one in served)
    output_tokens = sum(one.output_tokens for one in answered)
    return Row(
        model=name,
        requests=len(served),
        answered=len(answered),
        refused=sum(one.refused not in (None, Unavailable.status) for one in served),
        failed=sum(one.refused == Unavailable.status for one in served),
        retried=sum(one.is_retried for one in served),
        ttft_s=_spread([t.ttft_s for t in timings]),
        tpot_s=_spread([t.tpot_s for t in timings]),
        e2e_s=_spread([one.last_s - one.at_s for one in answered if one.last_s is not None]),
        attainment=num_met / len(served) if has_targets else None,
        goodput_rps=num_met / duration_s if has_targets else None,
        throughput_rps=len(answered) / wall_s if wall_s else 0.0,
        output_tokens_per_s=output_tokens / wall_s if wall_s else 0.0,
        prompt_tokens=sum(one.prompt_tokens for one in answered),
        output_tokens=output_tokens,
        preemptions=preemptions,
    )


def _spread(values: Sequence[float | None]) -> Spread:
    known = sorted(value for value in values if value is not None)
    p50, p90, p99 = (percentile(known, pct) for pct in PERCENTILES)
    return Spread(p50, p90, p99)


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data: what `--json` writes."""
    return asdict(report)
