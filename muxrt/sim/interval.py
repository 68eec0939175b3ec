"""Figures of the same placement over several seeds: means, and how far off they may be."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from muxrt.sim.report import Report

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of `num` independent values, which is `half` too large or too small at most.

    That holds for 95 % of such intervals (Student's t), if means of so many values are normally
    distributed. One value says nothing of its error: `half` is None.
    """

    mean: float
    half: float | None
    num: int


def interval(values: Iterable[float | None]) -> Interval | None:
    """The interval of those that are known; None of none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) == 1:
        return Interval(known[0], None, 1)
    quantile = float(stdtrit(len(known) - 1, (1 + CONFIDENCE) / 2))
    return Interval(fmean(known), quantile * stdev(known) / sqrt(len(known)), len(known))


def across_as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """What `--json` writes of several seeds: an interval for each figure of a report.

    Units are those of the first seed.
    """
    first = reports[0]
    return {
        "num_seeds": len(reports),
        "confidence": CONFIDENCE,
        "rows": [_across(rows) for rows in zip(*(r.rows for r in reports), strict=True)],
        "total": _across([report.total for report in reports]),
        "scaled": [
            [points[0][0], _plain(interval(share for _, share in points))]
            for points in zip(*(report.scaled for report in reports), strict=True)
        ],
        "units": [asdict(unit) for unit in first.units],
        "duration_s": first.duration_s,
        "wall_s": _plain(interval(report.wall_s for report in reports)),
    }


def _across(rows: Sequence[Any]) -> dict[str, Any]:
    return _merged([asdict(row) for row in rows])


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same keys with intervals for numbers; names stay."""
    merged: dict[str, Any] = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(first, Mapping):
            merged[key] = _merged(values)
        elif isinstance(first, str):
            merged[key] = first
        else:
            merged[key] = _plain(interval(values))
    return merged


def _plain(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
