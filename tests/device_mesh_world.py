"""Meshes of two ranks on devices: this process is rank 0, the other one a process of its own.

With the CPU as either's device gloo stands in for NCCL, and graphs are played.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from muxrt.config.model import load_shape
from muxrt.config.placement import ModelSpec
from muxrt.config.shard import Shard
from muxrt.engine.build import UnitPlan
from muxrt.models.device_llama import DeviceLlama
from muxrt.worker import device_mesh, rank_processes
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.mesh import open_mesh
from tests.played_graphs import playing
from tests.played_rank import GRAPH_BYTES
from tests.worker_world import CORES

CPU = torch.device("cpu")


@contextmanager
def on_devices(
    plan: UnitPlan,
    folders: Mapping[str, Path],
    graph_bytes: tuple[int, int] = (0, 0),
    kept: dict[str, DeviceLlama] | None = None,
    device: torch.device = CPU,
) -> Iterator[LaneExecutor]:
    """The unit of `plan`, its models in float32.

    `graph_bytes`: what a graph that is played takes on each rank; `kept` gets the first rank's
    models; `device` is the first rank's.
    """
    specs = [ModelSpec(name=name, path=str(folders[name]), dtype="float32") for name in plan.models]
    shapes = {name: load_shape(folders[name]) for name in plan.models}

    def load(shard: Shard) -> dict[str, DeviceLlama]:
        llamas = {
            name: DeviceLlama.load(folders[name], torch.float32, device, shard=shard)
            for name in plan.models
        }
        if kept is not None:
            kept.update(llamas)
        return llamas

    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(patch.object(rank_processes, "MODULE", "tests.played_rank"))
            stack.enter_context(patch.object(device_mesh, "open_steps", playing(graph_bytes[0])))
            stack.enter_context(patch.dict(os.environ, {GRAPH_BYTES: str(graph_bytes[1])}))
        executor = open_mesh(plan, specs, shapes, CORES * plan.num_lanes, load, device=device)
    with executor:
        yield executor
