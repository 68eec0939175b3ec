"""What each model will be asked, from what it was asked: rates with quantiles, and lengths.

A rate is a level times a profile of the day, as in the multiplicative method of Winters (1960,
"Forecasting sales by exponentially weighted moving averages"), without a trend. Popularity wanders,
so the level forgets within hours; the shape of a day stays, so the profile forgets within weeks.
Days are counted back from the moment of the forecast: no clock and no time zone is asked.

Weekends are told apart from other days, each with hours of its own, where two weeks are known and
that would have been clearly nearer on the days before. How much less (or more) a weekend has is its
hours over the same hours of the weekdays next to it, on both sides, so that a popularity that
wanders does not look like a weekend.

Quantiles come from what the same rule would have got wrong on the days before. Errors are taken of
square roots, which makes those of Poisson counts alike whatever the rate is (Bartlett 1936), and
twice the traffic gives twice the quantile.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from heapq import heappush, heappushpop
from random import Random
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from muxrt.errors import MuxrtError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Half-lives in days, by scripts/backtest_forecast.py (docs/replan.md has the table).
LEVEL_DAYS, SHAPE_DAYS = 0.125, 7.0
# Of a day without a day before it: the mean of the newest bins, as many as a quarter of a day has.
RECENT = 0.25
# Days whose errors make the quantiles: the newest.
ERROR_DAYS = 14
LEAST_ERRORS = 4  # that a quantile is taken of
LIKELY = (0.1, 0.9)  # quantiles that a scenario draws from
LENGTHS_DAYS = 1.0  # half-life of a request's weight among the lengths
# Days of a log before weekends are looked for, and before what they would have been is tried.
WEEKS_DAYS, WEEK_DAYS = 14, 7
NEARER = 0.95  # of the errors that days alike make, at most: less is chance
LEAST_WEEKEND = 0.001  # of a weekday's traffic, and its inverse the most


class NoHistory(MuxrtError):
    """There is nothing to forecast from."""


@dataclass(frozen=True, slots=True)
class History:
    """Requests per bin of time, oldest first; the last bin ends when the forecast is made."""

    counts: Mapping[str, Floats]  # by model, [bins], equally many for all
    bin_s: float
    bins_per_day: int
    # Which bins are of a weekend, [bins + those that are forecast]; None: all days are alike.
    weekends: Bools | None = None

    @property
    def num_bins(self) -> int:
        return max((len(counts) for counts in self.counts.values()), default=0)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests/s of each model in the bins to come, [bins]: the quantile that was asked for."""

    rates_rps: Mapping[str, Floats]
    bin_s: float
    num_days: int  # whole ones that it was made from; 0: less than a day, so a recent mean
    weekly: tuple[str, ...] = ()  # models whose weekends were told apart


@dataclass(frozen=True, slots=True)
class Fit:
    """How one model is forecast, and what that got wrong."""

    weekends: Bools | None  # None: all days are alike
    errors: Floats  # of the square roots, [bins of the newest days]


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
    return _forecast(history, num_bins, lambda: quantile)


