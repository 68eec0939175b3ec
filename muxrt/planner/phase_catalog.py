"""Instances of a problem's models, for the searches of disaggregated placements."""

from functools import cache

from muxrt.planner.disaggregate import Catalog, Space
from muxrt.planner.phase_tables import Limits, Overheads, costs_of
from muxrt.planner.phases import Instance, Judge, Link, Rules, draw, saturating_tokens
from muxrt.planner.workload import Problem

MOST_SEQUENCES = 1024  # that decode together, in tables
DECODES = 64  # sequences of a batch whose activations go from stage to stage


def space_of(problem: Problem, model: str, pool: int) -> Space:
    """What instances of a model may look like on a pool."""
    found = problem.pools[pool]
    layers = problem.demands[model].shape.num_layers
    return Space(problem.tps(model, pool), layers, found.gpus_per_node, found.num_nodes)


def catalog_of(
    problem: Problem, model: str, pool: int, *, inside: bool, most_stages: int = 1
) -> Catalog:
    """Instances by tp and pp, None where one does not fit.

    KV leaves by the GPUs' own links where `inside` a node, else by the instance's share of the
    node's network.
    """

    @cache
    def find(tp: int, pp: int) -> Instance | None:
        if pp > most_stages or tp not in problem.tps(model, pool):
            return None
        return _instance(problem, model, pool, tp, pp, inside)

    return find


def judge_of(problem: Problem, model: str, attainment: float, rules: Rules | None = None) -> Judge:
    """A judge of the model's traffic and targets."""
    demand = problem.demands[model]
    traffic = draw(demand.prompt, demand.output, demand.max_tokens)
    return Judge(traffic, demand.slo, attainment, rules)


def kv_tokens(problem: Problem, model: str, pool: int, tp: int, pp: int) -> int:
    """Tokens of KV that an instance holds; below 0 where its weights do not fit."""
    room = kv_bytes(problem, model, pool, tp, pp)
    return room * pp // problem.bytes(model, tp).kv_per_token


def kv_bytes(problem: Problem, model: str, pool: int, tp: int, pp: int) -> int:
    """What is left for KV on each of its GPUs."""
    part, rules = problem.bytes(model, tp), problem.engine.memory
    fixed = rules.processes_per_unit * rules.runtime_bytes + part.runtime + part.activations
    return problem.usable_bytes(pool) - fixed - -(-part.weights // pp)


def _instance(
    problem: Problem, model: str, pool: int, tp: int, pp: int, inside: bool
) -> Instance | None:
    demand, found = problem.demands[model], problem.pools[pool]
    held = kv_tokens(problem, model, pool, tp, pp)
    if held < demand.max_tokens:
        return None
    steps = problem.steps(model, pool, tp, 1.0)
    saturating = saturating_tokens(steps.prefill_s, demand.max_tokens)
    limits = Limits(max(saturating, demand.max_tokens), demand.max_tokens, MOST_SEQUENCES, held)
    network = problem.cluster.network_bytes_per_s * min(1.0, tp * pp / found.gpus_per_node)
    links = found.gpu.link_bytes_per_s * tp * pp
    kv_token = problem.bytes(model, 1).kv_per_token
    link = Link(kv_token / (links if inside else network), demand.shape.num_layers)
    overheads = _hops(problem, model, pool, saturating, pp) if pp > 1 else Overheads()
    costs = costs_of(steps, limits, pp, overheads, problem.engine.control_s)
    return Instance(tp, pp, costs, limits, saturating, link)


def _hops(problem: Problem, model: str, pool: int, tokens: int, pp: int) -> Overheads:
    """Activations that go from one stage to the next, inside a node."""
    shape, gpu = problem.demands[model].shape, problem.pools[pool].gpu
    token_s = shape.hidden_size * problem.engine.memory.dtype_bytes / gpu.link_bytes_per_s
    return Overheads(stage_s=tokens * token_s, round_s=pp * DECODES * token_s)
