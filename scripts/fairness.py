"""Does a flood of one model hurt another? Starts the demo endpoint and measures both.

    python scripts/fairness.py --out docs/benchmarks

b (`pydoc-m`) sends at its rate all the time; a (`pydoc-s`) at its rate, then at ten times that.
Calm and flooded runs alternate on one endpoint; b's time to first token is compared.
"""

import asyncio
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from bench_record import provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table

from muxrt.bench.job import Outcome, Status, Target
from muxrt.bench.run import run
from muxrt.cli.endpoint import start_endpoint
from muxrt.config.load import load
from muxrt.metrics import percentile
from muxrt.workload.spec import Lengths, Traffic, Workload

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
A, B = "pydoc-s", "pydoc-m"
RATES = {"calm": 1.0, "flooded": 10.0}  # times a's rate


@dataclass(frozen=True, slots=True)
class Figures:
    """What b saw, seconds; and how many of all requests failed."""

    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    not_served: int


def workload(times: float, rate_a: float, rate_b: float, duration_s: float, seed: int) -> Workload:
    return Workload(
        duration_s=duration_s,
        seed=seed,
        models=(Traffic(name=A, rate_rps=times * rate_a), Traffic(name=B, rate_rps=rate_b)),
        prompt=Lengths(mean_tokens=80, cv=0.5, max_tokens=300),
        output=Lengths(mean_tokens=40, cv=0.5, max_tokens=120),
    )


def figures(outcomes: list[Outcome]) -> Figures:
    b = [outcome for outcome in outcomes if outcome.model == B and outcome.status is Status.OK]
    ttft = [outcome.ttft_s for outcome in b if outcome.ttft_s is not None]
    tpot = [o.timing.tpot_s for o in b if o.timing.tpot_s is not None]
    return Figures(
        len(b),
        percentile(ttft, 50) or 0.0,
        percentile(ttft, 99) or 0.0,
        percentile(tpot, 50) or 0.0,
        sum(outcome.status is not Status.OK for outcome in outcomes),
    )


def main(
    rate_a: Annotated[float, typer.Option(help="Requests per second of a, calm.")] = 1.0,
    rate_b: Annotated[float, typer.Option(help="Requests per second of b.")] = 4.0,
    duration: Annotated[float, typer.Option(help="Seconds per run.")] = 20.0,
    rounds: Annotated[int, typer.Option(help="Runs of each kind.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON.")] = None,
) -> None:
    """Measure b's TTFT while a behaves, and while a floods."""
    log = Path(tempfile.mkdtemp(prefix="muxrt-fairness-")) / "serve.log"
    endpoint = start_endpoint(CONFIG, load(CONFIG), log)
    outcomes: dict[str, list[Outcome]] = {kind: [] for kind in RATES}
    try:
        endpoint.wait_ready(lambda said: None)
        for number in track(range(2 * rounds), "measuring"):
            kind = list(RATES)[number % 2]
            load_ = workload(RATES[kind], rate_a, rate_b, duration, seed=number // 2)
            outcomes[kind] += asyncio.run(run(Target(endpoint.url), load_, lambda _: None)).outcomes
    finally:
        endpoint.stop()
    found = {kind: figures(part) for kind, part in outcomes.items()}
    show(found)
    if out:
        report = {**provenance(), "rate_a": rate_a, "rate_b": rate_b, "rounds": rounds}
        report |= {kind: asdict(part) for kind, part in found.items()}
        out.mkdir(parents=True, exist_ok=True)
        (out / "fairness.json").write_text(json.dumps(report, indent=2) + "\n")


def show(found: dict[str, Figures]) -> None:
    table = Table("a", "b: requests", "TTFT p50 ms", "p99", "TPOT p50 ms", "not served")
    for kind, row in found.items():
        times = (row.ttft_p50_s, row.ttft_p99_s, row.tpot_p50_s)
        table.add_row(
            kind, str(row.requests), *(f"{1e3 * t:.1f}" for t in times), str(row.not_served)
        )
    Console().print(table)
    moved = found["flooded"].ttft_p99_s / found["calm"].ttft_p99_s - 1
    print(f"b's p99 TTFT moved by {100 * moved:+.0f} % under a's flood")


if __name__ == "__main__":
    typer.run(main)
