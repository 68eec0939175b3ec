"""What serving a model's phases apart takes, beside what colocating it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from heapq import nlargest
from math import inf

from muxrt.planner.capacity import Capacity
from muxrt.planner.disaggregate import Split
from muxrt.planner.phase_catalog import judge_of
from muxrt.planner.phase_plan import ModelPlan, every_gpu, price
from muxrt.planner.phases import Judge, Seen
from muxrt.planner.strategies.distserve import Options, instance_plans
from muxrt.planner.strategies.splitwise import machine_plans
from muxrt.planner.workload import Problem

NUM_RATIOS = 4  # of instances, those that phases alone speak for, where there is too much traffic


@dataclass(frozen=True, slots=True)
class Offer:
    """One model's phases apart: DistServe's and Splitwise's plans that keep the goal at its rate.

    Those of either take the least first. `colocated_gpus` are GPUs' worth of its traffic where it
    is colocated, as capacities add up; inf where no mesh keeps its targets.
    """

    model: str
    instances: tuple[ModelPlan, ...]
    machines: tuple[ModelPlan, ...]
    colocated_gpus: float
    judge: Judge

    @property
    def plans(self) -> tuple[ModelPlan, ...]:
        """DistServe's before Splitwise's: narrower instances suit more clusters."""
        return self.instances + self.machines

    @property
    def gpus(self) -> int:
        """What the least takes."""
        return min(plan.gpus.total() for plan in self.plans)

    @property
    def ratio(self) -> float:
        """Goodput per GPU apart over that colocated, at the model's rate."""
        return self.colocated_gpus / self.gpus


def colocated_gpus(problem: Problem, capacity: Capacity, model: str) -> float:
    """GPUs' worth of a model's traffic on the mesh that serves most per GPU; inf: on none."""
    rate_rps = problem.demands[model].rate_rps
    per_gpu = [
        capacity.rps(model, (pool.index, tp)) / tp
        for pool in problem.pools
        for tp in problem.tps(model, pool.index)
    ]
    best = max(per_gpu, default=0.0)
    return rate_rps / best if best else inf


def offer(
    problem: Problem, capacity: Capacity, model: str, options: Options, is_over: Callable[[], bool]
) -> Offer | None:
    """What a model's phases take; None where no instances keep its targets, or the time is up."""
    left = every_gpu(problem)

    def ordered(found: list[ModelPlan]) -> tuple[ModelPlan, ...]:
        return tuple(sorted(found, key=lambda plan: price(problem, plan.gpus, options.objective)))

    instances = ordered(instance_plans(options, problem, model, left))
    machines = () if is_over() else ordered(machine_plans(options, problem, model, left))
    if not instances and not machines:
        return None
    worth = colocated_gpus(problem, capacity, model)
    judge = judge_of(problem, model, options.attainment)
    return Offer(model, instances, machines, worth, judge)


def within(
    problem: Problem, judge: Judge, plan: ModelPlan, most: Mapping[int, int]
) -> ModelPlan | None:
    """The plan's instances in the numbers that serve most on so many GPUs of each pool.

    None where not one of each finds room. Where KV stays in a node they are one cell in one node,
    or whole cells if that is too small a part.
    """
    split, pool, rate_rps = plan.split, plan.prefill_pool, problem.demands[plan.model].rate_rps
    if split.nodes is not None and most[pool] > problem.pools[pool].gpus_per_node:
        copies = most[pool] // split.gpus
        if not copies:
            return None
        seen = _served(judge, split, rate_rps / copies)
        return replace(plan, copies=copies, seen=seen)
    splits = [_numbered(split, n, m) for n, m in _numbers(plan, most)]
    if not splits:
        return None
    found = [(_see(judge, one, rate_rps), one) for one in splits]
    seen, best = max(found, key=lambda item: item[0].attainment)
    if seen.attainment < judge.attainment:
        served = [(_served(judge, one, rate_rps), one) for one in _likely(judge, splits)]
        seen, best = max(served, key=lambda item: item[0].attainment)
    return replace(plan, split=best, copies=1, seen=seen)


def part_of(
    problem: Problem, judge: Judge, plan: ModelPlan, most: Mapping[int, int]
) -> ModelPlan | None:
    """The plan's instances on so many GPUs of each pool, with the requests that they keep the goal
    for; None where not one of each finds room, or they keep it for nobody.
    """
    split, pool, copies = plan.split, plan.prefill_pool, 1
    if split.nodes is not None and most[pool] > problem.pools[pool].gpus_per_node:
        copies = most[pool] // split.gpus
        likely = [split] if copies else []
    else:
        splits = [_numbered(split, n, m) for n, m in _numbers(plan, most)]
        likely = _likely(judge, splits)
    rated = [(_sustained(judge, one), one) for one in likely]
    rps, best = max(rated, key=lambda item: item[0], default=(0.0, split))
    if not rps:
        return None
    share = copies * rps / problem.demands[plan.model].rate_rps
    seen = _see(judge, best, min(1.0, 1 / share) * rps)
    return replace(plan, split=best, copies=copies, seen=seen, share=min(1.0, share))


def _likely(judge: Judge, splits: list[Split]) -> list[Split]:
    """Those that phases alone speak for."""
    if len(splits) <= NUM_RATIOS:
        return splits
    prefill_rps = judge.prefill_rps(splits[0].prefill)
    decode_rps = judge.decode_rps(splits[0].decode)
    return nlargest(
        NUM_RATIOS,
        splits,
        key=lambda one: min(one.num_prefill * prefill_rps, one.num_decode * decode_rps),
    )


def _sustained(judge: Judge, split: Split) -> float:
    return judge.split_rps(split.prefill, split.num_prefill, split.decode, split.num_decode)


def _numbers(plan: ModelPlan, most: Mapping[int, int]) -> list[tuple[int, int]]:
    """Of prefill and decode instances, as many as find room."""
    prefill, decode = plan.split.prefill.gpus, plan.split.decode.gpus
    ours, theirs = most[plan.prefill_pool], most[plan.decode_pool]
    if plan.prefill_pool != plan.decode_pool:
        found = [(ours // prefill, theirs // decode)]
    else:
        found = [(n, (ours - n * prefill) // decode) for n in range(1, ours // prefill + 1)]
    return [(n, m) for n, m in found if n > 0 and m > 0]


def _numbered(split: Split, num_prefill: int, num_decode: int) -> Split:
    return replace(split, num_prefill=num_prefill, num_decode=num_decode)


def _see(judge: Judge, split: Split, rate_rps: float) -> Seen:
    """What requests see at a rate."""
    counts = split.prefill, split.num_prefill, split.decode, split.num_decode
    return judge.see_split(*counts, rate_rps)


def _served(judge: Judge, split: Split, rate_rps: float) -> Seen:
    """The same where there may be too much traffic: what exceeds the goal's rate is refused."""
    seen = _see(judge, split, rate_rps)
    if seen.attainment >= judge.attainment:
        return seen
    rps = _sustained(judge, split)
    if not 0 < rps < rate_rps:
        return seen
    kept = _see(judge, split, rps)
    return replace(kept, attainment=kept.attainment * rps / rate_rps)
