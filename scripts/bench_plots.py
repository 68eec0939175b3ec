"""The figures of docs/benchmarks as pictures. Needs matplotlib, which is an extra."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from bench_offline import MUXRT as OFFLINE_MUXRT
from bench_rates import WANTED, Point, best_per_rate
from bench_record import read
from bench_trio import MUXRT, VLLM, points_of

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {MUXRT: "#1f6feb", VLLM: "#d1732a"}
NAMES = {MUXRT: "muxrt, one endpoint", VLLM: "vLLM, a server per model"}
MODE_COLOURS = {
    "adbs": "#1f6feb",
    "spatial": "#8fa3b8",
    "moved": "#c9d3de",
    "temporal": "#d9b44a",
}
BAR_COLOURS = ("#1f6feb", "#7fb2f5", "#8fa3b8", "#d9b44a")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": "#e3e6ea",
    "font.size": 10,
    "legend.frameon": False,
    "figure.dpi": 150,
}


def draw_trio(data: dict[str, Any], out: Path) -> None:
    """Goodput and attainment against offered rate; thin lines are the single settings."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
        for side in (VLLM, MUXRT):
            points = points_of(data, side)
            for axes, value in ((left, _goodput), (right, _attainment)):
                _lines(axes, side, points, value)
        left.set(title="Requests/s within their SLO", xlabel="offered, requests/s")
        right.set(title="Share of requests within their SLO", xlabel="offered, requests/s")
        right.axhline(WANTED, color="#57606a", linewidth=1, linestyle=(0, (4, 3)))
        right.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        for axes in (left, right):
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
        top = max(left.get_xlim()[1], left.get_ylim()[1])
        left.plot([0, top], [0, top], color="#c4c9d0", linewidth=1, zorder=0, scalex=False)
        left.set_ylim(top=1.15 * _most(data))
        right.legend(loc="upper right", bbox_to_anchor=(1, 0.86))  # below the line of 90 %
        slo = data["settings"]["slo"]
        said = f"SLO: TTFT {slo['ttft_s']:g} s and TPOT {slo['tpot_s']:g} s"
        _close(figure, data, f"{said}  ·  thin: every setting, thick: the best", out)


def _goodput(point: Point) -> float:
    return point.goodput_rps


def _attainment(point: Point) -> float:
    return point.attainment


def _most(data: dict[str, Any]) -> float:
    return max(float(row["goodput_rps"]) for row in data["points"]) or 1.0


def _lines(axes: Any, side: str, points: Sequence[Point], value: Callable[[Point], float]) -> None:
    colour = COLOURS[side]
    for setting in dict.fromkeys(point.setting for point in points):
        own = sorted((p.offered_rps, value(p)) for p in points if p.setting == setting)
        axes.plot(*zip(*own, strict=True), color=colour, linewidth=0.8, alpha=0.45)
    best = [(point.offered_rps, value(point)) for point in best_per_rate(points)]
    if best:
        line = {"color": colour, "linewidth": 2.2, "marker": "o", "markersize": 5}
        axes.plot(*zip(*best, strict=True), label=NAMES[side], **line)


