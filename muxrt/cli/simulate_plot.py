"""Simulated placements as curves: attainment against rate, and against SLO scale."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from muxrt.errors import ConfigError
from muxrt.sim.report import Report


def draw(path: Path, curves: Mapping[str, Sequence[Report]]) -> None:
    """Write an SVG or PNG, as the name ends. Raises ConfigError without matplotlib."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"found {path}, expected a picture named *.svg or *.png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install muxrt[plot]") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_rate, by_scale = figure.subplots(1, 2, sharey=True)
    for name, reports in curves.items():
        known = [report for report in reports if report.total.attainment is not None]
        rates = [report.total.requests / report.duration_s for report in known]
        by_rate.plot(rates, [100 * (r.total.attainment or 0) for r in known], "o-", label=name)
        for report in known[:1]:
            scales, shares = zip(*report.scaled, strict=True)
            by_scale.plot(scales, [100 * share for share in shares], "o-", label=name)
    by_rate.set_xlabel("requests/s")
    by_rate.set_ylabel("requests within SLO, %")
    by_rate.set_ylim(0, 102)
    by_scale.set_xlabel("SLO scale, at the first speed")
    by_scale.legend(fontsize=8)
    figure.savefig(path)
