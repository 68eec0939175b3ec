"""From a served file and its traffic log to what `muxrt replan` plans for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, tzinfo
from math import ceil
from pathlib import Path
from random import Random
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import numpy.typing as npt

from muxrt.cli.plan_input import Asked, join
from muxrt.cli.simulate_input import Variant, load_variant
from muxrt.config.placement import Slo, UnitSpec
from muxrt.config.plan import PlanInput, load_plan, mesh_problems
from muxrt.config.replan import is_zone
from muxrt.config.serve import ServeConfig
from muxrt.errors import ConfigError, MuxrtError
from muxrt.planner.forecast import (
    Bools,
    Floats,
    Forecast,
    History,
    SeenLengths,
    forecast,
    sample_lengths,
    scenario,
)
from muxrt.server.traffic_files import Counted, count_asked, newest_s, read_entries
from muxrt.workload.spec import Joint, Seen, Traffic, Workload

Bins = npt.NDArray[np.intp]  # numbers of bins

HOUR_S, HOURS_PER_DAY, SATURDAY = 3600.0, 24, 5
# Of the window, by how busy they are: each is planned for and simulated as one.
BANDS = 4
# A model that nobody asks for is kept for whoever asks once an hour.
LEAST_RPS = 1 / HOUR_S
NUM_LENGTHS = 1000  # of each model
LENGTHS_S = 3 * 86400.0  # older ones have less than an eighth of a new one's weight
MOST_READ = 200_000  # requests whose lengths are looked at
LEAST_REQUESTS = 100


class TooLittle(MuxrtError):
    """The log does not say enough to plan by."""


@dataclass(frozen=True, slots=True)
class Words:
    """The command line."""

    config: Path
    traffic: Path | None  # the log; None = the file's
    plan: Path | None  # likewise
    now_s: float
    window_h: float
    quantile: float
    least_h: float  # of history
    most_age_h: float  # of the newest request
    slo: Slo | None
    num_scenarios: int = 3
    units: tuple[UnitSpec, ...] | None = None  # that a server says it has; None = the file's
    zone: tzinfo = UTC  # whose weekends are told apart


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
    # The same hours as they may come: first as forecast, then with each model's error at random.
    scenarios: tuple[tuple[Band, ...], ...]
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
    served = _served(words)
    log, plan = _named(words, served.config)
    aimless = [model.name for model in served.config.models if model.slo is None]
    if aimless and words.slo is None:
        raise ConfigError(
            f"{words.config}: found no slo of {', '.join(aimless)}, expected one in the file, or"
            " --ttft and --tpot for models without"
        )
    history, found = _history(words, log, served.models)
    num_bins = ceil(words.window_h)
    told = forecast(history, num_bins, words.quantile)
    hours = _hours_of(words.window_h, num_bins)
    parts = _parts(told)
    bands = _bands(told, hours, parts)
    others = (scenario(history, num_bins, Random(n)) for n in range(1, words.num_scenarios))
    scenarios = (bands, *(_bands(other, hours, parts) for other in others))
    traffic = tuple(_traffic(words, log, served, bands[0], found))
    workload = Workload(models=traffic, slo=words.slo)
    asked = join(_plan(plan, served), workload, None)
    unknown = sorted({model for model, _ in found.sequences} - set(served.models))
    return Outlook(
        served,
        asked,
        told,
        bands,
        scenarios,
        found.requests,
        found.first_s,
        found.last_s,
        tuple(unknown),
    )


def zone_of(name: str) -> ZoneInfo:
    """The time zone of that name. Raises ConfigError."""
    if not is_zone(name):
        raise ConfigError(
            f"found --timezone {name}, expected UTC, or a name such as Europe/Berlin that this"
            " machine knows"
        )
    return ZoneInfo(name)


def _served(words: Words) -> Variant:
    """The file's models, where they are. Raises ConfigError where a server has others."""
    found = load_variant(words.config)
    if words.units is None:
        return found
    running = {part.name for unit in words.units for part in unit.models}
    if running != set(found.models):
        odd = ", ".join(sorted(running ^ set(found.models)))
        raise ConfigError(f"{words.config}: the server's models differ from these: {odd}")
    return replace(found, config=msgspec.structs.replace(found.config, units=words.units))


def _named(words: Words, config: ServeConfig) -> tuple[Path, Path]:
    """The traffic log and the plan file. Raises ConfigError where nobody names one."""
    log, plan = words.traffic, words.plan
    if log is None and config.traffic is not None:
        log = Path(config.traffic.path)
    if plan is None and config.replan is not None:
        plan = Path(config.replan.plan)
    if log is None:
        raise ConfigError(f"{words.config} keeps no traffic log, expected --traffic FOLDER")
    if plan is None:
        raise ConfigError(
            f"{words.config} has no replan.plan, expected --plan FILE: cluster, profiles and engine"
            " facts, as `muxrt plan` reads them"
        )
    return log, plan


