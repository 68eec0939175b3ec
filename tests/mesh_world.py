"""Meshes of two ranks: this process is rank 0, the other one a process of its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from muxrt.config.model import load_shape
from muxrt.config.placement import ModelSpec
from muxrt.config.shard import Shard
from muxrt.core import Result, Work
from muxrt.engine.build import UnitPlan
from muxrt.models.llama import Llama
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.mesh import open_mesh
from tests.worker_world import CORES

Compute = Callable[[Work], Result]


def cores_of(num_ranks: int, lanes: int) -> list[int]:
    """A core for each lane of each rank; a core twice where there are too few."""
    each = [[CORES[rank % len(CORES)]] * lanes for rank in range(num_ranks)]
    return [core for cores in each for core in cores]


@contextmanager
def mesh(plan: UnitPlan, folders: Mapping[str, Path]) -> Iterator[LaneExecutor]:
    """The unit of `plan`, its models in float32."""
    specs = [ModelSpec(name=name, path=str(folders[name]), dtype="float32") for name in plan.models]
    shapes = {name: load_shape(folders[name]) for name in plan.models}

    def load(shard: Shard) -> dict[str, Llama]:
        return {name: Llama.load(folders[name], "float32", shard=shard) for name in plan.models}

    cores = cores_of(plan.spec.mesh.tp, plan.num_lanes)
    with open_mesh(plan, specs, shapes, cores, load) as executor:
        yield executor


def over(exchange: Any, plan: UnitPlan) -> UnitPlan:
    """The same, its ranks adding up over shared memory or over gloo."""
    mesh = msgspec.structs.replace(plan.spec.mesh, exchange=exchange)
    return replace(plan, spec=msgspec.structs.replace(plan.spec, mesh=mesh))


def alone(executor: LaneExecutor) -> Compute:
    """One work at a time."""

    def compute(work: Work) -> Result:
        (result,) = executor.run([work])
        return result

    return compute
