"""Robust monotone fits: times that grow with the work and never with the compute share.

A surface is a sum of terms, each piecewise linear in one measure of work (batch, tokens) between
given knots. Its parameters are increments >= 0: what one knot adds to the one before it, at a share
and at all smaller ones. Any such surface grows with work and shrinks with the share, so
monotonicity is in the form, not in a check. It implies that a small share hurts large work more
than small work in seconds, which is what is measured: small steps are bound by launches, not by
SMs.

Parameters are found by least squares with bounds (Lawson & Hanson 1974, as scipy's `nnls`) on
relative errors, repeated with the weights of outliers cut down: Huber's weights for what is a few
per cent off, Cauchy's for what is off by tens of per cent.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Floats = npt.NDArray[np.float64]

# Relative errors: below the first a cell counts fully, beyond the second hardly at all. The profile
# repeats to about 1 %; its spikes are off by 30 % and more.
HUBER, CAUCHY = 0.02, 0.25
NUM_REWEIGHTINGS = 12
SMOOTHNESS = 0.05
# Beyond the last knot a curve goes on with the slope of this many segments, not of one noisy one.
SLOPE_SEGMENTS = 3


@dataclass(frozen=True, slots=True)
class Term:
    """One additive part of a surface: where each cell lies, and the knots in between."""

    work: Floats  # [cells]
    knots: Floats  # [knots], ascending


@dataclass(frozen=True, slots=True)
class Curve:
    """Piecewise linear and never falling; flat before the first knot."""

    knots: tuple[float, ...]
    values: tuple[float, ...]
    slope: float  # after the last knot

    def __call__(self, work: float) -> float:
        knots, values = self.knots, self.values
        after = bisect_right(knots, work)
        if after == 0:
            return values[0]
        low, base = knots[after - 1], values[after - 1]
        if after == len(knots):
            return base + self.slope * (work - low)
        return base + (values[after] - base) * (work - low) / (knots[after] - low)


@dataclass(frozen=True, slots=True)
class Surface:
    """Fitted terms: `values[term][level]` are those of the knots at `shares[level]`."""

    shares: tuple[float, ...]  # descending
    knots: tuple[tuple[float, ...], ...]
    values: tuple[Floats, ...]  # per term: [levels, knots], never falling along either axis

    def at(self, share: float) -> tuple[Curve, ...]:
        """The curve of each term at a share: linear in 1 / share between the measured ones.

        Below the smallest measured share times grow as 1 / share: as if all were compute, the
        worst that fewer SMs can do.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a share is above 0 and at most 1: {share}")
        return tuple(
            _curve(knots, self._row(values, share))
            for knots, values in zip(self.knots, self.values, strict=True)
        )

    def _row(self, values: Floats, share: float) -> Floats:  # [knots]
        inverse = [1 / level for level in self.shares]  # ascending
        if 1 / share >= inverse[-1]:
            least: Floats = values[-1] * (self.shares[-1] / share)
            return least
        after = bisect_right(inverse, 1 / share)
        if after == 0:  # a profile without the whole device: no faster than what was measured
            most: Floats = values[0]
            return most
        weight = (1 / share - inverse[after - 1]) / (inverse[after] - inverse[after - 1])
        row: Floats = (1 - weight) * values[after - 1] + weight * values[after]
        return row


def _curve(knots: tuple[float, ...], row: Floats) -> Curve:
    back = min(SLOPE_SEGMENTS, len(knots) - 1)
    rise = float(row[-1] - row[-1 - back])
    slope = rise / (knots[-1] - knots[-1 - back]) if back else 0.0
    return Curve(knots, tuple(row.tolist()), slope)


def fit_surface(terms: Sequence[Term], shares: Floats, times_s: Floats) -> Surface:
    """Fit `times_s` [cells] measured at `shares` [cells]. Only the first term has a constant."""
    levels = np.unique(shares)[::-1]
    active = (shares[:, None] <= levels[None, :]).astype(float)  # [cells, levels]
    blocks = [
        (_segments(term)[:, first:, None] * active[:, None, :]).reshape(len(times_s), -1)
        for term, first in zip(terms, [0] + [1] * len(terms), strict=False)
    ]
    matrix = np.hstack(blocks)
    smooth = _smoothness(terms, len(levels), times_s)
    increments = _solve(matrix, times_s, smooth)
    values, start = [], 0
    for index, term in enumerate(terms):
        size = len(term.knots) - (index > 0)
        part = increments[start : start + size * len(levels)].reshape(size, len(levels))
        start += part.size
        part = part if index == 0 else np.vstack([np.zeros((1, len(levels))), part])
        values.append(np.cumsum(np.cumsum(part, axis=0), axis=1).T)
    knots = tuple(tuple(term.knots.tolist()) for term in terms)
    return Surface(tuple(levels.tolist()), knots, tuple(values))


def _segments(term: Term) -> Floats:
    """A constant, then how far each cell is through each segment. [cells, knots]"""
    low, width = term.knots[:-1], np.diff(term.knots)
    through = np.maximum((term.work[:, None] - low) / width, 0)
    through[:, :-1] = np.minimum(through[:, :-1], 1)
    return np.hstack([np.ones((len(term.work), 1)), through])


def _smoothness(terms: Sequence[Term], num_levels: int, times_s: Floats) -> Floats:
    """Rows that ask each slope to be that of the segment before it, at each level. [rows, columns]

    Weak next to the cells (SMOOTHNESS), it decides only what no cell tells: large work is measured
    at few shares, because the KV of more does not fit.
    """
    rows: list[Floats] = []
    sizes = [(len(term.knots) - (i > 0)) * num_levels for i, term in enumerate(terms)]
    start = 0
    for index, (term, size) in enumerate(zip(terms, sizes, strict=True)):
        widths = np.diff(term.knots)
        first = start + (num_levels if index == 0 else 0)  # the constant has no slope
        for segment in range(1, len(widths)):
            near = term.work >= term.knots[segment]
            typical_s = float(np.median(times_s[near])) if near.any() else float(times_s.max())
            for level in range(num_levels):
                row = np.zeros(sum(sizes))
                here, before = first + segment * num_levels, first + (segment - 1) * num_levels
                row[here : here + level + 1] = 1
                row[before : before + level + 1] = -widths[segment] / widths[segment - 1]
                rows.append(row * (SMOOTHNESS / typical_s))
        start += size
    return np.array(rows).reshape(-1, sum(sizes))


def _solve(matrix: Floats, times_s: Floats, smooth: Floats) -> Floats:
    """Increments >= 0 for relative errors, robustly."""
    weights = np.ones(len(times_s))
    for _ in range(NUM_REWEIGHTINGS):
        rows = np.vstack([matrix * (weights / times_s)[:, None], smooth])
        right = np.concatenate([weights, np.zeros(len(smooth))])
        solution: Floats = nnls(rows, right, maxiter=30 * matrix.shape[1])[0]
        error = np.abs(matrix @ solution / times_s - 1)
        huber = np.minimum(1, HUBER / np.maximum(error, 1e-12))
        weights = np.sqrt(huber) / (1 + (error / CAUCHY) ** 2)
    return solution
