"""What each model will be asked, from what it was asked: rates with quantiles, and lengths.

A rate is a level times a profile of the day, as in the multiplicative method of Winters (1960,
"Forecasting sales by exponentially weighted moving averages"), without a trend. Popularity wanders,
so the level forgets within hours; the shape of a day stays, so the profile forgets within weeks.
Days are counted back from the moment of the forecast: no clock and no time zone is asked.

Quantiles come from what the same rule would have got wrong on the days before. Errors are taken of
square roots, which makes those of Poisson counts alike whatever the rate is (Bartlett 1936), and
twice the traffic gives twice the quantile.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappush, heappushpop
from random import Random
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from muxrt.errors import MuxrtError

Floats = npt.NDArray[np.float64]

# Half-lives in days, by scripts/backtest_forecast.py (docs/replan.md has the table).
LEVEL_DAYS, SHAPE_DAYS = 0.125, 7.0
# Of a day without a day before it: the mean of the newest bins, as many as a quarter of a day has.
RECENT = 0.25
# Days whose errors make the quantiles: the newest.
ERROR_DAYS = 14
LEAST_ERRORS = 4  # that a quantile is taken of
LIKELY = (0.1, 0.9)  # quantiles that a scenario draws from
LENGTHS_DAYS = 1.0  # half-life of a request's weight among the lengths


class NoHistory(MuxrtError):
    """There is nothing to forecast from."""


@dataclass(frozen=True, slots=True)
class History:
    """Requests per bin of time, oldest first; the last bin ends when the forecast is made."""

    counts: Mapping[str, Floats]  # by model, [bins], equally many for all
    bin_s: float
    bins_per_day: int

    @property
    def num_bins(self) -> int:
        return max((len(counts) for counts in self.counts.values()), default=0)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests/s of each model in the bins to come, [bins]: the quantile that was asked for."""

    rates_rps: Mapping[str, Floats]
    bin_s: float
    num_days: int  # whole ones that it was made from; 0: less than a day, so a recent mean


def forecast(history: History, num_bins: int, quantile: float = 0.5) -> Forecast:
    """The next `num_bins` bins; each holds no more than this with probability `quantile`.

    Each model by itself: all of them at once reach a high quantile less often. Raises NoHistory
    where no bin has passed or nobody asked for anything, ValueError unless 0 < quantile < 1.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"a quantile is between 0 and 1: {quantile}")
    if not history.num_bins:
        raise NoHistory("no traffic was seen: there is nothing to forecast from")
    if not any(counts.any() for counts in history.counts.values()):
        raise NoHistory("no request was seen: there is nothing to forecast from")
    per_day = history.bins_per_day
    rates = {
        model: at_quantile(counts, num_bins, per_day, quantile) / history.bin_s
        for model, counts in history.counts.items()
    }
    return Forecast(rates, history.bin_s, history.num_bins // per_day)


def scenario(history: History, num_bins: int, rng: Random) -> Forecast:
    """One way that the next bins may go: each model at a quantile of its own, drawn at random."""
    per_day, rates = history.bins_per_day, {}
    for model, counts in history.counts.items():
        quantile = rng.uniform(*LIKELY)
        rates[model] = at_quantile(counts, num_bins, per_day, quantile) / history.bin_s
    return Forecast(rates, history.bin_s, history.num_bins // per_day)


def expected(counts: Floats, num_bins: int, per_day: int) -> Floats:
    """Requests in each of the next bins, [num_bins]; `counts` is [bins], at least one."""
    num_days = len(counts) // per_day
    if not num_days:
        recent = counts[-math.ceil(RECENT * per_day) :]
        return np.full(num_bins, recent.mean())
    days = counts[len(counts) - num_days * per_day :].reshape(num_days, per_day)  # oldest first
    levels = days.mean(axis=1)
    any_day = 0.5 ** (np.arange(num_days)[::-1] / SHAPE_DAYS)
    weight = any_day @ levels
    if not weight:
        return np.zeros(num_bins)
    shape = any_day @ days / weight
    # What came over what the shape would have at level 1, the newest bins first of all.
    newest = 0.5 ** (np.arange(days.size)[::-1] / (LEVEL_DAYS * per_day))
    level = newest @ days.ravel() / (newest @ np.tile(shape, num_days))
    return np.resize(level * shape, num_bins)


def at_quantile(counts: Floats, num_bins: int, per_day: int, quantile: float) -> Floats:
    """`expected`, moved by the quantile of the errors that it made on the days before.

    With few of them, as with a single day, counts are taken to be Poisson.
    """
    mean = expected(counts, num_bins, per_day)
    found = errors(counts, per_day)
    # The root of a Poisson count has a deviation of 1/2.
    poisson = NormalDist().inv_cdf(quantile) / 2
    off = float(np.quantile(found, quantile)) if len(found) >= LEAST_ERRORS else poisson
    moved: Floats = np.maximum(np.sqrt(mean) + off, 0.0) ** 2
    return moved


def errors(counts: Floats, per_day: int) -> Floats:
    """Of the square roots, of every bin of the newest days that have a whole day before them.

    Before the first day has passed, of every bin by those before it.
    """
    num_days = len(counts) // per_day
    if not num_days:
        told = [expected(counts[:end], 1, per_day)[0] for end in range(1, len(counts))]
        return np.sqrt(counts[1:]) - np.sqrt(np.array(told, np.float64))
    found = []
    for back in range(1, min(num_days, ERROR_DAYS + 1)):
        end = len(counts) - (back - 1) * per_day
        day, before = counts[end - per_day : end], counts[: end - per_day]
        found.append(np.sqrt(day) - np.sqrt(expected(before, per_day, per_day)))
    return np.concatenate(found) if found else np.zeros(0)


@dataclass(frozen=True, slots=True)
class SeenLengths:
    """Tokens of a request, and how long ago it came."""

    age_s: float
    prompt_tokens: int
    output_tokens: int


def sample_lengths(seen: Iterable[SeenLengths], most: int, rng: Random) -> list[SeenLengths]:
    """At most `most` of them by chance, newer ones rather than older ones; newest first.

    A weighted sample in one pass (Efraimidis and Spirakis 2006, A-Res).
    """
    kept: list[tuple[float, int, SeenLengths]] = []
    for number, one in enumerate(seen):
        weight = 0.5 ** (max(one.age_s, 0.0) / (LENGTHS_DAYS * 86400))
        # The logarithm of u^(1/w), which itself would vanish.
        key = math.log(1 - rng.random()) / max(weight, 1e-300)
        item = (key, number, one)
        if len(kept) < most:
            heappush(kept, item)
        else:
            heappushpop(kept, item)
    return sorted((one for _, _, one in kept), key=lambda one: one.age_s)
