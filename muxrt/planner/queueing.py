"""How a unit does under random arrivals: the estimator that judges drafts.

A unit is a prefill server and a decode server, on two lanes or in turns on one:

* Prefills wait as in M/G/1 (Pollaczek-Khinchine), in batches of the size that makes the wait
  shortest; the wait's tail is exponential with that mean. TTFT = wait + the batch's prefill.
* Decodes go round: each model's running batch takes one step per round, so a token takes the
  round. A model's batch is rate x output tokens x time per token (Little's law), which makes the
  round a fixed point; near saturation there is none, and the unit cannot keep up.
* KV: the sequences that run are Poisson in number; those that do not fit miss their TTFT.

An overloaded unit admits the share of its traffic that gives the most goodput and refuses the rest,
as its scheduler does. What is not modelled: bursts beyond Poisson, prefix reuse, preemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from muxrt.planner.draft import Draft, Group
from muxrt.planner.station import PRECISION, Floats, Peak, best_load, goodputs
from muxrt.planner.tables import Tables
from muxrt.planner.workload import Problem


@dataclass(frozen=True, slots=True)
class PartScore:
    """One model in one group; rates are requests/s, times are means of what is admitted."""

    model: str
    rate_rps: float
    admitted_rps: float
    attainment: float
    ttft_s: float
    tpot_s: float
    batch: float  # sequences that decode at the same time

    @property
    def goodput_rps(self) -> float:
        return self.admitted_rps * self.attainment


@dataclass(frozen=True, slots=True)
class GroupScore:
    """One group under its traffic."""

    parts: tuple[PartScore, ...]
    prefill_busy: float  # share of the time
    kv_bytes: float  # per GPU, used on average
    kv_capacity_bytes: float

    @property
    def goodput_rps(self) -> float:
        return sum(part.goodput_rps for part in self.parts)


@dataclass(frozen=True, slots=True)
class Score:
    """A whole draft."""

    groups: tuple[GroupScore, ...]

    @property
    def goodput_rps(self) -> float:
        return sum(group.goodput_rps for group in self.groups)


class Found(NamedTuple):
    """What is kept of a group: at the load that serves most, and a row of `station` per model."""

    peak: Peak
    answer: Floats  # [models, 5]


class QueueingJudge:
    """Scores drafts of one problem; groups that hold the same are computed once."""

    def __init__(self, problem: Problem, tables: Tables | None = None) -> None:
        """`tables` may be those of the same problem at other rates."""
        self.problem = problem
        self.tables = tables or Tables(problem)
        self._kept: dict[tuple[object, ...], Found] = {}

    def __call__(self, draft: Draft) -> Score:
        return Score(tuple(self.group(group) for group in draft))

    def scaled(self, factors: dict[str, float]) -> "QueueingJudge":
        """A judge of the same problem with rates multiplied."""
        return QueueingJudge(self.problem.scaled(factors), self.tables)

    def goodput_rps(self, group: Group, times_rate: float = 1.0) -> float:
        """The goodput of one group at a multiple of its rates: `group(...)` without the rest."""
        return self._found(group, times_rate).peak.goodput_rps

    def with_lanes(
        self, group: Group, pcts: Sequence[int | None], multiples: Sequence[float]
    ) -> list[list[float]]:
        """Goodput with each of `pcts` instead of the group's, at each multiple of its rates."""
        mesh, rated = (group.pool, group.size), self._rated(group)
        rows = [[self.tables.row(model, mesh, pct) for _, _, model in rated] for pct in pcts]
        found = np.empty((len(pcts), len(multiples)))
        goodputs(
            self.tables.times,
            np.array(rows),
            np.array([pct is not None for pct in pcts], np.int64),
            np.array([rate_rps for _, rate_rps, _ in rated]),
            float(self.problem.kv_bytes(*mesh, group.models)),
            np.array(multiples),
            found,
        )
        goodputs_rps: list[list[float]] = found.tolist()
        return goodputs_rps

    def group(self, group: Group) -> GroupScore:
        """The score of one group."""
        found = self._found(group, 1.0)
        parts = tuple(
            PartScore(model, rate_rps, *row)
            for (_, rate_rps, model), row in zip(
                self._rated(group), found.answer.tolist(), strict=True
            )
        )
        capacity = self.problem.kv_bytes(group.pool, group.size, group.models)
        return GroupScore(parts, found.peak.busy, found.peak.kv_bytes, capacity)

    def key(self, group: Group) -> tuple[object, ...]:
        """Equal for groups that differ in lanes and in names only."""
        rated = self._rated(group)
        return group.pool, group.size, *((like, f"{rate_rps:.4g}") for like, rate_rps, _ in rated)

    def _rated(self, group: Group) -> list[tuple[int, float, str]]:
        """Per part what it is like, its rate, its name; alike groups have alike lists."""
        likes, demands = self.problem.likes, self.problem.demands
        return sorted(
            (likes[part.model], demands[part.model].rate_rps * part.traffic, part.model)
            for part in group.parts
        )

    def _found(self, group: Group, times_rate: float) -> Found:
        key = (group.prefill_pct, times_rate, self.key(group))
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = self._fresh(group, times_rate)
        return kept

    def _fresh(self, group: Group, times_rate: float) -> Found:
        """Goodput under SLO, admitting as much of the traffic as serves it best."""
        mesh, pct, rated = (group.pool, group.size), group.prefill_pct, self._rated(group)
        which = np.array([self.tables.row(model, mesh, pct) for _, _, model in rated])
        rates = np.array([rate_rps * times_rate for _, rate_rps, _ in rated])
        capacity = float(self.problem.kv_bytes(*mesh, group.models))
        answer = np.empty((len(rated), 5))
        times = self.tables.times
        peak = best_load(times, which, rates, pct is not None, capacity, PRECISION, answer)
        return Found(Peak(*peak), answer)
