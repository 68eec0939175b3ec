"""How long a batch takes: a protocol, and an instance that is fitted online.

Features of a batch: a constant (weights are read once whatever the batch), its new tokens (linear
layers) and its attention work, the sum over new tokens of the tokens each attends to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from muxrt.core import BatchEntry

NUM_FEATURES = 3
FORGETTING = 0.995  # weight of the past per observation: a memory of about 200 batches
MIN_OBSERVATIONS = 8


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the latency of one model's batch depends on."""

    num_tokens: int
    attention_tokens: int  # sum over new tokens of the tokens each one attends to

    @classmethod
    def of(cls, entries: Iterable[BatchEntry]) -> "BatchShape":
        """The shape of a batch with these entries."""
        tokens = attention = 0
        for entry in entries:
            num_tokens = entry.num_tokens
            tokens += num_tokens
            if num_tokens == 1:  # a decode step: no call for each of hundreds
                attention += entry.start + 1
            else:
                attention += attention_work(entry.start, num_tokens)
        return cls(tokens, attention)


def attention_work(start: int, num_tokens: int) -> int:
    """Tokens attended to by `num_tokens` new tokens from position `start` on, added up."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


class Latency(Protocol):
    """Predicts how long a batch of one model takes on a lane, in seconds."""

    def predict(self, model: str, shape: BatchShape) -> float | None:
        """Seconds, or None while nothing is known."""

    def observe(self, model: str, shape: BatchShape, elapsed_s: float) -> None:
        """A batch of that shape took that long."""


class OnlineLatency:
    """Least squares per model with exponential forgetting and coefficients >= 0."""

    def __init__(self) -> None:
        self._fits: dict[str, _Fit] = {}

    def predict(self, model: str, shape: BatchShape) -> float | None:
        fit = self._fits.get(model)
        if fit is None or fit.num_observations < MIN_OBSERVATIONS:
            return None
        return fit.predict(shape)

    def observe(self, model: str, shape: BatchShape, elapsed_s: float) -> None:
        self._fits.setdefault(model, _Fit()).observe(shape, elapsed_s)


class _Fit:
    """Normal equations of one model; solved when asked, at most once per observation."""

    def __init__(self) -> None:
        self.num_observations = 0
        self._gram = np.zeros((NUM_FEATURES, NUM_FEATURES))
        self._moment = np.zeros(NUM_FEATURES)
        self._coefficients: np.ndarray | None = None

    def observe(self, shape: BatchShape, elapsed_s: float) -> None:
        # Relative error counts: a decode step must not drown beside a long prefill.
        row = _features(shape) / elapsed_s if elapsed_s > 0 else np.zeros(NUM_FEATURES)
        self._gram = FORGETTING * self._gram + np.outer(row, row)
        self._moment = FORGETTING * self._moment + row
        self.num_observations += 1
        self._coefficients = None

    def predict(self, shape: BatchShape) -> float:
        if self._coefficients is None:
            self._coefficients = _solve_nonnegative(self._gram, self._moment)
        return float(self._coefficients @ _features(shape))


def _features(shape: BatchShape) -> np.ndarray:
    return np.array([1.0, shape.num_tokens, shape.attention_tokens])


def _solve_nonnegative(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Least squares with the most negative coefficient dropped until none is negative."""
    active = list(range(len(moment)))
    while active:
        scale = np.sqrt(np.maximum(np.diag(gram)[active], 1e-300))
        scaled = gram[np.ix_(active, active)] / np.outer(scale, scale)
        part = np.linalg.lstsq(scaled, moment[active] / scale, rcond=1e-10)[0] / scale
        if (part >= 0).all():
            solution = np.zeros(len(moment))
            solution[active] = part
            return solution
        del active[int(np.argmin(part * scale))]
    return np.zeros(len(moment))