def draw_offline(data: dict[str, Any], out: Path) -> None:
    """muxrt over vLLM, case by case; a group of bars per model."""
    rows = [row for row in data["summary"] if "ratio" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
        groups = {
            model: [_of(rows, "ratio", model=model, case=case) for case in cases]
            for model in models
        }
        _bars(axes, groups, dict(zip(models, BAR_COLOURS, strict=False)), "{:.2f}")
        axes.axhline(1.0, color="#57606a", linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
        axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
        axes.set(title=f"Tokens/s of {OFFLINE_MUXRT} over vLLM", ylabel="times")
        axes.legend(ncols=len(models), loc="upper right")
        _close(figure, data, "float32 weights and KV on both sides; 1 = as fast", out)


def draw_sharing(data: dict[str, Any], out: Path) -> None:
    """The best goodput of each way to share, cell by cell."""
    rows = data["summary"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
        modes = [mode for mode in MODE_COLOURS if all(mode in r["best_goodput_rps"] for r in rows)]
        groups = {mode: [row["best_goodput_rps"][mode] for row in rows] for mode in modes}
        _bars(axes, groups, MODE_COLOURS, "{:.1f}")
        axes.set_xticks(range(len(rows)), [row["cell"].replace(", ", "\n") for row in rows])
        axes.set(title="Most requests/s within their SLO", ylabel="requests/s")
        axes.legend(ncols=len(modes), loc="upper right")
        share = f"{data['settings']['arena']:.0%}"
        _close(figure, data, f"the same engine and cores; memory for {share} of the peak", out)


def _of(rows: Sequence[dict[str, Any]], key: str, **where: str) -> float:
    found = [row[key] for row in rows if all(row[k] == v for k, v in where.items())]
    return float(found[0]) if found else 0.0


def _bars(axes: Any, groups: dict[str, list[float]], colours: dict[str, str], label: str) -> None:
    """Bars side by side, each with its figure; room above them for a legend."""
    width = 0.8 / len(groups)
    for number, (name, heights) in enumerate(groups.items()):
        offset = (number - (len(groups) - 1) / 2) * width
        places = [place + offset for place in range(len(heights))]
        bars = axes.bar(places, heights, 0.92 * width, label=name, color=colours[name])
        axes.bar_label(bars, [label.format(h) for h in heights], padding=2, fontsize=8)
    axes.set_ylim(top=1.22 * max(height for heights in groups.values() for height in heights))
    axes.tick_params(axis="x", length=0)


def _close(figure: Any, data: dict[str, Any], said: str, out: Path) -> None:
    """The line of small print, and the file."""
    small = f"{said}  ·  {data['machine']}  ·  {data['date']}  ·  {data['commit']}"
    figure.supxlabel(small, fontsize=8, color="#57606a", x=0.01, ha="left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    plt.close(figure)


def draw_planner_cases(data: dict[str, Any], out: Path) -> None:
    """Goodput of the strategies on MuxServe's cases, of what is offered."""
    measured = [row for row in data["cases"] if row["control_s"] > 0]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
        names = ("spatial", "muxserve", "auto")
        colours = dict(zip(names, ("#8fa3b8", "#d9b44a", "#1f6feb"), strict=True))
        groups = {
            name: [100 * row[name]["goodput_rps"] / row["offered_rps"] for row in measured]
            for name in names
        }
        _bars(axes, groups, colours, "{:.0f}")
        labels = [f"{row['alpha']:g}\n{row['top_rps']:g}/s" for row in measured]
        axes.set_xticks(range(len(measured)), labels)
        axes.set_yticks(range(0, 101, 20))
        axes.set(title="Requests within their SLO: 19 LLaMAs on 32 A100", ylabel="% of all")
        axes.set_xlabel("popularity's alpha, requests/s of the most popular model")
        axes.legend(ncols=len(names), loc="upper right")
        _close(figure, data, "MuxServe's profile and control cost; queueing estimator", out)


def draw_planner_scale(data: dict[str, Any], out: Path) -> None:
    """Time and memory of `auto` by size."""
    sizes = data["sizes"]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        gpus = [row["gpus"] for row in sizes]
        for axes, key, what in (
            (left, "seconds", "seconds"),
            (right, "peak_mb", "peak memory, MB"),
        ):
            heights = [row[key] for row in sizes]
            axes.plot(gpus, heights, "o-", color="#1f6feb")
            for x, height in zip(gpus, heights, strict=True):
                where, near = (-3, 6), {"textcoords": "offset points", "ha": "right"}
                axes.annotate(f"{height:.3g}", (x, height), where, **near)
            axes.set_xscale("log")
            axes.set_xlim(gpus[0] / 2.5, gpus[-1] * 1.3)
            axes.set_xticks(gpus, [f"{row['models']}\n{row['gpus']}" for row in sizes])
            axes.minorticks_off()
            axes.set_ylim(0, 1.2 * max(heights))
            axes.set(title=what, xlabel="models (above) on GPUs (below)")
        _close(figure, data, "one placement by `auto`, one core", out)


POLICY_COLOURS = {
    "adbs": "#8fa3b8",
    "fcfs": "#d9b44a",
    "round-robin": "#7fb2f5",
    "slo": "#1f6feb",
}


def draw_policies(data: dict[str, Any], out: Path) -> None:
    """Requests in time, of all, case by case."""
    rows, cases = data["runs"], data["settings"]["cases"]
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["case"], row["policy"]), []).append(100 * row["attainment"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 8.5), layout="constrained")
        for number, (policy, colour) in enumerate(POLICY_COLOURS.items()):
            places = [place + 0.2 * (number - 1.5) for place in range(len(cases))]
            means = [fmean(found.get((case, policy), [0.0])) for case in cases]
            axes.barh(places, means, 0.18, label=policy, color=colour)
        axes.set_yticks(
            range(len(cases)), [f"{n} *" if about["tuned"] else n for n, about in cases.items()]
        )
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(title="Requests within their SLO", xlabel="% of all", xlim=(0, 100))
        axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.03))
        _close(figure, data, "simulated; * looked at while constants were chosen", out)


def draw_cache(data: dict[str, Any], out: Path) -> None:
    """KV blocks that each model holds against the rate; thin: dealt by what requests fill."""
    rows = data["runs"]
    models, policies = list(rows[0]["cache"]), list(dict.fromkeys(row["policy"] for row in rows))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(policies), figsize=(10.5, 3.4), sharey=True,
                                    layout="constrained")  # fmt: skip
        for axes, policy in zip(grid, policies, strict=True):
            mine = sorted((r for r in rows if r["policy"] == policy), key=_offered)
            rates = [row["offered_rps"] for row in mine]
            for model, colour in zip(models, BAR_COLOURS, strict=False):
                used = [100 * row["cache"][model] for row in mine]
                axes.plot(rates, used, "o-", color=colour, label=model, markersize=4)
                needed = [100 * row["needed"][model] for row in mine]
                axes.plot(rates, needed, color=colour, linewidth=1, linestyle=(0, (2, 2)))
            axes.set(title=policy, xlabel="requests/s")
        grid[0].set_ylim(bottom=0)
        grid[0].set_ylabel("KV blocks, % of the unit's")
        grid[-1].legend()
        _close(figure, data, "dashed: the same, dealt by what each model's requests fill", out)


def _offered(row: dict[str, Any]) -> float:
    return float(row["offered_rps"])


DRAW: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "trio_vs_vllm": draw_trio,
    "offline_vs_vllm": draw_offline,
    "sharing": draw_sharing,
    "planner_cases": draw_planner_cases,
    "planner_scale": draw_planner_scale,
    "policies": draw_policies,
    "policies_cache": draw_cache,
}


def draw_file(name: str, folder: Path) -> Path:
    """Draw the JSON of that name in `folder` beside it."""
    out = folder / f"{name}.png"
    DRAW[name](read(folder / f"{name}.json"), out)
    return out
