"""Step times from DistServe's published coefficients (OSDI 2024, appendix A, and its repository).

    prefill = a + b * tokens + c * (sum of squared lengths)
    decode  = a + b * (sum of contexts) + c * batch, one set of coefficients below 95 sequences and
              one from there on

As published the two sets of a decode do not meet (a batch of 95 may be 25 % quicker or slower than
one of 94), and one quadratic term is negative. `LinearSteps` is what a planner can use: never
faster for more work. `Published` is what the paper's own simulator computes.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from muxrt.cost.monotone import Curve
from muxrt.errors import ConfigError

COLUMNS = ("model", "tp", "phase", "a_ms", "b_ms", "c_ms")
PHASES = ("prefill", "decode_small", "decode_large")
LARGE = 95  # sequences: from here on the large set
# Shares of SMs were not measured. A prefill is taken to be bound by arithmetic; a decode reads as
# fast with this share as with all SMs (roofline.py has the measurement).
SATURATING_SHARE = 0.41


class Line(NamedTuple):
    """a + b * x + c * y, seconds."""

    a: float
    b: float
    c: float


@dataclass(frozen=True, slots=True)
class Published:
    """The three sets of one model and tp, as they are."""

    prefill: Line
    small: Line
    large: Line

    def prefill_s(self, tokens: float, squares: float) -> float:
        return self.prefill.a + self.prefill.b * tokens + self.prefill.c * squares

    def decode_s(self, batch: float, context: float) -> float:
        line = self.small if batch < LARGE else self.large
        return line.a + line.b * context + line.c * batch


@dataclass(frozen=True, slots=True)
class LinearSteps:
    """The coefficients made monotone; `Steps` and, by share, `SharedSteps`.

    Decodes go on from the small set's time at 95 sequences with what a sequence more costs in the
    large set; a token of context costs what it does in the small set, which was measured at far
    more lengths. A negative quadratic term counts as none.
    """

    source: str
    published: Published
    prefill_speed: float = 1.0
    decode_speed: float = 1.0

    def at(self, share: float) -> "LinearSteps":
        """Steps at `share` of the SMs: an assumption, not a measurement."""
        if not 0 < share <= 1:
            raise ValueError(f"a share is above 0 and at most 1: {share}")
        reading = min(1.0, share / SATURATING_SHARE)
        return replace(self, prefill_speed=share, decode_speed=reading)

    def prefill_s(self, tokens: float, squares: float) -> float:
        line = self.published.prefill
        return (line.a + line.b * tokens + max(0.0, line.c) * squares) / self.prefill_speed

    def mean_prefill_s(self, tokens: float, squares: float) -> float:
        return self.prefill_s(tokens, squares)

    def decode_s(self, batch: float, context: float) -> float:
        return self.decode_batch_s(batch) + self.decode_context(context)

    def decode_batch_s(self, batch: float) -> float:
        small, large = self.published.small, self.published.large
        alone = small.a + small.c * min(batch, LARGE) + large.c * max(0.0, batch - LARGE)
        return alone / self.decode_speed

    @property
    def decode_context(self) -> Curve:
        return Curve((0.0,), (0.0,), self.published.small.b / self.decode_speed)


def read_coefficients(path: Path, source: str) -> dict[tuple[str, int], LinearSteps]:
    """Steps by model and tp, of a CSV with the header COLUMNS.

    `c_ms` is per squared token of a prefill, per sequence of a decode.
    Raises ConfigError with the file and what is missing.
    """
    lines: dict[tuple[str, int], dict[str, Line]] = {}
    for row in _rows(path):
        try:
            key = row["model"], int(row["tp"])
            line = Line(*(float(row[name]) / 1e3 for name in ("a_ms", "b_ms", "c_ms")))
        except (ValueError, TypeError):
            raise ConfigError(f"{path}: found {row}, expected numbers") from None
        lines.setdefault(key, {})[row["phase"]] = line
    for (model, tp), sets in lines.items():
        if set(sets) != set(PHASES):
            raise ConfigError(
                f"{path}: {model} tp {tp} has {', '.join(sorted(sets))},"
                f" expected {', '.join(PHASES)}"
            )
    return {
        key: LinearSteps(source, Published(*(sets[phase] for phase in PHASES)))
        for key, sets in lines.items()
    }


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    if rows.fieldnames is None or tuple(rows.fieldnames) != COLUMNS:
        raise ConfigError(f"{path}: expected a CSV with the header {','.join(COLUMNS)}")
    return iter(rows)
