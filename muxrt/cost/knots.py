"""Step times from Splitwise's released performance model (splitwise-sim), and a repaired one.

Prefills are straight lines between measured sums of tokens. For decodes there are two models:

* `released`: its predictor was fitted over *tokens* (prompt x batch) and is asked with the number
  of *sequences*. So 64 sequences cost as much as one (47.6 ms where 96.6 ms were measured).
* otherwise `t(batch) + c * context` from the same measurements: c from the prompts of 128 to 8,192
  tokens at batch 1, t from batches of 1 to 64 with prompts of 512 tokens, less their context.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from muxrt.cost.monotone import Curve
from muxrt.errors import ConfigError

COLUMNS = ("model", "tp", "curve", "batch", "tokens", "ms")
CURVES = ("prefill", "decode", "released")
# A token time was the mean over answers of 128 tokens: that much of them was there on average.
MEAN_ANSWER_TOKENS = 64
# Shares of SMs were not measured; see cost/coefficients.py.
SATURATING_SHARE = 0.41
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class KnotSteps:
    """One model on one machine; `Steps` and, by share, `SharedSteps`. Seconds."""

    source: str
    prefill: Curve  # of the tokens of a batch
    batch: Curve  # of its sequences
    context_s: float  # per token
    prefill_speed: float = 1.0
    decode_speed: float = 1.0

    def at(self, share: float) -> "KnotSteps":
        """Steps at `share` of the SMs: an assumption, not a measurement."""
        if not 0 < share <= 1:
            raise ValueError(f"a share is above 0 and at most 1: {share}")
        reading = min(1.0, share / SATURATING_SHARE)
        return replace(self, prefill_speed=share, decode_speed=reading)

    def prefill_s(self, tokens: float, squares: float) -> float:
        return self.prefill(tokens) / self.prefill_speed

    def mean_prefill_s(self, tokens: float, squares: float) -> float:
        return self.prefill_s(tokens, squares)

    def decode_s(self, batch: float, context: float) -> float:
        return self.decode_batch_s(batch) + self.decode_context(context)

    def decode_batch_s(self, batch: float) -> float:
        return self.batch(batch) / self.decode_speed

    @property
    def decode_context(self) -> Curve:
        return Curve((0.0,), (0.0,), self.context_s / self.decode_speed)


@dataclass(frozen=True, slots=True)
class Knots:
    """The measurements of one model on one machine: seconds by tokens, or by batch and tokens."""

    source: str
    prefill: tuple[Point, ...]  # tokens of a batch
    decode: tuple[tuple[int, int, float], ...]  # batch, prompt of each sequence, a step
    released: tuple[Point, ...]  # decode step by the "tokens" that it was fitted over

    def repaired(self) -> KnotSteps:
        """With decodes that depend on batch and context as they were measured."""
        alone = sorted((tokens, time_s) for batch, tokens, time_s in self.decode if batch == 1)
        (few, few_s), (many, many_s) = alone[0], alone[-1]
        context_s = (many_s - few_s) / (many - few)
        (common,) = {tokens for batch, tokens, _ in self.decode if batch > 1}
        held = common + MEAN_ANSWER_TOKENS
        points = sorted(
            (batch, time_s - context_s * batch * held)
            for batch, tokens, time_s in self.decode
            if tokens == common
        )
        batch = line_through(rising(points))
        return KnotSteps(self.source, line_through(rising(self.prefill)), batch, context_s)

    def as_released(self) -> KnotSteps:
        """The predictor as splitwise-sim asks it."""
        sequences = line_through(self.released)
        return KnotSteps(self.source, line_through(self.prefill), sequences, 0.0)


def rising(points: Sequence[Point]) -> list[Point]:
    """Each at least as high as those before it: more work is never faster."""
    highest = accumulate((y for _, y in points), max)
    return [(x, y) for (x, _), y in zip(points, highest, strict=True)]


def line_through(points: Sequence[Point]) -> Curve:
    """Straight lines between points with rising x, going on beyond both ends; never below 0."""
    (x0, y0), (x1, y1) = points[:2]
    (x8, y8), (x9, y9) = points[-2:]
    start = max(0.0, y0 - (y1 - y0) / (x1 - x0) * x0)
    before = ((0.0, start),) if x0 > 0 else ()
    knots = (*before, *points)
    return Curve(
        tuple(float(x) for x, _ in knots), tuple(y for _, y in knots), (y9 - y8) / (x9 - x8)
    )


def read_knots(path: Path, source: str) -> dict[tuple[str, int], Knots]:
    """Measurements by model and tp, of a CSV with the header COLUMNS.

    Raises ConfigError with the file and what was expected.
    """
    found: dict[tuple[str, int], dict[str, list[tuple[int, int, float]]]] = {}
    try:
        text = path.read_text(encoding="utf-8")
        rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
        if rows.fieldnames is None or tuple(rows.fieldnames) != COLUMNS:
            raise ConfigError(f"{path}: expected a CSV with the header {','.join(COLUMNS)}")
        for row in rows:
            curves = found.setdefault((row["model"], int(row["tp"])), {c: [] for c in CURVES})
            point = int(row["batch"]), int(row["tokens"]), float(row["ms"]) / 1e3
            curves[row["curve"]].append(point)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not a table of {','.join(COLUMNS)}: {error}") from None
    for (model, tp), curves in found.items():
        short = [name for name, points in curves.items() if len(points) < 2]
        if short:
            raise ConfigError(f"{path}: {model} tp {tp} has no {short[0]} curve of two points")
    return {
        key: Knots(
            source,
            tuple((tokens, time_s) for _, tokens, time_s in curves["prefill"]),
            tuple(curves["decode"]),
            tuple((tokens, time_s) for _, tokens, time_s in curves["released"]),
        )
        for key, curves in found.items()
    }
