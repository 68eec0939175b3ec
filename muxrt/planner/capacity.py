"""A linear picture of capacity, for searches to start from: each model takes a share of a mesh.

A model's capacity on a mesh is the rate that it could be given alone there with its targets kept.
Several models fit a mesh as long as their rates over their capacities add up to one: less than what
sharing allows, as peaks even out, so it is a start and never a verdict.
"""

from muxrt.planner.draft import Group, Part
from muxrt.planner.meshes import Mesh
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.workload import Problem

# Prefill lanes that are tried, per cent of the SMs; None: in turns on one lane.
PREFILL_PCTS = (None, 30, 50, 70)
ATTAINMENT = 0.9
NUM_BISECTIONS = 10
LARGEST_RPS = 1e4
# So small that a hundredth of today's goodput outweighs a fifth of what may never come.
HEADROOM = 0.05
PEAK = 1.15  # goodput of an overloaded mesh over its capacity at the attainment above


class Capacity:
    """Capacities of one problem, and the best lanes of groups; answers are kept."""

    def __init__(self, problem: Problem, estimator: QueueingJudge) -> None:
        self._problem = problem
        self._estimator = estimator
        self._kept: dict[tuple[int, Mesh], float] = {}
        self._doubled = estimator.scaled(dict.fromkeys(problem.demands, 2.0))

    def rps(self, model: str, mesh: Mesh) -> float:
        """Requests/s of a model alone on a mesh; 0 where it does not fit or misses its targets."""
        key = (self._problem.likes[model], mesh)
        if key not in self._kept:
            fits = self._problem.fits(*mesh, (model,))
            self._kept[key] = self._find(model, mesh) if fits else 0.0
        return self._kept[key]

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
        groups = (Group(*mesh, (Part(model),), pct) for pct in PREFILL_PCTS)
        return any(
            self._estimator.at_rate(group, rate_rps).goodput_rps >= ATTAINMENT * rate_rps
            for group in groups
        )

    def load(self, group: Group, without: str | None = None) -> float:
        """Share of a mesh that its models take together, `without` one of them."""
        total = 0.0
        for part in group.parts:
            if part.model != without:
                rps = self.rps(part.model, (group.pool, group.size))
                rate = self._problem.demands[part.model].rate_rps * part.traffic
                total += rate / rps if rps else 1e3
        return total

    def tuned(self, group: Group) -> Group:
        """The group with the lanes that serve twice its rates best, so its rates as well."""
        parts = tuple(Part(part.model, part.traffic) for part in group.parts)
        best, most = None, -1.0
        for pct in PREFILL_PCTS:
            choice = Group(group.pool, group.size, parts, pct)
            goodput = self._doubled.group(choice).goodput_rps
            if best is not None and goodput < most and pct != PREFILL_PCTS[1]:
                break  # more for prefills helps no longer
            if goodput > most:
                best, most = choice, goodput
        assert best is not None
        return best

    def value(self, group: Group) -> float:
        """Goodput, and a little of the goodput at twice the rates: headroom decides ties."""
        score = self._estimator.group(group).goodput_rps
        return score + HEADROOM * self.doubled_rps(group)

    def goodput_rps(self, group: Group) -> float:
        """Goodput of a group as the estimator sees it."""
        return self._estimator.group(group).goodput_rps

    def doubled_rps(self, group: Group) -> float:
        """Goodput of a group at twice the rates."""
        return self._doubled.group(group).goodput_rps

    def guess(self, group: Group) -> float:
        """What `value` would be if capacities added up: much quicker, and not so true."""
        offered = self.most_value(group) / (1 + 2 * HEADROOM)
        load = max(self.load(group), 1e-9)
        return offered * (min(1, PEAK / load) + HEADROOM * min(2, PEAK / load))

    def most_value(self, group: Group) -> float:
        """What `value` cannot exceed: everything is served."""
        demands = self._problem.demands
        offered = sum(demands[part.model].rate_rps * part.traffic for part in group.parts)
        return offered * (1 + 2 * HEADROOM)
