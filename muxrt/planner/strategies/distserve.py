"""DistServe: prefill and decode instances of each model, for the most goodput per GPU.

Both of its algorithms are tried on every kind of GPU (`planner/disaggregate.py`); what keeps the
goal at the model's rate on the fewest GPUs, dollars or watts is taken. With `compat` it is what the
paper's simulator would choose: its flaws, ceil(R / goodput), and one prefill and one decode
instance per cell of a node.
"""

from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from math import ceil

from muxrt.planner.disaggregate import (
    Phases,
    Space,
    Split,
    fewest,
    for_rate,
    low_affinity,
    phases,
    published,
)
from muxrt.planner.phase_catalog import catalog_of, judge_of, space_of
from muxrt.planner.phase_plan import ModelPlan, Objective, PhasePlan, plan_models
from muxrt.planner.phases import COMPAT, Judge, Rules, Seen
from muxrt.planner.workload import Problem


class Affinity(StrEnum):
    """Where the two instances of a request may lie."""

    AUTO = "auto"
    HIGH = "high"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of a disaggregated placement."""

    affinity: Affinity = Affinity.AUTO
    most_stages: int = 1  # pipeline stages; more than one can only be simulated
    attainment: float = 0.9
    objective: Objective = Objective.GPU
    compat: bool = False

    @property
    def rules(self) -> Rules:
        return COMPAT if self.compat else Rules()


def distserve(problem: Problem, options: Options | None = None) -> PhasePlan:
    """Every model disaggregated. Raises ConfigError where one finds no room."""
    asked = options or Options()
    return plan_models(problem, partial(instance_plans, asked), asked.objective)


def instance_plans(
    options: Options, problem: Problem, model: str, left: Counter[int]
) -> list[ModelPlan]:
    """What each algorithm takes of each kind of GPU, whether or not so many are left.

    Without pipeline stages `left` makes no difference, but where less than two are.
    """
    found = []
    judge = judge_of(problem, model, options.attainment, options.rules)
    for pool in problem.pools:
        space = space_of(problem, model, pool.index)
        nodes = min(space.num_nodes, left[pool.index] // space.gpus_per_node)
        if left[pool.index] < 2:
            continue
        space = replace(space, num_nodes=max(1, nodes))
        if options.affinity is not Affinity.LOW:
            found += _high(problem, model, pool.index, space, judge, options)
        if options.affinity is not Affinity.HIGH:
            found += _low(problem, model, pool.index, space, judge, options)
    return found


def _high(
    problem: Problem, model: str, pool: int, space: Space, judge: Judge, options: Options
) -> list[ModelPlan]:
    """Algorithm 1 at the model's rate; nothing where no instance keeps a target."""
    catalog = catalog_of(problem, model, pool, inside=False, most_stages=options.most_stages)
    found = phases(catalog, space, judge)
    if found.is_empty:
        return []
    rate_rps = problem.demands[model].rate_rps
    gpus = space.gpus_per_node * space.num_nodes
    best = published(found, rate_rps) if options.compat else fewest(found, judge, rate_rps, gpus)
    return [] if best is None else [_plan(problem, model, pool, best, 1, judge, _why(found))]


def _low(
    problem: Problem, model: str, pool: int, space: Space, judge: Judge, options: Options
) -> list[ModelPlan]:
    """Algorithm 2: ceil(R / goodput) copies of the best cell."""
    catalog = catalog_of(problem, model, pool, inside=True, most_stages=options.most_stages)
    best = low_affinity(catalog, space, judge)
    if best is None or best.goodput_rps <= 0:
        return []
    rate_rps = problem.demands[model].rate_rps
    copies = ceil(rate_rps / best.goodput_rps)
    if copies == 1 and not options.compat:
        smaller = for_rate(best, judge, rate_rps)
        best = smaller if smaller is not None and smaller.gpus < best.gpus else best
    reason = (
        f"KV stays in a node: {best.per_gpu:.2f} requests/s per GPU in cells of {best.gpus} GPUs"
    )
    return [_plan(problem, model, pool, best, copies, judge, reason)]


def _plan(
    problem: Problem, model: str, pool: int, split: Split, copies: int, judge: Judge, reason: str
) -> ModelPlan:
    rate_rps = problem.demands[model].rate_rps / copies
    if copies * split.gpus > problem.pools[pool].num_gpus:  # it is for the message
        return ModelPlan(model, pool, pool, split, copies, Seen(0.0, 0.0, 0.0), reason)
    seen = judge.see_split(
        split.prefill, split.num_prefill, split.decode, split.num_decode, rate_rps
    )
    return ModelPlan(model, pool, pool, split, copies, seen, reason)


def _why(found: Phases) -> str:
    """The best of each phase beside the next."""
    sides = []
    for name, rated in (("prefill", found.prefill), ("decode", found.decode)):
        best = rated[0]
        text = f"{name} on {best.instance.name}: {best.per_gpu:.2f} requests/s per GPU"
        if len(rated) > 1:
            text += f" ({rated[1].instance.name}: {rated[1].per_gpu:.2f})"
        sides.append(text)
    return "KV crosses nodes; " + ", ".join(sides)
