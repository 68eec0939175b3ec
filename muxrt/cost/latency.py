"""How long a batch takes: a protocol, and an instance that is fitted online.

Features of a batch: a constant (weights are read once whatever the batch), its new tokens (linear
layers) and its attention work, the sum over new tokens of the tokens each attends to.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import sqrt
from operator import add
from typing import Protocol

import numpy as np
import numpy.typing as npt

from muxrt.core import BatchEntry
from muxrt.cost.compiled import compiled_bare

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NUM_FEATURES = 3
# Weight of the past per observation: a memory of about 50 batches of each size, which fades over
# 500 others: hundreds of decode steps must not wipe out what was known of a prefill.
FORGETTING, FADING = 0.98, 0.998
MIN_OBSERVATIONS = 8
FEW = 8  # batches at once: a loop in Python is as quick
SOLVE_EVERY = 8  # observations; a solution costs as much as many predictions


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

    def observe_all(
        self, model: str, num_tokens: Ints, attention_tokens: Ints, elapsed_s: Floats
    ) -> None:
        """As `observe` for one batch after the other. Shapes [batches], at least one."""


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
        fit = self._fits.get(model)
        if fit is None:
            fit = self._fits[model] = _Fit()
        fit.observe(shape, elapsed_s)

    def observe_all(
        self, model: str, num_tokens: Ints, attention_tokens: Ints, elapsed_s: Floats
    ) -> None:
        fit = self._fits.setdefault(model, _Fit())
        cuts = [0, *(np.flatnonzero(np.diff(num_tokens)) + 1).tolist(), len(num_tokens)]
        for begin, end in pairwise(cuts):
            same = slice(begin, end)
            fit.observe_all(int(num_tokens[begin]), attention_tokens[same], elapsed_s[same])


class _Fit:
    """Normal equations of one model, solved when asked and a few observations old at most."""

    def __init__(self) -> None:
        self.num_observations = 0
        self._sizes: dict[int, _Sums] = {}  # by the bits of the number of tokens
        self._coefficients: tuple[float, ...] = (0.0, 0.0, 0.0)
        self._num_solved = 0

    def observe(self, shape: BatchShape, elapsed_s: float) -> None:
        self.num_observations += 1
        self._sums(shape.num_tokens).add(shape, elapsed_s, self.num_observations)

    def observe_all(self, num_tokens: int, attention_tokens: Ints, elapsed_s: Floats) -> None:
        """As `observe`, for batches of as many tokens."""
        sums = self._sums(num_tokens)
        sums.add_all(num_tokens, attention_tokens, elapsed_s, self.num_observations + 1)
        self.num_observations += len(elapsed_s)

    def _sums(self, num_tokens: int) -> "_Sums":
        size = num_tokens.bit_length()
        sums = self._sizes.get(size)
        if sums is None:
            sums = self._sizes[size] = _Sums()
        return sums

    def predict(self, shape: BatchShape) -> float:
        if not self._num_solved or self.num_observations - self._num_solved >= SOLVE_EVERY:
            self._solve()
        constant, token, attention = self._coefficients
        return constant + token * shape.num_tokens + attention * shape.attention_tokens

    def _solve(self) -> None:
        faded = [sums.faded(self.num_observations) for sums in self._sizes.values()]
        cc, tt, aa, ct, ca, ta, *moment = (
            reduce(add, column) for column in zip(*faded, strict=True)
        )
        gram = ((cc, ct, ca), (ct, tt, ta), (ca, ta, aa))
        self._coefficients = _solve_nonnegative(gram, moment)
        self._num_solved = self.num_observations


class _Sums:
    """Sums over batches of about one size; plain numbers, as they are updated at every commit."""

    def __init__(self) -> None:
        self._values = [0.0] * (NUM_FEATURES * (NUM_FEATURES + 1) // 2 + NUM_FEATURES)
        self._number = 0  # of the last observation

    def add(self, shape: BatchShape, elapsed_s: float, number: int) -> None:
        if elapsed_s <= 0:
            return
        # Relative error counts: a decode step must not drown beside a long prefill.
        c = 1 / elapsed_s
        t, a = shape.num_tokens * c, shape.attention_tokens * c
        kept = FORGETTING * FADING ** (number - self._number)
        cc, tt, aa, ct, ca, ta, c_sum, t_sum, a_sum = self._values
        # Written out: a loop takes twice as long, and this is done for every batch.
        self._values = [
            kept * cc + c * c,
            kept * tt + t * t,
            kept * aa + a * a,
            kept * ct + c * t,
            kept * ca + c * a,
            kept * ta + t * a,
            kept * c_sum + c,
            kept * t_sum + t,
            kept * a_sum + a,
        ]
        self._number = number

    def add_all(
        self, num_tokens: int, attention_tokens: Ints, elapsed_s: Floats, number: int
    ) -> None:
        """As `add` for one after the other, the first of them being observation `number`."""
        if len(elapsed_s) < FEW or not (elapsed_s > 0).all():
            for index, seconds in enumerate(elapsed_s.tolist()):
                shape = BatchShape(num_tokens, int(attention_tokens[index]))
                self.add(shape, seconds, number + index)
            return
        values = np.array(self._values)
        first, each = FADING ** (number - self._number), FADING**1
        _accumulate(
            values, FORGETTING * first, FORGETTING * each, num_tokens, attention_tokens, elapsed_s
        )
        self._values = values.tolist()
        self._number = number + len(elapsed_s) - 1

    def faded(self, number: int) -> list[float]:
        """What they weigh when observation `number` was made."""
        weight = FADING ** (number - self._number)
        return [weight * value for value in self._values]


@compiled_bare
def _accumulate(
    sums: Floats,
    first: float,
    each: float,
    num_tokens: int,
    attention_tokens: Ints,
    elapsed_s: Floats,
) -> None:
    """What `_Sums.add` does, for one batch after the other; `first` is kept at the first."""
    cc, tt, aa, ct, ca, ta, c_sum, t_sum, a_sum = sums
    kept = first
    for index in range(len(elapsed_s)):
        c = 1 / elapsed_s[index]
        t, a = num_tokens * c, attention_tokens[index] * c
        cc, tt, aa = kept * cc + c * c, kept * tt + t * t, kept * aa + a * a
        ct, ca, ta = kept * ct + c * t, kept * ca + c * a, kept * ta + t * a
        c_sum, t_sum, a_sum = kept * c_sum + c, kept * t_sum + t, kept * a_sum + a
        kept = each
    sums[0], sums[1], sums[2], sums[3], sums[4] = cc, tt, aa, ct, ca
    sums[5], sums[6], sums[7], sums[8] = ta, c_sum, t_sum, a_sum


def _solve_nonnegative(
    gram: Sequence[Sequence[float]], moment: Sequence[float]
) -> tuple[float, ...]:
    """Least squares with the most negative coefficient dropped until none is negative."""
    active = list(range(len(moment)))
    while active:
        # Plain numbers: arrays of three take many times as long.
        scale = [sqrt(max(gram[row][row], 1e-300)) for row in active]
        scaled = [
            [gram[row][column] / (s * t) for column, t in zip(active, scale, strict=True)]
            for row, s in zip(active, scale, strict=True)
        ]
        right = [moment[row] / s for row, s in zip(active, scale, strict=True)]
        found = np.linalg.lstsq(scaled, right, rcond=1e-10)[0].tolist()
        part = [value / s for value, s in zip(found, scale, strict=True)]
        if min(part) >= 0:
            solution = [0.0] * len(moment)
            for row, value in zip(active, part, strict=True):
                solution[row] = value
            return tuple(solution)
        worst = min(range(len(active)), key=lambda place: part[place] * scale[place])
        del active[worst]
    return (0.0,) * len(moment)
