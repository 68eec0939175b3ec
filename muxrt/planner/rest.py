"""Part of a cluster as a problem of its own: GPUs that are left in its nodes, and some models."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby

import msgspec

from muxrt.config.cluster import NodeGroup
from muxrt.config.placement import UnitSpec
from muxrt.planner.workload import Problem


@dataclass(frozen=True, slots=True)
class Span:
    """GPUs of one node that follow each other."""

    pool: int
    node: int  # numbered through, pool by pool
    first: int
    gpus: int


Spans = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Rest:
    """A problem whose nodes are these spans, in this order."""

    problem: Problem
    spans: Spans

    def moved(self, units: Iterable[UnitSpec]) -> tuple[UnitSpec, ...]:
        """Units on the nodes of this problem, with the numbers that nodes and GPUs really have."""
        return tuple(self._moved(unit) for unit in units)

    def _moved(self, unit: UnitSpec) -> UnitSpec:
        span, gpus = self.spans[unit.mesh.node or 0], unit.mesh.gpus or ()
        numbers = tuple(span.first + gpu for gpu in gpus)
        mesh = msgspec.structs.replace(unit.mesh, node=span.node, gpus=numbers)
        return msgspec.structs.replace(unit, mesh=mesh)


def whole(problem: Problem) -> Spans:
    """All GPUs."""
    nodes = [pool for pool in problem.pools for _ in range(pool.num_nodes)]
    return tuple(Span(pool.index, node, 0, pool.gpus_per_node) for node, pool in enumerate(nodes))


def left_by(problem: Problem, units: Iterable[UnitSpec]) -> Spans:
    """The GPUs behind those of `units`, none of which has stages."""
    used: Counter[int] = Counter()
    for unit in units:
        node, gpus = unit.mesh.node, unit.mesh.gpus
        assert node is not None and gpus, "planned units say where they are"
        used[node] = max(used[node], 1 + max(gpus))
    return tuple(
        Span(span.pool, span.node, used[span.node], span.gpus - used[span.node])
        for span in whole(problem)
        if span.gpus > used[span.node]
    )


def at_most(spans: Spans, most: int) -> Spans:
    """The first spans with so many GPUs together; the last one of them may be cut."""
    found: list[Span] = []
    for span in spans:
        gpus = min(span.gpus, most)
        if gpus:
            found.append(Span(span.pool, span.node, span.first, gpus))
        most -= gpus
    return tuple(found)


def rest_of(problem: Problem, spans: Spans, models: Collection[str]) -> Rest:
    """These models on these GPUs; alike spans are the nodes of one pool."""
    if spans == whole(problem) and set(models) == set(problem.demands):
        return Rest(problem, spans)  # with all that it has computed so far
    ordered = tuple(sorted(spans, key=lambda span: (span.pool, -span.gpus, span.node)))
    nodes = tuple(
        NodeGroup(gpu=problem.cluster.nodes[pool].gpu, gpus=gpus, count=len(list(alike)))
        for (pool, gpus), alike in groupby(ordered, key=lambda span: (span.pool, span.gpus))
    )
    return Rest(
        problem.part(msgspec.structs.replace(problem.cluster, nodes=nodes), models), ordered
    )
