"""The figures of docs/validation.md: what `validate_muxserve.py` wrote, as tables and a picture.

    python scripts/plot_validation.py docs/benchmarks/validation_muxserve.csv --out picture.png

The picture needs matplotlib, which is an extra.
"""

import argparse
import csv
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

SYSTEMS = ("spatial", "temporal", "muxserve")
NEAR, CLEAR = 0.2, 0.05  # of a model's throughput; of a difference between systems that counts
COLOURS = dict(zip(SYSTEMS, ("#3b6ea5", "#c06a2b", "#3f8f5f"), strict=True))


@dataclass(frozen=True)
class Pair:
    """Requests/s."""

    measured: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


@dataclass(frozen=True)
class Case:
    """One workload under one system."""

    alpha: str
    scale: str
    system: str
    models: tuple[Pair, ...]

    @property
    def total(self) -> Pair:
        return Pair(sum(m.measured for m in self.models), sum(m.simulated for m in self.models))

    @property
    def near(self) -> int:
        return sum(abs(model.error) <= NEAR for model in self.models)


def read(path: Path) -> list[Case]:
    found: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            pair = Pair(float(row["measured_rps"]), float(row["simulated_rps"]))
            found[row["alpha"], row["scale"], row["system"]].append(pair)
    return [Case(*key, tuple(pairs)) for key, pairs in sorted(found.items())]


def print_totals(cases: list[Case]) -> None:
    """A line per workload: measured / simulated requests/s of each system."""
    print("| alpha | top rate | " + " | ".join(SYSTEMS) + " |")
    print("|---" * (2 + len(SYSTEMS)) + "|")
    workloads: dict[tuple[str, str], dict[str, Case]] = defaultdict(dict)
    for case in cases:
        workloads[case.alpha, case.scale][case.system] = case
    for (alpha, scale), by_system in workloads.items():
        cells = [_cell(by_system.get(system)) for system in SYSTEMS]
        print(f"| {alpha} | {40 * float(scale):.0f} | " + " | ".join(cells) + " |")


def _cell(case: Case | None) -> str:
    if case is None:
        return "-"
    total = case.total
    return f"{total.measured:.1f} / {total.simulated:.1f} ({total.error:+.1%})"


def print_summary(cases: list[Case]) -> None:
    """Errors by system, and whether differences between systems come out right."""
    print("\n| system | cases | total: median error | worst | models within 20 % |")
    print("|---|---|---|---|---|")
    groups = {system: [c for c in cases if c.system == system] for system in SYSTEMS}
    for name, some in (*groups.items(), ("all", cases)):
        if not some:
            continue
        errors = sorted((abs(case.total.error), case.total.error) for case in some)
        models = sum(len(case.models) for case in some)
        near = sum(case.near for case in some)
        middle = median(error for error, _ in errors)
        print(
            f"| {name} | {len(some)} | {middle:.1%} | {errors[-1][1]:+.1%} |"
            f" {near} of {models} ({near / models:.0%}) |"
        )
    right, clear = _rankings(cases)
    print(f"\nOf {clear} pairs of systems that differ by more than 5 %, {right} are ranked right.")


def _rankings(cases: list[Case]) -> tuple[int, int]:
    right = clear = 0
    for one, other in combinations(cases, 2):
        if (one.alpha, one.scale) != (other.alpha, other.scale):
            continue
        ratio = one.total.measured / other.total.measured
        if max(ratio, 1 / ratio) > 1 + CLEAR:
            clear += 1
            right += (one.total.simulated > other.total.simulated) == (ratio > 1)
    return right, clear


def draw(cases: list[Case], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for system in SYSTEMS:
        some = [case for case in cases if case.system == system]
        totals = [case.total for case in some]
        models = [model for case in some for model in case.models]
        for axes, pairs, size in ((left, totals, 26), (right, models, 7)):
            xs, ys = [p.measured for p in pairs], [p.simulated for p in pairs]
            axes.scatter(xs, ys, s=size, color=COLOURS[system], label=system, alpha=0.8)
    for axes, title, near in ((left, "all models together", 0.1), (right, "each model", NEAR)):
        low, high = axes.get_xlim()
        low = max(low, 0.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for factor, style in ((1, "-"), (1 + near, ":"), (1 - near, ":")):
            ends = [low, high]
            axes.plot(ends, [factor * x for x in ends], style, color="#9aa3ad", linewidth=1)
        axes.set_title(f"{title}; dotted: {near:.0%} off", fontsize=10)
        axes.set_xlabel("requests/s measured on 32 A100 (MuxServe)")
        axes.set_ylabel("requests/s simulated")
    left.legend(fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="the picture")
    options = parser.parse_args()
    cases = read(options.csv)
    print_totals(cases)
    print_summary(cases)
    if options.out is not None:
        draw(cases, options.out)


if __name__ == "__main__":
    main()
