"""Tables and picture of what `validate_server.py` measured."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from server_runs import Line, Load, Record, Run, Setup, figures, replays, steps, world

SHOWN = ("throughput", "TTFT mean", "TTFT p90", "TPOT mean", "TPOT p90")
MEASURED, SIMULATED = "#3b6ea5", "#c06a2b"


def print_setup(setup: Setup, simulated: Sequence[Sequence[Run]]) -> None:
    """A row per load: measured (spread of identical runs) / simulated (error)."""
    print(f"\n{_lanes(setup)}:\n")
    print("| load | requests | " + " | ".join(f"{what}" for what in SHOWN) + " |")
    print("|---" * (2 + len(SHOWN)) + "|")
    for load, runs in zip(setup.loads, simulated, strict=True):
        lines = {line.what: line for line in figures(load, runs)}
        cells = [_cell(lines[what]) for what in SHOWN]
        row = f"| {load.load:.0%} ({load.rate_rps:.1f}/s) | {len(load.asked)} |"
        print(row + " " + " | ".join(cells) + " |")
    print("\n| step | measured, ms | spread | simulated, ms | error |\n|---|---|---|---|---|")
    for line in steps(zip(setup.loads, simulated, strict=True)):
        print(
            f"| {line.what} | {line.mean:.2f} | {line.spread:.1%} | {line.simulated:.2f} |"
            f" {line.error:+.1%} |"
        )


def _lanes(setup: Setup) -> str:
    sizes = setup.name.split("+")
    if len(sizes) > 1:
        return f"lanes of {setup.name} cores"
    return f"one lane of {sizes[0]} core{'s' * (sizes != ['1'])}"


def _cell(line: Line) -> str:
    digits = 0 if line.mean >= 100 else 1
    return (
        f"{line.mean:.{digits}f} (±{line.spread / 2:.1%}) / {line.simulated:.{digits}f}"
        f" (**{line.error:+.1%}**)"
    )


def draw(record: Record, folder: Path, path: Path) -> None:
    """TTFT, TPOT and throughput over the load, measured and simulated."""
    from matplotlib.figure import Figure

    rows = len(record.setups)
    figure = Figure(figsize=(11, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False)
    for axes, setup in zip(grid, record.setups, strict=True):
        here = world(setup, folder)
        runs = [replays(here, load.asked) for load in setup.loads]
        pairs = list(zip(setup.loads, runs, strict=True))
        _panel(axes[0], pairs, ("TTFT p50", "TTFT p90"), "ms", f"{_lanes(setup)}: TTFT")
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter("{x:g}")
        _panel(axes[1], pairs, ("TPOT p50", "TPOT p90"), "ms", "TPOT")
        _panel(axes[2], pairs, ("throughput",), "tokens/s", "throughput")
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
    )
    figure.savefig(path, dpi=130)


def _panel(
    axes: Any,
    pairs: Sequence[tuple[Load, Sequence[Run]]],
    what: Sequence[str],
    unit: str,
    title: str,
) -> None:
    loads = [100 * load.load for load, _ in pairs]
    for number, name in enumerate(what):
        lines = [next(x for x in figures(*pair) if x.what == name) for pair in pairs]
        means = [fmean(line.measured) for line in lines]
        bars = [
            [mean - min(line.measured) for mean, line in zip(means, lines, strict=True)],
            [max(line.measured) - mean for mean, line in zip(means, lines, strict=True)],
        ]
        short = name.split()[-1] if len(what) > 1 else ""
        axes.errorbar(
            loads,
            means,
            bars,
            fmt="os"[number],
            color=MEASURED,
            capsize=3,
            markersize=5,
            label=f"measured {short}".strip() + " (range of identical runs)" * (number == 0),
        )
        axes.plot(
            loads,
            [line.simulated for line in lines],
            (".-", ".--")[number],
            color=SIMULATED,
            label=f"simulated {short}".strip(),
        )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("load, % of what the server can answer")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0) if unit != "ms" else None
    axes.grid(alpha=0.25)
