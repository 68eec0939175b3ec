"""A disaggregated placement: instances of each phase for each model, on GPUs of nodes by number."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from muxrt.config.cluster import GpuKind
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
from muxrt.errors import ConfigError
from muxrt.planner.disaggregate import Split
from muxrt.planner.phase_catalog import kv_bytes
from muxrt.planner.phases import Instance, Seen
from muxrt.planner.workload import Problem


class Objective(StrEnum):
    """What goodput is divided by."""

    GPU = "gpu"
    DOLLAR = "dollar"
    WATT = "watt"

    def of(self, kind: GpuKind) -> float:
        """What one GPU counts. Raises ConfigError where the kind does not say."""
        value = {"gpu": 1.0, "dollar": kind.price_per_hour, "watt": kind.power_w}[self.value]
        if not value:
            key = "price_per_hour" if self is Objective.DOLLAR else "power_w"
            raise ConfigError(
                f"{kind.name} has no {key}, which goodput per {self.value} needs: describe it in"
                " cluster.kinds"
            )
        return value


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model's instances; `split` is one cell where there are several `copies` of it."""

    model: str
    prefill_pool: int
    decode_pool: int
    split: Split
    copies: int
    seen: Seen  # what the simulation of a cell at its share of the rate gave
    reason: str
    share: float = 1.0  # of the model's requests; the others are colocated

    @property
    def gpus(self) -> Counter[int]:
        """By pool."""
        split, found = self.split, Counter[int]()
        found[self.prefill_pool] += self.copies * split.num_prefill * split.prefill.gpus
        found[self.decode_pool] += self.copies * split.num_decode * split.decode.gpus
        return found


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """All models."""

    models: tuple[ModelPlan, ...]

    @property
    def gpus(self) -> Counter[int]:
        """By pool."""
        return sum((model.gpus for model in self.models), Counter[int]())

    @property
    def num_gpus(self) -> int:
        return self.gpus.total()

    @property
    def is_simulated_only(self) -> bool:
        """Whether some instance has pipeline stages."""
        return any(max(m.split.prefill.pp, m.split.decode.pp) > 1 for m in self.models)


@dataclass(frozen=True, slots=True)
class _Member:
    """An instance that is to be placed."""

    plan: ModelPlan
    role: str
    number: int
    instance: Instance
    pool: int


Segment = tuple[int, int]  # number of a member, its stage


def to_placement(problem: Problem, plan: PhasePlan) -> Placement:
    """A unit for each instance. Raises ConfigError where the nodes are too small for what is left.

    Segments that must share a node are placed together, the largest first, each in the fullest
    node that takes them.
    """
    members: list[_Member] = []
    blocks: list[tuple[int, int, list[Segment]]] = []  # GPUs, pool, segments
    for model in plan.models:
        for copy in range(model.copies):
            _add_cell(members, blocks, model, copy)
    at = _positions(problem, members, blocks)
    return Placement(
        tuple(_unit(problem, member, at[index]) for index, member in enumerate(members))
    )


def _add_cell(
    members: list[_Member],
    blocks: list[tuple[int, int, list[Segment]]],
    model: ModelPlan,
    copy: int,
) -> None:
    split = model.split
    sides = (
        ("prefill", split.num_prefill, split.prefill, model.prefill_pool),
        ("decode", split.num_decode, split.decode, model.decode_pool),
    )
    first = len(members)
    for role, num, instance, pool in sides:
        for number in range(num):
            members.append(_Member(model, role, copy * num + number, instance, pool))
    mine = range(first, len(members))
    if split.nodes is None:
        for index in mine:
            instance, pool = members[index].instance, members[index].pool
            blocks += [(instance.tp, pool, [(index, s)]) for s in range(instance.pp)]
        return
    for node in range(split.nodes):
        segments = [
            (index, stage)
            for index in mine
            for stage in range(members[index].instance.pp)
            if stage * split.nodes // members[index].instance.pp == node
        ]
        size = sum(members[index].instance.tp for index, _ in segments)
        blocks.append((size, model.prefill_pool, segments))


