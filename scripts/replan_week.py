"""A week of drifting popularity, simulated: the first day's placement against daily replanning.

    python scripts/replan_week.py --out docs/benchmarks

Six LLaMA-7B on eight L4 (one GPU each, as they have no links to speak of) with long answers, hours
by configs/workloads/diurnal.yaml, popularity a random walk from day to day. The requests of all
days are written to a traffic log; every night at four `muxrt replan`'s own code reads what came
until then and decides. Each day is then simulated with what really came in it, for both placements;
what a move costs at most is subtracted.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from bench_record import FOLDER, Record
from rich.console import Console

from muxrt.cli.plan_input import load_problem
from muxrt.cli.plan_strategy import planned
from muxrt.cli.replan_input import BANDS, Band, Outlook, Words, look_out
from muxrt.cli.replan_run import Judge, Replan, replan, window_s
from muxrt.config.load import dump
from muxrt.config.placement import Slo, UnitSpec
from muxrt.planner.moving import Terms
from muxrt.server.traffic_files import Entry, add_history, count_asked
from muxrt.workload.arrivals import arrivals
from muxrt.workload.spec import Drift, Lengths, PowerLaw, Traffic, Workload, load_workload

Units = tuple[UnitSpec, ...]

ROOT = Path(__file__).parent.parent
DAY_S, HOUR_S, HOURS = 86400.0, 3600.0, 24
AT_H = 4  # of the day, when it is replanned: little is asked then
START_S = 20_000 * DAY_S  # some midnight
MODELS = tuple(f"m{number}" for number in range(6))
SLO = Slo(ttft_s=3.0, tpot_s=0.15)
PLAN = """\
cluster: {{nodes: [{{gpu: l4-24g, gpus: 8}}]}}
models: [{}]
largest_tp: 1
""".format(", ".join(f"{{name: {name}, preset: llama2-7b}}" for name in MODELS))


def workload(days: int, rate_rps: float, sigma: float, seed: int) -> Workload:
    """What comes."""
    diurnal = load_workload(ROOT / "configs" / "workloads" / "diurnal.yaml").diurnal
    assert diurnal is not None
    return Workload(
        duration_s=days * DAY_S,
        seed=seed,
        models=tuple(Traffic(name=name) for name in MODELS),
        power_law=PowerLaw(alpha=0.9, rate_rps=rate_rps),
        diurnal=msgspec.structs.replace(diurnal, hour_s=HOUR_S),
        drift=Drift(sigma=sigma),
        prompt=Lengths(mean_tokens=250, cv=0.8, max_tokens=1500),
        output=Lengths(mean_tokens=700, cv=0.6, max_tokens=2000),
        slo=SLO,
    )


def write_log(folder: Path, given: Workload) -> int:
    """All of it, as if it had been answered; how many requests."""
    entries = (
        Entry(START_S + one.at_s, one.model, one.prompt_tokens, one.output_tokens,
              None, None, 200, None, None, 1)
        for one in arrivals(given)
    )  # fmt: skip
    return add_history(folder, entries)


def first_placement(plan: Path, given: Workload, folder: Path) -> str:
    """The file that `muxrt plan` writes for the first day."""
    file = folder / "workload.yaml"
    day = msgspec.structs.replace(given, duration_s=DAY_S, drift=None)
    data = msgspec.to_builtins(day)
    file.write_bytes(msgspec.yaml.encode({k: v for k, v in data.items() if v}))
    return dump(planned(load_problem(plan, file, None, None), "auto"))


def came(log: Path, now_s: float) -> tuple[Band, ...]:
    """What the next day really brought, in bands of hours."""
    found = count_asked(log, now_s + DAY_S, HOUR_S)
    assert found is not None
    rates = np.array(
        [
            [found.sequences.get((name, back), 0) / HOUR_S for back in range(HOURS)]
            for name in MODELS
        ]
    )
    order = np.argsort(-rates.sum(axis=0), kind="stable")
    return tuple(
        Band(len(part), {name: float(rates[i, part].mean()) for i, name in enumerate(MODELS)})
        for part in np.array_split(order, BANDS)
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder of replan.json.")] = FOLDER,
    days: int = 10,
    rate_rps: Annotated[float, typer.Option(help="Of all models, before the hour's factor.")] = 1.2,
    sigma: Annotated[float, typer.Option(help="Of the random walk, per day.")] = 0.4,
    quantile: float = 0.5,
    seed: int = 0,
    first_day: Annotated[int, typer.Option(help="That is replanned for.")] = 2,
) -> None:
    """Go through the days and write replan.json."""
    settings = {"days": days, "rate_rps": rate_rps, "sigma": sigma, "quantile": quantile}
    record = Record(out / "replan.json", {**settings, "seed": seed, "gpus": "8 l4-24g"})
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = workload(days, rate_rps, sigma, seed)
        record.put("requests", write_log(folder / "log", given))
        plan, served = folder / "plan.yaml", folder / "serve.yaml"
        plan.write_text(PLAN)
        served.write_text(first_placement(plan, given, folder))
        static: Units | None = None
        for day in range(first_day, days - 1):
            now_s = START_S + day * DAY_S + AT_H * HOUR_S
            words = Words(served, folder / "log", plan, now_s, 24.0, quantile, 24.0, 6.0, SLO)
            outlook = look_out(words)
            old = outlook.served.config.units
            static = static or old
            found = replan(outlook, "auto", Terms(window_s(outlook)))
            units = found.best.units if found.best.decision.is_worth else old
            bands = came(folder / "log", now_s)
            real = replace(outlook, bands=bands, scenarios=(bands, bands))  # from two seeds
            row = row_of(day, outlook, real, static, units, found)
            record.add("days", row)
            console.print(row)
            if found.best.decision.is_worth:
                served.write_text(dump(found.config))
    rows = record.data["days"]
    gain = fmean(r["replanned_rps"] for r in rows) / fmean(r["static_rps"] for r in rows)
    record.put("gain", gain)
    console.print(f"{gain:.3f} times the goodput of the first day's placement")
    draw(out / "replan.png", rows)


def row_of(
    day: int, outlook: Outlook, real: Outlook, static: Units, units: Units, found: Replan
) -> dict[str, Any]:
    """A day's figures."""
    decision, cost = found.best.decision, found.best.cost
    lost_rps = cost.lost_requests / DAY_S if decision.is_worth else 0.0
    judge = Judge(real)
    stays, moved = judge(static), judge(units)
    return {
        "day": day,
        "offered_rps": total(real.bands),
        "forecast_rps": total(outlook.bands),
        "static_rps": fmean(stays.goodput_rps),
        "replanned_rps": fmean(moved.goodput_rps) - lost_rps,
        "is_worth": decision.is_worth,
        "reason": decision.reason,
        "loaded_bytes": cost.total_bytes if decision.is_worth else 0,
    }


def total(bands: Sequence[Band]) -> float:
    """Requests/s over all hours."""
    return sum(band.hours * band.total_rps for band in bands) / sum(band.hours for band in bands)


def draw(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Goodput by day."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install 'muxrt[plot]'")
        return
    figure = Figure(figsize=(8, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    days = [row["day"] for row in rows]
    axes.plot(days, [row["offered_rps"] for row in rows], color="#8a939b", label="asked")
    axes.plot(days, [r["replanned_rps"] for r in rows], "o-", color="#3f78b0", label="replanned")
    axes.plot(days, [r["static_rps"] for r in rows], "o-", color="#c01c28", label="first placement")
    for row in rows:
        if row["is_worth"]:
            axes.axvline(row["day"], color="#d0d7de", zorder=0)
    axes.set(
        xlabel="day (lines: a change was made)", ylabel="requests/s within SLO", ylim=(0, None)
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
