"""How far off is the forecast? Days that came, told from those before them.

    python scripts/backtest_forecast.py --out docs/benchmarks

Pinball loss (Koenker and Bassett 1978) of the quantiles 0.1, 0.5 and 0.9 of requests per bin,
summed over models, as a share of the mean requests per bin. Against three rules: yesterday's mean
for every hour, the same hour of yesterday, and yesterday's mean with quantiles from its own past
errors, as ours has them.

Synthetic: eight models over `--days`, each share a random walk from day to day (sigma 0.3), rates
by the hours of configs/workloads/diurnal.yaml; without drift; without hours. Told at midnight, when
shares step, or four hours later. Days begin on a Monday. Over `--weeks` and from the third week on,
weekends have 0.4 of the requests: of all models, of every other one, or (to see what looking for
them costs where there are none) of nobody. Azure's traces are an
hour long and say nothing of days: the next ten minutes are told from those before, where ours is
the recent mean that it falls back to, and "yesterday" is the last ten minutes.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import typer
from bench_record import FOLDER, Record
from rich.console import Console
from rich.table import Table

from muxrt.planner.forecast import at_quantile
from muxrt.workload.arrivals import arrivals
from muxrt.workload.spec import Drift, Traffic, Workload, load_workload
from muxrt.workload.trace import read_trace

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Rule = Callable[[Floats, int, float], Floats]  # counts, bins per day, quantile -> the next day

ROOT = Path(__file__).parent.parent
QUANTILES = (0.1, 0.5, 0.9)
HOUR_S, PER_DAY = 3600.0, 24
ALPHA, MODELS, NOBODY = 0.9, 8, slice(0)
FIRST_DAY = 2  # that is forecast: two are behind it
WEEK, SATURDAY, FIRST_OF_WEEKS = 7, 5, 14  # days; the first of a log of weeks that is forecast
DIP = 0.4  # of a weekday's requests come on a day of a weekend
AZURE_BIN_S, AZURE_BLOCK, MINUTES_PER_DAY = 60.0, 10, 1440
DRAWN_DAYS = 4
OURS, YESTERDAY, ALIKE = "forecast", "yesterday's mean", "forecast, all days alike"


def yesterday(counts: Floats, per_day: int, quantile: float) -> Floats:
    """Its mean, for every hour and quantile."""
    return np.full(per_day, counts[-per_day:].mean())


def same_hour(counts: Floats, per_day: int, quantile: float) -> Floats:
    """Of yesterday."""
    return counts[-per_day:].copy()


def yesterday_quantiles(counts: Floats, per_day: int, quantile: float) -> Floats:
    """Yesterday's mean, moved by the quantile of that rule's errors on the days before."""
    days = counts[len(counts) % per_day :].reshape(-1, per_day)
    means = days.mean(axis=1)
    errors = np.sqrt(days[1:]) - np.sqrt(means[:-1, None])
    off = np.quantile(errors, quantile) if errors.size else 0.0
    return np.full(per_day, max(0.0, np.sqrt(means[-1]) + off) ** 2)


def weekends(num_bins: int, first_bin: int = 0) -> Bools:
    """Of the hours from `first_bin` on, where hour 0 begins a Monday."""
    return (first_bin + np.arange(num_bins)) // PER_DAY % WEEK >= SATURDAY


def calendar(first_bin: int) -> Rule:
    """What `muxrt replan` goes by, for counts that begin in that hour of a Monday."""

    def ours(counts: Floats, per_day: int, quantile: float) -> Floats:
        known = weekends(len(counts) + per_day, first_bin)
        return at_quantile(counts, per_day, per_day, quantile, known)

    return ours


ours = calendar(0)


def days_alike(counts: Floats, per_day: int, quantile: float) -> Floats:
    """The same without a calendar."""
    return at_quantile(counts, per_day, per_day, quantile)


def ours_by_minute(counts: Floats, block: int, quantile: float) -> Floats:
    """The same within a day."""
    return at_quantile(counts, block, MINUTES_PER_DAY, quantile)


RULES: dict[str, Rule] = {
    OURS: ours,
    YESTERDAY: yesterday,
    "same hour yesterday": same_hour,
    "yesterday's mean, with quantiles": yesterday_quantiles,
    ALIKE: days_alike,
}
NO_RULES: Mapping[str, Rule] = {}


def pinball(actual: Floats, told: Floats, quantile: float) -> float:
    """The mean loss of a quantile."""
    off = actual - told
    return float(np.maximum(quantile * off, (quantile - 1) * off).mean())


def backtest(
    counts: Floats, per_day: int, first: int, own: Mapping[str, Rule] = NO_RULES
) -> dict[str, dict[str, float]]:
    """Loss by rule and quantile, over every day from `first` on; `counts` is [models, bins].

    `own` rules go before those of the same name.
    """
    num_days = counts.shape[1] // per_day
    scale = counts[:, first * per_day :].mean()
    found: dict[str, dict[str, float]] = {}
    for name, rule in {**RULES, **own}.items():
        losses = {}
        for quantile in QUANTILES:
            days = [
                pinball(
                    row[day * per_day : (day + 1) * per_day],
                    rule(row[: day * per_day], per_day, quantile),
                    quantile,
                )
                for day in range(first, num_days)
                for row in counts
            ]
            losses[f"{quantile:g}"] = float(np.mean(days)) / scale
        found[name] = {**losses, "mean": float(np.mean(list(losses.values())))}
    return found


def synthetic(
    days: int, rate_rps: float, seed: int, drift: bool, hours: bool, dips: slice = NOBODY
) -> Floats:
    """Requests per model and hour, [models, hours]; weekends of `dips` have fewer."""
    base = load_workload(ROOT / "configs" / "workloads" / "diurnal.yaml")
    assert base.diurnal is not None
    shares = np.arange(1, MODELS + 1) ** -ALPHA
    workload = Workload(
        duration_s=days * PER_DAY * HOUR_S,
        seed=seed,
        models=tuple(
            Traffic(name=f"m{i}", rate_rps=float(rate_rps * share / shares.sum()))
            for i, share in enumerate(shares)
        ),
        diurnal=msgspec.structs.replace(base.diurnal, hour_s=HOUR_S) if hours else None,
        drift=Drift(sigma=0.3) if drift else None,
    )
    counts = np.zeros((MODELS, days * PER_DAY))
    for one in arrivals(workload):
        counts[int(one.model[1:]), int(one.at_s / HOUR_S)] += 1
    dipped = np.zeros(counts.shape, np.bool_)
    dipped[dips] = weekends(counts.shape[1])
    thinned = np.random.default_rng(seed).binomial(counts.astype(int), DIP)
    return np.where(dipped, thinned, counts)


def azure(path: Path) -> Floats:
    """Requests per minute, [1, minutes]."""
    times = [row.at_s for row in read_trace(path)]
    num_bins = int(times[-1] / AZURE_BIN_S)
    return np.histogram(times, num_bins, (0, num_bins * AZURE_BIN_S))[0][None].astype(float)


def cases(
    days: int, weeks: int, rate_rps: float, seeds: int, folder: Path
) -> Iterator[dict[str, object]]:
    """Each case with its losses, by seed where there are some."""
    kinds = {
        "diurnal drift": (True, True, 0),
        "the same at 04:00": (True, True, 4),
        "diurnal": (False, True, 0),
        "drift": (True, False, 0),
    }
    for name, (drift, hours, told_at) in kinds.items():
        by_seed = [
            backtest(
                synthetic(days, rate_rps, seed, drift, hours)[:, told_at:],
                PER_DAY,
                FIRST_DAY,
                {OURS: calendar(told_at)},
            )
            for seed in range(seeds)
        ]
        yield {"case": name, "days": days, "seeds": seeds, **_across(by_seed)}
    yield from weekly_cases(weeks * WEEK, rate_rps, seeds)
    for trace in ("code", "conv"):
        path = folder / f"azure_llm_2023_{trace}.csv"
        if path.is_file():
            counts = azure(path)
            by_minute = dict.fromkeys((OURS, ALIKE), ours_by_minute)
            losses = backtest(counts, AZURE_BLOCK, 1, by_minute)
            row = {"case": f"azure {trace}", "minutes": counts.shape[1], "seeds": 1}
            yield {**row, **_across([losses])}


def weekly_cases(days: int, rate_rps: float, seeds: int) -> Iterator[dict[str, object]]:
    """Logs of some weeks, with hours and drift."""
    dips = {
        "weekends": (slice(None), 0),
        "weekends at 04:00": (slice(None), 4),
        "every other model's": (slice(0, None, 2), 0),
        "nobody's": (NOBODY, 0),
    }
    for name, (whose, told_at) in dips.items():
        by_seed = [
            backtest(
                synthetic(days, rate_rps, seed, True, True, whose)[:, told_at:],
                PER_DAY,
                FIRST_OF_WEEKS,
                {OURS: calendar(told_at)},
            )
            for seed in range(seeds)
        ]
        yield {"case": name, "days": days, "seeds": seeds, **_across(by_seed)}


def _across(by_seed: list[dict[str, dict[str, float]]]) -> dict[str, object]:
    """Means over seeds, and how much less than that of yesterday's mean ours is, seed by seed."""
    gains = [1 - one[OURS]["mean"] / one[YESTERDAY]["mean"] for one in by_seed]
    loss = {
        rule: {q: float(np.mean([one[rule][q] for one in by_seed])) for q in by_seed[0][rule]}
        for rule in RULES
    }
    return {"loss": loss, "better_than_yesterday": float(np.mean(gains)), "least": min(gains)}


