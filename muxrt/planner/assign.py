"""From a draft to a placement: which GPUs of which node, how much KV, which quotas."""

from collections.abc import Sequence
from math import ceil

from muxrt.config.placement import (
    Expected,
    Lanes,
    Memory,
    Mesh,
    Placement,
    Scheduling,
    UnitModel,
    UnitSpec,
)
from muxrt.planner.draft import Draft, Group
from muxrt.planner.queueing import GroupScore, PartScore, Score
from muxrt.planner.station import GOOD
from muxrt.planner.workload import Pool, Problem

MAX_SEQUENCES = 256  # the schema's default
ROOM = 1.5  # times the sequences that run on average


def to_placement(problem: Problem, draft: Draft, score: Score) -> Placement:
    """The units of a draft, on GPUs by number; `kv_bytes` is of all GPUs of a mesh together."""
    meshes = positions(problem, draft)
    units = [
        _unit(problem, number, group, mesh, found)
        for number, (group, mesh, found) in enumerate(zip(draft, meshes, score.groups, strict=True))
    ]
    return Placement(tuple(units))


def in_order(problem: Problem, draft: Draft) -> Draft:
    """The groups as they will lie in the nodes: the widest first, then by traffic."""

    def rate_rps(group: Group) -> float:
        return sum(problem.demands[part.model].rate_rps * part.traffic for part in group.parts)

    return tuple(sorted(draft, key=lambda group: (group.pool, -group.size, -rate_rps(group))))


def overloaded(score: Score) -> set[str]:
    """Models with more traffic than some unit of theirs serves: what would be late is refused."""
    return {
        part.model
        for group in score.groups
        for part in group.parts
        if part.goodput_rps < GOOD * part.rate_rps
    }


def positions(problem: Problem, draft: Draft) -> list[Mesh]:
    """A mesh for each group: largest first, each in the first node with room.

    Nodes are numbered through, pool by pool; GPUs from 0 in each node.
    """
    first_node: list[int] = []
    free: list[int] = []
    for pool in problem.pools:
        first_node.append(len(free))
        free += [pool.gpus_per_node] * pool.num_nodes
    found: dict[int, Mesh] = {}
    for index in sorted(range(len(draft)), key=lambda i: -draft[i].size):
        group = draft[index]
        pool = problem.pools[group.pool]
        start = first_node[group.pool]
        nodes = range(start, start + pool.num_nodes)
        # The fullest that takes it: what is left of a node stays in one piece.
        node = min((n for n in nodes if free[n] >= group.size), key=lambda n: free[n])
        gpu = pool.gpus_per_node - free[node]
        free[node] -= group.size
        found[index] = mesh_of(pool, node, gpu, group.size)
    return [found[index] for index in range(len(draft))]


def mesh_of(pool: Pool, node: int, first: int, size: int) -> Mesh:
    """So many GPUs of a node of the pool, from `first` on."""
    return Mesh(
        device=pool.gpu.device,
        cores=_cores(pool, first, size),
        kind=pool.gpu.name,
        node=node,
        gpus=tuple(range(first, first + size)),
    )


def _cores(pool: Pool, first: int, size: int) -> tuple[int, ...] | None:
    """The cores of so many sets of a CPU; None where one set has all of them, or on a GPU."""
    if not pool.is_cpu or pool.gpus_per_node == 1:
        return None
    return tuple(range(first * pool.gpu.sms, (first + size) * pool.gpu.sms))


def _lanes(pool: Pool, prefill_pct: int | None) -> Lanes:
    if pool.is_cpu:
        cores = pool.gpu.sms
        first = cores if prefill_pct is None else round(cores * prefill_pct / 100)
        return Lanes(kind="cores", split=tuple(part for part in (first, cores - first) if part))
    if prefill_pct is None:
        return Lanes(kind="stream")
    return Lanes(kind="green", sm_pct=(prefill_pct, 100 - prefill_pct))


def _unit(problem: Problem, number: int, group: Group, mesh: Mesh, score: GroupScore) -> UnitSpec:
    by_name = {part.model: part for part in score.parts}
    scores = [by_name[part.model] for part in group.parts]
    room = problem.kv_bytes(group.pool, group.size, group.models)
    pct = group.prefill_pct
    running = max((part.batch for part in scores), default=0.0)
    return UnitSpec(
        name=f"unit-{number}",
        models=tuple(
            UnitModel(
                name=part.model,
                quota=quota,
                traffic=part.traffic,
                sm_pct=None if part.decode_pct is None else (pct or 100, part.decode_pct),
                expected=_expected(found),
            )
            for part, found, quota in zip(
                group.parts, scores, quotas(problem, group, scores, room), strict=True
            )
        ),
        memory=Memory(kv_bytes=room * group.size),
        mesh=mesh,
        lanes=_lanes(problem.pools[group.pool], pct),
        scheduling=Scheduling(
            prefill_tokens=problem.engine.memory.prefill_tokens,
            max_sequences=max(MAX_SEQUENCES, ceil(ROOM * running)),
        ),
    )


def quotas(problem: Problem, group: Group, scores: Sequence[PartScore], room: int) -> list[float]:
    """Shares of the KV: one longest sequence each, the rest by what runs on average."""
    longest, used = [], []
    for part, score in zip(group.parts, scores, strict=True):
        demand = problem.demands[part.model]
        token = problem.bytes(part.model, group.size).kv_per_token
        longest.append(token * demand.max_tokens)
        used.append(token * demand.context * max(score.batch, 1e-3))
    rest = room - sum(longest)
    shares = [
        (least + rest * use / sum(used)) / room for least, use in zip(longest, used, strict=True)
    ]
    # Rounded down, so that they never add up to more than one.
    return [max(1e-6, int(share * 1e6) / 1e6) for share in shares]


def _expected(score: PartScore) -> Expected:
    served = score.admitted_rps > 0
    return Expected(
        rate_rps=round(score.rate_rps, 6),
        goodput_rps=round(score.goodput_rps, 6),
        attainment=round(score.goodput_rps / score.rate_rps, 4) if score.rate_rps else 0.0,
        ttft_s=round(score.ttft_s, 6) if served else 0.0,
        tpot_s=round(score.tpot_s, 6) if served else 0.0,
    )
