"""What `muxrt replan` does: candidates, their gain under the forecast, their cost, a decision."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import msgspec

from muxrt.cli.plan_judge import Simulator
from muxrt.cli.plan_strategy import planned
from muxrt.cli.replan_input import HOUR_S, LEAST_RPS, Outlook
from muxrt.config.placement import Placement, UnitSpec
from muxrt.config.serve import ServeConfig
from muxrt.errors import ConfigError
from muxrt.planner.align import align
from muxrt.planner.diff import Diff, diff
from muxrt.planner.moving import Cost, Decision, Speed, Terms, cost_of, decide
from muxrt.sim.report import Report

# Planned rates that differ by less are not planned for twice.
ALIKE = 0.1
# Of the forecast, where the whole is more than the cluster can serve.
PARTS = (1.0, 0.8, 0.6, 0.4, 0.2)


@dataclass(frozen=True, slots=True)
class Served:
    """What a placement serves within targets, over the window."""

    goodput_rps: tuple[float, ...]  # by scenario, of which the first is the forecast
    offered_rps: float  # if all comes as forecast, as what is below
    attainment: Mapping[str, float]  # of each model's requests
    kv: Mapping[str, float]  # share of each unit's KV that is held, in the busiest hours


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement that could be changed to, with what that brings and takes."""

    name: str
    units: tuple[UnitSpec, ...]
    diff: Diff
    served: Served
    cost: Cost
    decision: Decision

    @property
    def net(self) -> tuple[bool, float]:
        """Of two the greater is the better one."""
        return self.decision.is_worth, self.decision.gain_rps


@dataclass(frozen=True, slots=True)
class Replan:
    """The answer."""

    outlook: Outlook
    before: Served
    best: Candidate
    notes: tuple[str, ...]

    @property
    def config(self) -> ServeConfig:
        """The served file with the new units, and the rates that they are for."""
        old, rates = self.outlook.served.config, self.outlook.bands[0].rates_rps
        models = tuple(
            msgspec.structs.replace(one, rate_rps=round(max(rates[one.name], LEAST_RPS), 6))
            for one in old.models
        )
        return msgspec.structs.replace(old, models=models, units=self.best.units)


class Judge:
    """Simulates placements under what may come: each band of hours of each scenario."""

    def __init__(self, outlook: Outlook) -> None:
        self._bands = outlook.bands
        self._simulators = [
            [Simulator(outlook.at(band.rates_rps), seed) for band in bands]
            for seed, bands in enumerate(outlook.scenarios)
        ]

    def __call__(self, units: tuple[UnitSpec, ...]) -> Served:
        placement = Placement(units)
        reports = [[sim.report(placement) for sim in by_band] for by_band in self._simulators]
        hours = [band.hours for band in self._bands]
        goodputs = tuple(_mean(hours, [_goodput(one) for one in by_band]) for by_band in reports)
        shares = {unit.unit: unit.kv_mean for unit in reports[0][0].units}
        offered = [one.total.requests / one.duration_s for one in reports[0]]
        return Served(goodputs, _mean(hours, offered), _attainment(hours, reports[0]), shares)


def _goodput(report: Report) -> float:
    return report.total.goodput_rps or 0.0


def _mean(hours: Sequence[float], values: Sequence[float]) -> float:
    return sum(h * value for h, value in zip(hours, values, strict=True)) / sum(hours)


def _attainment(hours: Sequence[float], reports: Sequence[Report]) -> dict[str, float]:
    """Of each model; 1 where nobody asks for it."""
    found = {}
    for rows in zip(*(report.rows for report in reports), strict=True):
        asked = [
            h * row.requests / report.duration_s
            for h, row, report in zip(hours, rows, reports, strict=True)
        ]
        met = sum(a * (row.attainment or 0.0) for a, row in zip(asked, rows, strict=True))
        found[rows[0].model] = met / sum(asked) if sum(asked) else 1.0
    return found


def replan(outlook: Outlook, strategy: str, terms: Terms) -> Replan:
    """Plan, judge and decide. Raises ConfigError where nothing can be planned or simulated."""
    judge = Judge(outlook)
    old = outlook.served.config.units
    before = judge(old)
    hours = [band.hours for band in outlook.bands]
    offered = {
        name: _mean(hours, [band.rates_rps[name] for band in outlook.bands])
        for name in outlook.served.models
    }
    problem, cluster = outlook.asked.problem, outlook.asked.problem.cluster
    speed = Speed(cluster.load_bytes_per_s, cluster.unit_start_s)
    notes: list[str] = []
    candidates = []
    for name, units in _candidates(outlook, strategy, notes):
        found, served = diff(old, units), judge(units)
        cost = cost_of(found, lambda m, size: problem.bytes(m, size).weights * size, offered, speed)
        gains = [new - was for new, was in zip(served.goodput_rps, before.goodput_rps, strict=True)]
        decision = decide(found, fmean(before.goodput_rps), gains, cost, terms)
        candidates.append(Candidate(name, units, found, served, cost, decision))
    if not candidates:
        raise ConfigError("; ".join(notes))
    best = max(candidates, key=lambda one: one.net)
    return Replan(outlook, before, best, tuple(notes))


def _candidates(
    outlook: Outlook, strategy: str, notes: list[str]
) -> Iterator[tuple[str, tuple[UnitSpec, ...]]]:
    """New placements over the old one, each once; why one could not be planned goes to `notes`."""
    old, known = outlook.served.config.units, set[tuple[UnitSpec, ...]]()
    for name, rates in _rates(outlook):
        units = _planned(outlook, rates, strategy, name, notes)
        for retune in (False, True) if units else ():
            placed = align(outlook.asked.problem, old, units, retune=retune)
            if placed not in known:
                known.add(placed)
                yield f"{name}, units that stay tuned anew" if retune else name, placed


def _planned(
    outlook: Outlook, rates: Mapping[str, float], strategy: str, name: str, notes: list[str]
) -> tuple[UnitSpec, ...]:
    """Units for these rates, or for as large a part of them as can be planned; () for none."""
    for part in PARTS:
        asked = outlook.at({model: part * rate_rps for model, rate_rps in rates.items()})
        try:
            return planned(asked, strategy).units
        except ConfigError as error:
            notes.append(f"{part:.0%} of {name}: {error.message}")
    return ()


def _rates(outlook: Outlook) -> Iterator[tuple[str, Mapping[str, float]]]:
    """What to plan for: the busiest hours of all, and each model's own where those are others."""
    busiest = outlook.bands[0].rates_rps
    yield "the busiest hours", busiest
    own = {name: max(band.rates_rps[name] for band in outlook.bands) for name in busiest}
    if any(own[name] > (1 + ALIKE) * max(busiest[name], LEAST_RPS) for name in busiest):
        yield "the busiest hours of each model", own


def window_s(outlook: Outlook) -> float:
    """Of the forecast."""
    return HOUR_S * sum(band.hours for band in outlook.bands)
