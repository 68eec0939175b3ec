"""Simulated placements as curves: attainment against rate and SLO scale, and use over time."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from muxrt.errors import ConfigError
from muxrt.sim.interval import Interval, interval
from muxrt.sim.report import Report
from muxrt.sim.use import UnitUse

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One per seed.
Reports = Sequence[Report]

MOST_ROWS = 4  # of units with their use over time
COLOURS = 10  # of matplotlib's cycle; more models than that are one band


def check_plot(path: Path) -> None:
    """Raise ConfigError for a picture that cannot be drawn or written."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"found {path}, expected a picture named *.svg or *.png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: found no folder {path.parent}, expected it to exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install muxrt[plot]") from None


def draw(path: Path, speeds: Sequence[float], curves: Mapping[str, Sequence[Reports]]) -> None:
    """Write an SVG or PNG, as the name ends.

    On top attainment, with 95 % intervals over seeds. Below, the first seed's use over time at the
    speed nearest to 1: of the busiest units of one placement, or of all units of each of several.
    """
    from matplotlib.figure import Figure

    usual = min(range(len(speeds)), key=lambda index: abs(speeds[index] - 1))
    shown = {name: by_speed[usual][0] for name, by_speed in curves.items()}
    ((name, report), *others) = shown.items()
    units = [] if others else _busiest(report.units)
    num_rows = 1 + (len(units) or 1)
    figure = Figure(figsize=(11, 3.6 + 2.4 * (num_rows - 1)), layout="constrained")
    axes = figure.subplots(num_rows, 2, squeeze=False, height_ratios=[1.5] + [1.0] * (num_rows - 1))
    _attainment(axes[0], speeds, curves, usual)
    if others:
        _compare_use(axes[1], shown)
    for pair, unit in zip(axes[1:], units, strict=False):
        _kv(pair[0], unit)
        _lanes(pair[1], unit)
    for axis in axes[-1]:
        axis.set_xlabel(f"seconds since the start, {_rates(speeds[usual])}")
    below = [axis for pair in axes[1:] for axis in pair]
    end_s = max(axis.get_xlim()[1] for axis in below)
    for axis in below:
        axis.set_xlim(0, end_s)
    title = name if not others else f"{len(shown)} placements, the same requests"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _rates(speed: float) -> str:
    return "at the rates given" if speed == 1 else f"at {speed:g} times the rates given"


def _attainment(
    axes: Sequence["Axes"],
    speeds: Sequence[float],
    curves: Mapping[str, Sequence[Reports]],
    usual: int,
) -> None:
    by_rate, by_scale = axes
    for name, by_speed in curves.items():
        points = []
        for reports in by_speed:
            shares = interval(r.total.attainment for r in reports)
            rate = interval(r.total.requests / r.duration_s for r in reports)
            if shares is not None and rate is not None:
                points.append((rate.mean, shares))
        _curve(by_rate, points, name)
        scaled = zip(*(report.scaled for report in by_speed[usual]), strict=True)
        found = [(many[0][0], interval(share for _, share in many)) for many in scaled]
        _curve(by_scale, [(x, share) for x, share in found if share is not None], name)
    by_rate.set_xlabel("requests/s")
    by_scale.set_xlabel(f"SLO scale, {_rates(speeds[usual])}")
    for axis in axes:
        axis.set_ylabel("requests within SLO, %")
        axis.set_ylim(0, 103)
        axis.grid(alpha=0.3)
    by_rate.set_xlim(0, None)
    if len(curves) > 1:
        by_scale.legend(fontsize=8, loc="best")


def _curve(axis: "Axes", points: Sequence[tuple[float, Interval]], name: str) -> None:
    if not points:
        return  # nobody has targets
    axis.errorbar(
        [x for x, _ in points],
        [100 * share.mean for _, share in points],
        yerr=list(zip(*(error_bar(share) for _, share in points), strict=True)),
        fmt="o-",
        markersize=4,
        capsize=3,
        label=name,
    )


def error_bar(share: Interval) -> tuple[float, float]:
    """How far a bar goes down and up, percent: no share is outside of 0 to 100 %."""
    half = share.half or 0.0
    return 100 * min(half, share.mean), 100 * min(half, 1 - share.mean)


def _busiest(units: Sequence[UnitUse]) -> list[UnitUse]:
    """A few, those that died first of all; in the order of the placement."""
    chosen = sorted(units, key=lambda unit: (-unit.deaths, -unit.kv_mean))[:MOST_ROWS]
    return [unit for unit in units if unit in chosen]


def _times(unit: UnitUse) -> list[float]:
    """The middle of each interval."""
    over_time = unit.over_time
    length = max((len(lane) for lane in over_time.lanes), default=0)
    return [(index + 0.5) * over_time.interval_s for index in range(length)]


def _kv(axis: "Axes", unit: UnitUse) -> None:
    kv = dict(unit.over_time.kv)
    largest = sorted(kv, key=lambda model: -sum(kv[model]))[: COLOURS - 1]
    bands = {model: kv[model] for model in kv if model in largest}
    rest = [values for model, values in kv.items() if model not in largest]
    if rest:
        bands[f"{len(rest)} others"] = tuple(map(sum, zip(*rest, strict=True)))
    shares = [[100 * value for value in values] for values in bands.values()]
    axis.stackplot(_times(unit), *shares, labels=list(bands), alpha=0.8)
    axis.set_ylabel(f"{unit.unit}\nKV in use, %")
    _legend_above(axis)


def _lanes(axis: "Axes", unit: UnitUse) -> None:
    for number, busy in enumerate(unit.over_time.lanes):
        axis.plot(_times(unit), [100 * share for share in busy], label=f"lane {number}", lw=1.2)
    axis.set_ylabel("lane busy, %")
    axis.set_ylim(0, 103)
    if len(unit.over_time.lanes) > 1:
        _legend_above(axis)


def _legend_above(axis: "Axes") -> None:
    """Where no curve is."""
    axis.legend(
        fontsize=7,
        ncols=5,
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1.0, 0.98),
        borderaxespad=0.2,
    )


def _compare_use(axes: Sequence["Axes"], shown: Mapping[str, Report]) -> None:
    """KV and lanes of all units of each placement, as means."""
    for name, report in shown.items():
        step_s = max(unit.over_time.interval_s for unit in report.units)
        end_s = max((_times(unit)[-1] for unit in report.units if _times(unit)), default=0.0)
        times = [(index + 0.5) * step_s for index in range(ceil(end_s / step_s))]
        kv = [
            (unit, [sum(shares) for shares in zip(*unit.over_time.kv.values(), strict=True)])
            for unit in report.units
        ]
        lanes = [(unit, lane) for unit in report.units for lane in unit.over_time.lanes]
        axes[0].plot(times, [100 * _mean_at(kv, at_s) for at_s in times], label=name)
        axes[1].plot(times, [100 * _mean_at(lanes, at_s) for at_s in times], label=name)
    axes[0].set_ylabel("KV in use,\nmean of units, %")
    axes[1].set_ylabel("lanes busy,\nmean of all, %")
    for axis in axes:
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)


def _mean_at(series: Sequence[tuple[UnitUse, Sequence[float]]], at_s: float) -> float:
    """Units whose requests have all ended have nothing."""
    total = 0.0
    for unit, values in series:
        index = int(at_s / unit.over_time.interval_s)
        total += values[index] if index < len(values) else 0.0
    return total / len(series)
