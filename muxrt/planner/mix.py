"""A placement of both kinds: some models' phases apart, the others colocated on what is left.

A model may be in both: its plan has a share of its requests, the rest's problem the others.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from muxrt.config.placement import Placement, UnitSpec
from muxrt.errors import ConfigError
from muxrt.planner import assign, phase_plan
from muxrt.planner.draft import Draft
from muxrt.planner.phase_plan import Objective, PhasePlan
from muxrt.planner.queueing import Score
from muxrt.planner.rest import Rest
from muxrt.planner.workload import Problem

NOBODY = PhasePlan(())


@dataclass(frozen=True, slots=True)
class Kept:
    """What a placement serves within targets."""

    goodput_rps: float
    attainment: float  # of all requests
    least: float  # of the model that has the least


@dataclass(frozen=True, slots=True)
class Mix:
    """`together` lies on the GPUs of `rest`, as its problem counts pools; `score` is of it."""

    apart: PhasePlan
    rest: Rest
    together: Draft
    score: Score

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for placements that are the same."""
        apart = tuple(
            (one.model, one.prefill_pool, one.decode_pool, one.split.name, one.copies, one.share)
            for one in self.apart.models
        )
        return apart, self.together, self.rest.spans

    @property
    def has_both(self) -> bool:
        """Whether some model is apart and colocated."""
        return any(one.share < 1 for one in self.apart.models)

    @property
    def num_gpus(self) -> int:
        return self.apart.num_gpus + sum(group.size for group in self.together)

    def predicted(self, problem: Problem) -> Kept:
        """What its parts expect: each by the estimator of its own kind."""
        rates = {name: demand.rate_rps for name, demand in problem.demands.items()}
        kept = {
            plan.model: rates[plan.model] * plan.share * plan.seen.attainment
            for plan in self.apart.models
        }
        for group in self.score.groups:
            for part in group.parts:
                kept[part.model] = kept.get(part.model, 0.0) + part.goodput_rps
        least = min(rps / rates[model] for model, rps in kept.items())
        goodput_rps = sum(kept.values())
        return Kept(goodput_rps, goodput_rps / sum(rates.values()), least)

    def price(self, problem: Problem, objective: Objective) -> float:
        """GPUs, dollars per hour or watts. Raises ConfigError where a kind does not say."""
        pools = self.rest.problem.pools
        together = sum(group.size * objective.of(pools[group.pool].gpu) for group in self.together)
        return phase_plan.price(problem, self.apart.gpus, objective) + together


def apart_units(problem: Problem, plan: PhasePlan) -> tuple[UnitSpec, ...] | None:
    """The units of models that are apart; None where the nodes are too small for them."""
    taken: Counter[int] = plan.gpus
    if any(taken[pool.index] > pool.num_gpus for pool in problem.pools):
        return None
    try:
        return phase_plan.to_placement(problem, plan).units
    except ConfigError:
        return None


def to_placement(problem: Problem, mix: Mix) -> Placement:
    """All units on GPUs by number, those with roles first.

    Raises ConfigError where the nodes are too small, which a search has made sure of.
    """
    apart = phase_plan.to_placement(problem, mix.apart).units
    together = assign.to_placement(mix.rest.problem, mix.together, mix.score).units
    both = {one.model for one in mix.apart.models if one.share < 1}
    return Placement(tuple(_weighed(u, both) for u in apart + mix.rest.moved(together)))


def _weighed(unit: UnitSpec, both: Collection[str]) -> UnitSpec:
    """With shares of traffic that a router can compare, for models that are apart and colocated."""
    parts = tuple(
        msgspec.structs.replace(part, traffic=max(1e-6, part.expected.rate_rps))
        if part.name in both and part.expected is not None
        else part
        for part in unit.models
    )
    return msgspec.structs.replace(unit, models=parts)