def _forecast(history: History, num_bins: int, quantile: Callable[[], float]) -> Forecast:
    """Each model at the quantile that it is given."""
    per_day, rates, weekly = history.bins_per_day, {}, []
    for model, counts in history.counts.items():
        fit = fitted(counts, per_day, history.weekends)
        rates[model] = _told(counts, num_bins, per_day, quantile(), fit) / history.bin_s
        if fit.weekends is not None:
            weekly.append(model)
    return Forecast(rates, history.bin_s, history.num_bins // per_day, tuple(weekly))


def scenario(history: History, num_bins: int, rng: Random) -> Forecast:
    """One way that the next bins may go: each model at a quantile of its own, drawn at random."""
    return _forecast(history, num_bins, lambda: rng.uniform(*LIKELY))


def expected(counts: Floats, num_bins: int, per_day: int, weekends: Bools | None = None) -> Floats:
    """Requests in each of the next bins, [num_bins]; `counts` is [bins], at least one.

    `weekends` is [bins + num_bins], and makes no difference in the first week.
    """
    num_days = len(counts) // per_day
    if not num_days:
        recent = counts[-math.ceil(RECENT * per_day) :]
        return np.full(num_bins, recent.mean())
    days = counts[len(counts) - num_days * per_day :].reshape(num_days, per_day)  # oldest first
    if weekends is None or num_days < WEEK_DAYS:
        weekends = np.zeros(len(counts) + num_bins, np.bool_)
    past = weekends[len(counts) - days.size : len(counts)].reshape(days.shape)
    part = _weekend_part(days, past)
    # The mean of each day, as if none were of a weekend.
    levels = (days / np.where(past, part, 1.0)).mean(axis=1)
    any_day = 0.5 ** (np.arange(num_days)[::-1] / SHAPE_DAYS)
    if not any_day @ levels:
        return np.zeros(num_bins)
    weekday = _shape(any_day, days, levels, ~past, np.ones(per_day))
    weekend = _shape(any_day, days, levels, past, part * weekday)
    # What came over what the shape would have at level 1, the newest bins first of all. An hour of
    # a weekend with half the traffic says half as much.
    ages = np.cumsum(np.where(past, min(1.0, part), 1.0).ravel()[::-1])[::-1]
    newest = 0.5 ** (ages / (LEVEL_DAYS * per_day))
    level = newest @ days.ravel() / (newest @ np.where(past, weekend, weekday).ravel())
    to_come = weekends[len(counts) : len(counts) + num_bins]
    shape = np.where(to_come, np.resize(weekend, num_bins), np.resize(weekday, num_bins))
    told: Floats = level * shape
    return told


def _weekend_part(days: Floats, weekends: Bools) -> float:
    """What a weekend has of a weekday's requests; 1 where none or nothing beside it is known.

    Both are [days, bins of a day].
    """
    before = _last_weekday(days, weekends)
    after = _last_weekday(days[::-1], weekends[::-1])[::-1]
    beside = np.where(np.isnan(before), after, before)
    beside = np.where(np.isnan(after), beside, (beside + after) / 2)
    known = weekends & ~np.isnan(beside)
    usual = beside[known].sum()
    if not usual:
        return 1.0
    return float(np.clip(days[known].sum() / usual, LEAST_WEEKEND, 1 / LEAST_WEEKEND))


def _last_weekday(days: Floats, weekends: Bools) -> Floats:
    """For each bin that of the last weekday before it at the same hour; NaN where there is none."""
    found, last = np.empty(days.shape), np.full(days.shape[1], np.nan)
    for number, (day, is_weekend) in enumerate(zip(days, weekends, strict=True)):
        found[number] = last
        last = np.where(is_weekend, last, day)
    return found


def _shape(
    any_day: Floats, days: Floats, levels: Floats, which: Bools, otherwise: Floats
) -> Floats:
    """Of a day at level 1, [bins of a day]: from the bins that are `which`, where there are any."""
    weights = (any_day * levels) @ which
    found: Floats = np.where(
        weights > 0, any_day @ (days * which) / np.where(weights > 0, weights, 1.0), otherwise
    )
    return found


def at_quantile(
    counts: Floats, num_bins: int, per_day: int, quantile: float, weekends: Bools | None = None
) -> Floats:
    """`expected`, moved by the quantile of the errors that it made on the days before.

    With few of them, as with a single day, counts are taken to be Poisson.
    """
    fit = fitted(counts, per_day, weekends)
    return _told(counts, num_bins, per_day, quantile, fit)


def fitted(counts: Floats, per_day: int, weekends: Bools | None) -> Fit:
    """With weekends where that would have been clearly nearer on the days before."""
    alike = Fit(None, errors(counts, per_day))
    if weekends is None or len(counts) < WEEKS_DAYS * per_day:
        return alike
    apart = Fit(weekends, errors(counts, per_day, weekends))
    is_nearer = np.abs(apart.errors).sum() < NEARER * np.abs(alike.errors).sum()
    return apart if is_nearer else alike


def _told(counts: Floats, num_bins: int, per_day: int, quantile: float, fit: Fit) -> Floats:
    mean, found = expected(counts, num_bins, per_day, fit.weekends), fit.errors
    # The root of a Poisson count has a deviation of 1/2.
    poisson = NormalDist().inv_cdf(quantile) / 2
    off = float(np.quantile(found, quantile)) if len(found) >= LEAST_ERRORS else poisson
    moved: Floats = np.maximum(np.sqrt(mean) + off, 0.0) ** 2
    return moved


def errors(counts: Floats, per_day: int, weekends: Bools | None = None) -> Floats:
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
        known = None if weekends is None else weekends[:end]
        found.append(np.sqrt(day) - np.sqrt(expected(before, per_day, per_day, known)))
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