def _positions(
    problem: Problem, members: list[_Member], blocks: list[tuple[int, int, list[Segment]]]
) -> list[dict[int, tuple[int, tuple[int, ...]]]]:
    """For each member its stages: node and GPUs."""
    free: list[int] = []
    nodes: dict[int, range] = {}
    for pool in problem.pools:
        nodes[pool.index] = range(len(free), len(free) + pool.num_nodes)
        free += [pool.gpus_per_node] * pool.num_nodes
    found: list[dict[int, tuple[int, tuple[int, ...]]]] = [{} for _ in members]
    for size, pool_index, segments in sorted(blocks, key=lambda block: -block[0]):
        fitting = [node for node in nodes[pool_index] if free[node] >= size]
        if not fitting:
            pool = problem.pools[pool_index]
            raise ConfigError(
                f"no node of {pool.gpus_per_node} {pool.gpu.name} has {size} GPUs left for"
                f" {members[segments[0][0]].plan.model}, expected one more node"
            )
        node = min(fitting, key=lambda node: free[node])
        for index, stage in segments:
            first = problem.pools[pool_index].gpus_per_node - free[node]
            gpus = tuple(range(first, first + members[index].instance.tp))
            found[index][stage] = (node, gpus)
            free[node] -= len(gpus)
    return found


def _unit(
    problem: Problem, member: _Member, stages: dict[int, tuple[int, tuple[int, ...]]]
) -> UnitSpec:
    instance, plan = member.instance, member.plan
    placed = [stages[stage] for stage in range(instance.pp)]
    apart = instance.pp > 1
    nodes = tuple(node for node, _ in placed)
    room = kv_bytes(problem, plan.model, member.pool, instance.tp, instance.pp)
    total = plan.copies * (
        plan.split.num_prefill if member.role == "prefill" else plan.split.num_decode
    )
    rate_rps = problem.demands[plan.model].rate_rps * plan.share
    seen = plan.seen
    return UnitSpec(
        name=f"{plan.model}-{member.role}-{member.number}",
        models=(
            UnitModel(
                name=plan.model,
                role="prefill" if member.role == "prefill" else "decode",
                expected=Expected(
                    rate_rps=round(rate_rps / total, 6),
                    goodput_rps=round(rate_rps / total * seen.attainment, 6),
                    attainment=round(seen.attainment, 4),
                    ttft_s=round(seen.ttft_s, 6),
                    tpot_s=round(seen.tpot_s, 6),
                ),
            ),
        ),
        memory=Memory(kv_bytes=room * instance.gpus),
        mesh=Mesh(
            device="gpu",
            kind=problem.pools[member.pool].gpu.name,
            node=None if apart else nodes[0],
            gpus=tuple(gpu for _, gpus in placed for gpu in gpus),
            pp=instance.pp,
            nodes=nodes if apart else None,
        ),
        lanes=Lanes(kind="stream"),
        scheduling=Scheduling(
            policy="fcfs",
            prefill_tokens=instance.saturating_tokens,
            max_sequences=instance.limits.sequences,
        ),
    )


Left = Counter[int]  # GPUs by pool
Plans = Callable[[Problem, str, Left], Sequence[ModelPlan]]


def price(problem: Problem, gpus: Mapping[int, int], objective: Objective) -> float:
    """What so many GPUs of each pool count. Raises ConfigError where their kind does not say."""
    return sum(count * objective.of(problem.pools[pool].gpu) for pool, count in gpus.items())


def fits(plan: ModelPlan, left: Mapping[int, int]) -> bool:
    """Whether so many GPUs of each pool suffice."""
    return all(gpus <= left[pool] for pool, gpus in plan.gpus.items())


def plan_models(problem: Problem, plans_of: Plans, objective: Objective) -> PhasePlan:
    """Each model in turn, the most traffic first: of its plans the least that fits what is left.

    Raises ConfigError where one finds no room.
    """
    left = every_gpu(problem)
    found: dict[str, ModelPlan] = {}
    for model in by_traffic(problem):
        plans = plans_of(problem, model, left)
        fitting = [plan for plan in plans if fits(plan, left)]
        if not fitting:
            raise _no_room(problem, model, plans, left)
        found[model] = min(fitting, key=lambda plan: price(problem, plan.gpus, objective))
        left -= found[model].gpus
    return PhasePlan(tuple(found[model] for model in problem.demands))


def every_gpu(problem: Problem) -> Left:
    """All that there are."""
    return Counter({pool.index: pool.num_gpus for pool in problem.pools})


def by_traffic(problem: Problem) -> list[str]:
    """Models, the most traffic first."""
    return sorted(problem.demands, key=lambda m: (-problem.demands[m].rate_rps, m))


def _no_room(problem: Problem, model: str, plans: Sequence[ModelPlan], left: Left) -> ConfigError:
    """One line for a model that is left without."""
    demand = problem.demands[model]
    need = min((plan.gpus.total() for plan in plans), default=None)
    text = "no instances keep them"
    if need is not None:
        text = f"the least is {need} GPUs, found {left.total()} left"
    return ConfigError(
        f"{model}: found no room for prefill and decode instances that keep"
        f" ttft_s {demand.slo.ttft_s:g} and tpot_s {demand.slo.tpot_s:g} at"
        f" {demand.rate_rps:g} requests/s: {text}"
    )
