"""A linear picture of capacity, for searches to start from: each model takes a share of a mesh.

A model's capacity on a mesh is the rate that it could be given alone there with its targets kept.
Several models fit a mesh as long as their rates over their capacities add up to one: less than what
sharing allows, as peaks even out, so it is a start and never a verdict. The verdict is `value`.
"""

from dataclasses import dataclass

from muxrt.planner.draft import Group, Part
from muxrt.planner.meshes import Mesh
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.workload import Problem

ATTAINMENT = 0.9
NUM_BISECTIONS = 10
LARGEST_RPS = 1e4
# So small that a hundredth of today's goodput outweighs a fifth of what may never come.
HEADROOM = 0.05
PEAK = 1.15  # goodput of an overloaded mesh over its capacity at the attainment above
DOUBLE = 2.0  # rates may be wrong by that much


@dataclass(frozen=True, slots=True)
class Lanes:
    """The best lanes of a group: `prefill_pct`, and what the group is worth with them."""

    prefill_pct: int | None
    goodput_rps: float
    doubled_rps: float  # goodput at twice the rates

    @property
    def value(self) -> float:
        """Goodput, and a little of the goodput at twice the rates: headroom decides ties."""
        return self.goodput_rps + HEADROOM * self.doubled_rps


class Capacity:
    """Capacities of one problem, and the best lanes of groups; answers are kept."""

    def __init__(self, problem: Problem, estimator: QueueingJudge) -> None:
        self._problem = problem
        self._estimator = estimator
        self._rps: dict[tuple[int, Mesh], float] = {}
        self._lanes: dict[tuple[object, ...], Lanes] = {}

    def rps(self, model: str, mesh: Mesh) -> float:
        """Requests/s of a model alone on a mesh; 0 where it does not fit or misses its targets."""
        key = (self._problem.likes[model], mesh)
        kept = self._rps.get(key)
        if kept is None:
            fits = self._problem.fits(*mesh, (model,))
            kept = self._rps[key] = self._find(model, mesh) if fits else 0.0
        return kept

    def _find(self, model: str, mesh: Mesh) -> float:
        low, high = 0.0, 1.0
        while high < LARGEST_RPS and self._keeps(model, mesh, high):
            low, high = high, 2 * high
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._keeps(model, mesh, middle) else (low, middle)
        return low

    def _keeps(self, model: str, mesh: Mesh, rate_rps: float) -> bool:
        """Whether the targets are kept at that rate with some choice of lanes."""
        group = Group(*mesh, (Part(model, rate_rps / self.rate_rps(model)),))
        found = self._estimator.with_lanes(group, self._pcts(group), (1.0,))
        return max(rps for (rps,) in found) >= ATTAINMENT * rate_rps

    def rate_rps(self, model: str) -> float:
        """What is offered of a model, over all its replicas."""
        return self._problem.demands[model].rate_rps

    def share(self, mesh: Mesh, model: str, rate_rps: float) -> float:
        """Share of a mesh that so much of a model's traffic takes."""
        rps = self.rps(model, mesh)
        return rate_rps / rps if rps else 1e3

    def load(self, group: Group, without: str | None = None) -> float:
        """Share of a mesh that its models take together, `without` one of them."""
        mesh, demands, total = (group.pool, group.size), self._problem.demands, 0.0
        for part in group.parts:
            if part.model != without:
                rate_rps = demands[part.model].rate_rps * part.traffic
                total += self.share(mesh, part.model, rate_rps)
        return total

    def lanes(self, group: Group) -> Lanes:
        """The lanes that are worth most; those that the group has do not matter."""
        key = self._estimator.key(group)
        kept = self._lanes.get(key)
        if kept is None:
            pcts = self._pcts(group)
            found = self._estimator.with_lanes(group, pcts, (1.0, DOUBLE))
            choices = [Lanes(pct, *rps) for pct, rps in zip(pcts, found, strict=True)]
            kept = self._lanes[key] = max(choices, key=lambda lanes: lanes.value)
        return kept

    def _pcts(self, group: Group) -> tuple[int | None, ...]:
        return self._problem.pools[group.pool].prefill_pcts

    def tuned(self, group: Group) -> Group:
        """The group with its best lanes."""
        parts = tuple(Part(part.model, part.traffic) for part in group.parts)
        return Group(group.pool, group.size, parts, self.lanes(group).prefill_pct)

    def guess(self, group: Group) -> float:
        """What the best lanes would be worth if capacities added up: quicker, and not so true."""
        offered = self.most_value(group) / (1 + DOUBLE * HEADROOM)
        load = max(self.load(group), 1e-9)
        return offered * (min(1, PEAK / load) + HEADROOM * min(DOUBLE, PEAK / load))

    def offered_rps(self, group: Group) -> float:
        """The traffic of a group."""
        demands = self._problem.demands
        return sum(demands[part.model].rate_rps * part.traffic for part in group.parts)

    def most_value(self, group: Group) -> float:
        """What no lanes can exceed: everything is served."""
        return self.offered_rps(group) * (1 + DOUBLE * HEADROOM)
