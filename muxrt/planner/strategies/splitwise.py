"""Splitwise: a pool of whole machines that prefill and one that decodes, of the kinds that suit.

Each instance has a machine's GPUs (tensor parallel, as far as the model divides), every pair of
kinds is tried, and as few machines are taken as keep the goal at the model's rate: for the fewest
GPUs, dollars or watts. (ISCA 2024, sections 4 and 5; its nine SLOs and its designs with their
budgets are in planner/provision.py. No machine changes its pool in a plan, but they borrow from
each other when it is served: engine/pools.py.)
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

from muxrt.planner.disaggregate import Phases, Rated, fewest
from muxrt.planner.phase_catalog import catalog_of, judge_of
from muxrt.planner.phase_plan import ModelPlan, PhasePlan, plan_models
from muxrt.planner.phases import Instance
from muxrt.planner.strategies.distserve import Options
from muxrt.planner.workload import Problem

# Of a batch of prompts: beyond it machines prefill fewer tokens per second (section 4,
# machine-level scheduling).
MOST_PROMPT_TOKENS = 2048


def splitwise(problem: Problem, options: Options | None = None) -> PhasePlan:
    """Every model in two pools of machines. Raises ConfigError where one finds no room."""
    asked = options or Options()
    return plan_models(problem, partial(machine_plans, asked), asked.objective)


def machine_plans(
    options: Options, problem: Problem, model: str, left: Counter[int]
) -> list[ModelPlan]:
    """What each pair of kinds of machines takes, whether or not so many are left."""
    judge = judge_of(problem, model, options.attainment)
    rate_rps = problem.demands[model].rate_rps
    machines = [_machine(problem, model, pool.index) for pool in problem.pools]
    able = [(pool, one) for pool, one in enumerate(machines) if one is not None]
    prefills = [(pool, one) for pool, one in able if judge.prefill_rps(one) > 0]
    decodes = [(pool, one) for pool, one in able if judge.decode_rps(one) > 0]
    found: list[ModelPlan] = []
    for (p, prefill), (d, decode) in product(prefills, decodes):
        pair = Phases(
            (Rated(prefill, judge.prefill_rps(prefill)),),
            (Rated(decode, judge.decode_rps(decode)),),
        )
        split = fewest(pair, judge, rate_rps, problem.num_gpus)
        if split is None:
            continue
        counts = split.num_prefill, split.num_decode
        seen = judge.see_split(prefill, counts[0], decode, counts[1], rate_rps)
        kinds = problem.pools[p].gpu.name, problem.pools[d].gpu.name
        reason = f"prefills on {kinds[0]}, decodes on {kinds[1]}: the least {options.objective}s"
        found.append(ModelPlan(model, p, d, split, 1, seen, reason))
    return found


def _machine(problem: Problem, model: str, pool: int) -> Instance | None:
    """An instance on as many GPUs of a machine as the model divides; None where it does not fit."""
    tps = problem.tps(model, pool)
    found = catalog_of(problem, model, pool, inside=False)(max(tps), 1) if tps else None
    if found is None:
        return None
    return replace(found, saturating_tokens=min(found.saturating_tokens, MOST_PROMPT_TOKENS))