def _history(words: Words, log: Path, models: list[str]) -> tuple[History, Counted]:
    """Counts of the served models, in hours before now. Raises TooLittle."""
    found = count_asked(log, words.now_s, HOUR_S)
    if found is None:
        newest = newest_s(log)
        has = "it is empty" if newest is None else f"its newest came {_time(newest)}"
        raise TooLittle(f"{log}: no request came before {_time(words.now_s)}: {has}")
    asked = {model for model, _ in found.sequences}
    if not asked & set(models):
        raise TooLittle(
            f"{log}: found requests for {', '.join(sorted(asked))}, expected some for the models of"
            f" {words.config}: {', '.join(models)}; is it the log of another server?"
        )
    span_h = (words.now_s - found.first_s) / HOUR_S
    age_h = (words.now_s - found.last_s) / HOUR_S
    if age_h > words.most_age_h:
        raise TooLittle(
            f"{log}: the newest request came {_hours(age_h)} ago ({_time(found.last_s)}),"
            f" expected at most {_hours(words.most_age_h)}: is the log written? --most-age says"
            " how old it may be, --at plans as if it were another time"
        )
    if span_h < words.least_h or found.requests < LEAST_REQUESTS:
        raise TooLittle(
            f"{log}: found {found.requests} requests in {_hours(span_h)}, expected at least"
            f" {LEAST_REQUESTS} in {_hours(words.least_h)}; --least-history takes less"
        )
    num_bins = max(1, int(span_h))
    counts = {model: np.zeros(num_bins) for model in models}
    for (model, back), count in found.sequences.items():
        if model in counts and back < num_bins:
            counts[model][num_bins - 1 - back] = count
    # Within its first hour a log has one bin, which is as long as the log.
    bin_s = HOUR_S * min(1.0, span_h)
    weekends = _weekends(words.now_s, num_bins, ceil(words.window_h), words.zone)
    return History(counts, bin_s, HOURS_PER_DAY, weekends), found


def _weekends(now_s: float, num_past: int, num_future: int, zone: tzinfo) -> Bools:
    """Whether the middle of each hour is on a Saturday or Sunday, [num_past + num_future]."""
    middles_s = (now_s + (number + 0.5) * HOUR_S for number in range(-num_past, num_future))
    return np.array(
        [datetime.fromtimestamp(at_s, zone).weekday() >= SATURDAY for at_s in middles_s]
    )


def _hours_of(window_h: float, num_bins: int) -> Floats:
    """How long each bin of the window is: the last may be cut."""
    hours = np.ones(num_bins)
    hours[-1] = window_h - (num_bins - 1)
    return hours


def _parts(told: Forecast) -> list[Bins]:
    """The bins of the window in groups of equal number, the busiest first."""
    total: Floats = np.sum([*told.rates_rps.values()], axis=0)
    busiest_first = np.argsort(-total, kind="stable")
    return np.array_split(busiest_first, min(BANDS, len(total)))


def _bands(told: Forecast, hours: Floats, parts: Sequence[Bins]) -> tuple[Band, ...]:
    return tuple(
        Band(
            float(hours[part].sum()),
            {name: float(rates[part].mean()) for name, rates in told.rates_rps.items()},
        )
        for part in parts
    )


def _traffic(
    words: Words, log: Path, served: Variant, band: Band, found: Counted
) -> Iterator[Traffic]:
    """Each model's rate and the lengths that it was asked for; of all, where it was asked nothing.

    Raises TooLittle where no request was answered lately.
    """
    since_s = words.now_s - LENGTHS_S
    by_model: dict[str, list[SeenLengths]] = {name: [] for name in served.models}
    lately = sum(n for (_, back), n in found.sequences.items() if back * HOUR_S < LENGTHS_S)
    every = 1 + lately // MOST_READ
    for one in read_entries(log, since_s, words.now_s, every):
        if one.model in by_model and one.status == 200 and one.prompt_tokens and one.output_tokens:
            prompt = max(1, round(one.prompt_tokens / one.sequences))
            output = max(1, round(one.output_tokens / one.sequences))
            by_model[one.model].append(SeenLengths(words.now_s - one.at_s, prompt, output))
    everybody = [one for many in by_model.values() for one in many]
    if not everybody:
        raise TooLittle(
            f"{log}: no request was answered since {_time(since_s)}: no lengths to plan by"
        )
    for name, mine in by_model.items():
        lengths = sample_lengths(mine or everybody, NUM_LENGTHS, Random(name))
        seen = tuple(Seen(one.prompt_tokens, one.output_tokens) for one in lengths)
        rate_rps = max(band.rates_rps[name], LEAST_RPS)
        yield Traffic(name=name, rate_rps=rate_rps, joint=Joint(seen=seen))


def _plan(path: Path, served: Variant) -> PlanInput:
    """The cluster, profiles and facts of a plan file, for the models that are served."""
    plan = load_plan(path)
    for problem in mesh_problems(served.config.units, plan.file):
        raise ConfigError(f"{served.name}: {problem.message}")
    models = tuple(msgspec.structs.replace(one, rate_rps=1.0) for one in served.config.models)
    file = msgspec.structs.replace(plan.file, models=models)
    return PlanInput(file, plan.document, dict(served.shapes))


def _time(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M} UTC"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} minutes"
