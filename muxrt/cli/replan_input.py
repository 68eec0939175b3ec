"""From a served file and its traffic log to what `muxrt replan` plans for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from random import Random

import msgspec
import numpy as np

from muxrt.cli.plan_input import Asked, join
from muxrt.cli.simulate_input import Variant, load_variant
from muxrt.config.placement import Slo
from muxrt.config.plan import PlanInput, load_plan
from muxrt.errors import MuxrtError
from muxrt.planner.forecast import (
    Floats,
    Forecast,
    History,
    SeenLengths,
    forecast,
    sample_lengths,
)
from muxrt.server.traffic_files import Counted, count_asked, read_entries
from muxrt.workload.spec import Joint, Seen, Traffic, Workload

HOUR_S, HOURS_PER_DAY = 3600.0, 24
# Of the window, by how busy they are: each is planned for and simulated as one.
BANDS = 4
# A model that nobody asks for is kept for whoever asks once an hour.
LEAST_RPS = 1 / HOUR_S
NUM_LENGTHS = 1000  # of each model
LENGTHS_S = 3 * 86400.0  # older ones have less than an eighth of a new one's weight
LEAST_REQUESTS = 100


class TooLittle(MuxrtError):
    """The log does not say enough to plan by."""


@dataclass(frozen=True, slots=True)
class Words:
    """The command line."""

    config: Path
    log: Path
    plan: Path
    now_s: float
    window_h: float
    quantile: float
    least_h: float  # of history
    most_age_h: float  # of the newest request
    slo: Slo | None


@dataclass(frozen=True, slots=True)
class Band:
    """Hours of the window that are about as busy as each other."""

    hours: float
    rates_rps: Mapping[str, float]  # the mean of its hours

    @property
    def total_rps(self) -> float:
        return sum(self.rates_rps.values())


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is served, and what will be asked of it."""

    served: Variant
    asked: Asked  # at the rates of the busiest band
    forecast: Forecast
    bands: tuple[Band, ...]  # the busiest first
    requests: int  # that it was made from
    first_s: float
    last_s: float
    unknown: tuple[str, ...]  # models of the log that are not served

    def at(self, rates_rps: Mapping[str, float]) -> Asked:
        """The same at other rates."""
        demands = self.asked.problem.demands
        factors = {n: max(rates_rps[n], LEAST_RPS) / d.rate_rps for n, d in demands.items()}
        models = tuple(
            msgspec.structs.replace(one, rate_rps=max(rates_rps[one.name], LEAST_RPS))
            for one in self.asked.models
        )
        return replace(self.asked, problem=self.asked.problem.scaled(factors), models=models)


def look_out(words: Words) -> Outlook:
    """Read everything and forecast. Raises ConfigError, and TooLittle for a log that is."""
    served = load_variant(words.config)
    history, found = _history(words, served.models)
    told = forecast(history, ceil(words.window_h), words.quantile)
    bands = _bands(told, words.window_h)
    workload = Workload(models=tuple(_traffic(words, served, bands[0])), slo=words.slo)
    asked = join(_plan(words.plan, served), workload, None)
    unknown = sorted({model for model, _ in found.sequences} - set(served.models))
    return Outlook(
        served, asked, told, bands, found.requests, found.first_s, found.last_s, tuple(unknown)
    )


def _history(words: Words, models: list[str]) -> tuple[History, Counted]:
    """Counts of the served models, in hours before now. Raises TooLittle."""
    found = count_asked(words.log, words.now_s, HOUR_S)
    if found is None:
        raise TooLittle(f"{words.log}: no request came before {_time(words.now_s)}")
    span_h = (words.now_s - found.first_s) / HOUR_S
    age_h = (words.now_s - found.last_s) / HOUR_S
    if age_h > words.most_age_h:
        raise TooLittle(
            f"{words.log}: the newest request came {_hours(age_h)} ago ({_time(found.last_s)}),"
            f" expected at most {_hours(words.most_age_h)}: is the log written? --most-age says"
            " how old it may be, --at plans as if it were another time"
        )
    if span_h < words.least_h or found.requests < LEAST_REQUESTS:
        raise TooLittle(
            f"{words.log}: found {found.requests} requests in {_hours(span_h)}, expected at least"
            f" {LEAST_REQUESTS} in {_hours(words.least_h)}; --least-history takes less"
        )
    num_bins = max(1, int(span_h))
    counts = {model: np.zeros(num_bins) for model in models}
    for (model, back), count in found.sequences.items():
        if model in counts and back < num_bins:
            counts[model][num_bins - 1 - back] = count
    # Within its first hour a log has one bin, which is as long as the log.
    return History(counts, HOUR_S * min(1.0, span_h), HOURS_PER_DAY), found


def _bands(told: Forecast, window_h: float) -> tuple[Band, ...]:
    """The hours of the window in groups of equal number, by how much is asked in them."""
    names = list(told.rates_rps)
    rates: Floats = np.array([told.rates_rps[name] for name in names])  # [models, hours]
    hours = np.ones(rates.shape[1])
    hours[-1] = window_h - (len(hours) - 1)
    busiest_first = np.argsort(-rates.sum(axis=0), kind="stable")
    return tuple(
        Band(
            float(hours[part].sum()),
            {name: float(rates[i, part].mean()) for i, name in enumerate(names)},
        )
        for part in np.array_split(busiest_first, min(BANDS, len(hours)))
    )


def _traffic(words: Words, served: Variant, band: Band) -> Iterator[Traffic]:
    """Each model's rate and the lengths that it was asked for; of all, where it was asked nothing.

    Raises TooLittle where no request was answered lately.
    """
    since_s = words.now_s - LENGTHS_S
    by_model: dict[str, list[SeenLengths]] = {name: [] for name in served.models}
    for one in read_entries(words.log, since_s, words.now_s):
        if one.model in by_model and one.status == 200 and one.prompt_tokens and one.output_tokens:
            prompt = max(1, round(one.prompt_tokens / one.sequences))
            output = max(1, round(one.output_tokens / one.sequences))
            by_model[one.model].append(SeenLengths(words.now_s - one.at_s, prompt, output))
    everybody = [one for many in by_model.values() for one in many]
    if not everybody:
        raise TooLittle(
            f"{words.log}: no request was answered since {_time(since_s)}: no lengths to plan by"
        )
    for name, mine in by_model.items():
        lengths = sample_lengths(mine or everybody, NUM_LENGTHS, Random(name))
        seen = tuple(Seen(one.prompt_tokens, one.output_tokens) for one in lengths)
        rate_rps = max(band.rates_rps[name], LEAST_RPS)
        yield Traffic(name=name, rate_rps=rate_rps, joint=Joint(seen=seen))


def _plan(path: Path, served: Variant) -> PlanInput:
    """The cluster, profiles and facts of a plan file, for the models that are served."""
    plan = load_plan(path)
    models = tuple(msgspec.structs.replace(one, rate_rps=1.0) for one in served.config.models)
    file = msgspec.structs.replace(plan.file, models=models)
    return PlanInput(file, plan.document, dict(served.shapes))


def _time(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M} UTC"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} minutes"
