"""The figures of a run, per model and in all."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from muxrt.bench.job import Outcome, Status
from muxrt.bench.run import Run
from muxrt.bench.watch import Blocks, ModelBlocks
from muxrt.config.placement import Slo
from muxrt.metrics import is_met, percentile

ALL = "all"


@dataclass(frozen=True, slots=True)
class Row:
    """One model's figures (or all models'); times in seconds, None where nothing was measured."""

    model: str
    requests: int
    failed: int
    refused: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    attainment: float | None  # share of ALL requests that met both targets; None without an SLO
    goodput_rps: float | None
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    slo: Slo | None = None
    blocks: ModelBlocks | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What `muxrt bench` prints and writes."""

    rows: list[Row]
    total: Row
    wall_s: float  # from the first request's due time to the last answer's end
    errors: dict[str, int]  # most frequent first
    client_lag_p99_s: float  # how late this client sent: the figures include it
    num_not_sent: int = 0


def make_report(run: Run, slos: Mapping[str, Slo | None] | None = None) -> Report:
    """Figures of `run`; `slos` by model, where None the workload's own."""
    if slos is None:
        slos = {model.name: model.slo or run.workload.slo for model in run.workload.models}
    ends = [outcome.due_s + outcome.e2e_s for outcome in run.outcomes]
    starts = [outcome.due_s for outcome in run.outcomes]
    wall_s = max(ends, default=0.0) - min(starts, default=0.0)
    rows = [
        _row(name, [o for o in run.outcomes if o.model == name], slos, wall_s, run)
        for name in (model.name for model in run.workload.models)
    ]
    return Report(
        rows,
        _row(ALL, run.outcomes, slos, wall_s, run),
        wall_s,
        dict(Counter(o.error for o in run.outcomes if o.error).most_common()),
        percentile([o.lag_s for o in run.outcomes], 99) or 0.0,
        run.num_planned - len(run.outcomes),
    )


def _row(
    name: str,
    outcomes: list[Outcome],
    slos: Mapping[str, Slo | None],
    wall_s: float,
    run: Run,
) -> Row:
    ttfts = _known(outcome.ttft_s for outcome in outcomes if outcome.status is Status.OK)
    tpots = _known(outcome.timing.tpot_s for outcome in outcomes if outcome.status is Status.OK)
    met = _num_met(outcomes, slos)
    statuses = Counter(outcome.status for outcome in outcomes)
    output_tokens = sum(outcome.output_tokens for outcome in outcomes)
    return Row(
        model=name,
        requests=len(outcomes),
        failed=statuses[Status.FAILED],
        refused=statuses[Status.REFUSED],
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        tpot_p50_s=percentile(tpots, 50),
        tpot_p99_s=percentile(tpots, 99),
        attainment=met / len(outcomes) if met is not None and outcomes else None,
        goodput_rps=met / wall_s if met is not None and wall_s else None,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / wall_s if wall_s else 0.0,
        slo=slos.get(name),
        blocks=_blocks(name, run.blocks),
    )


def _blocks(name: str, blocks: Blocks) -> ModelBlocks | None:
    if name == ALL and blocks.models:
        return blocks.total
    return blocks.models.get(name)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _num_met(outcomes: list[Outcome], slos: Mapping[str, Slo | None]) -> int | None:
    """Requests that met both targets of their model; None where no model has targets."""
    if not any(slos.get(outcome.model) for outcome in outcomes):
        return None
    return sum(_met(outcome, slos.get(outcome.model)) for outcome in outcomes)


def _met(outcome: Outcome, slo: Slo | None) -> bool:
    """An answered request within its targets, if its model has some."""
    return outcome.status is Status.OK and (slo is None or is_met(outcome.timing, slo))


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data: what `--json` writes."""
    data = asdict(report)
    for row in (*data["rows"], data["total"]):
        slo = row["slo"]
        row["slo"] = slo and {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
    return data