def draw(path: Path, counts: Floats, rows: list[dict[str, Any]]) -> None:
    """The last days of one model as they came and as they were told, and all losses."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install 'muxrt[plot]'")
        return
    figure = Figure(figsize=(11, 4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    row, num_days = counts[1], counts.shape[1] // PER_DAY
    hours = np.arange((num_days - DRAWN_DAYS) * PER_DAY, num_days * PER_DAY)
    told = {
        quantile: np.concatenate(
            [
                ours(row[: day * PER_DAY], PER_DAY, quantile)
                for day in range(num_days - DRAWN_DAYS, num_days)
            ]
        )
        for quantile in QUANTILES
    }
    left.fill_between(hours, told[0.1], told[0.9], color="#d6e4f2", label="0.1 to 0.9", step="mid")
    left.step(
        hours, told[0.5], color="#3f78b0", label="forecast, each day at midnight", where="mid"
    )
    left.plot(hours, row[hours], ".", color="#24292f", markersize=4, label="came")
    left.set_title("one of eight models, diurnal drift", loc="left", fontsize=10)
    left.set(xlabel="hour", ylabel="requests per hour", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    colours = ("#3f78b0", "#c01c28", "#e0a458", "#8a939b", "#57a773")
    for index, (rule, colour) in enumerate(zip(RULES, colours, strict=True)):
        places = np.arange(len(rows)) + 0.16 * (index - 2)
        right.bar(places, [r["loss"][rule]["mean"] for r in rows], 0.16, color=colour, label=rule)
    right.set_xticks(
        range(len(rows)), [str(r["case"]) for r in rows], fontsize=8, rotation=20, ha="right"
    )
    right.set_title("pinball loss / mean requests", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder of forecast.json.")] = FOLDER,
    days: int = 14,
    weeks: Annotated[int, typer.Option(min=3, help="Of the logs with weekends.")] = 4,
    rate_rps: Annotated[float, typer.Option(help="Of all models together.")] = 0.5,
    seeds: int = 5,
    azure_folder: Annotated[Path, typer.Option(help="Of the whole traces.")] = (
        ROOT.parent / "shared" / "data" / "azure"
    ),
) -> None:
    """Back-test the forecast and write forecast.json."""
    about = {"days": days, "weeks": weeks, "rate_rps": rate_rps, "seeds": seeds}
    record = Record(out / "forecast.json", about)
    table = Table("case", *RULES, "ours less than yesterday's mean")
    for row in cases(days, weeks, rate_rps, seeds, azure_folder):
        record.add("cases", row)
        loss = row["loss"]
        assert isinstance(loss, dict)
        gain = f"{row['better_than_yesterday']:.1%} (least {row['least']:.1%})"
        table.add_row(str(row["case"]), *(f"{loss[rule]['mean']:.4f}" for rule in RULES), gain)
    Console().print(table)
    draw(out / "forecast.png", synthetic(days, rate_rps, 0, True, True), record.data["cases"])


if __name__ == "__main__":
    typer.run(main)
