"""Two ranks on two GPUs, with NCCL: tokens, lanes, graphs, ranks that are lost. `pytest -m gpu`."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("transformers")

from dataclasses import replace  # noqa: E402

import msgspec  # noqa: E402
from torch.distributed import HashStore  # noqa: E402

from muxrt.config.placement import Lanes, Mesh  # noqa: E402
from muxrt.config.shard import Shard  # noqa: E402
from muxrt.engine.build import UnitPlan  # noqa: E402
from muxrt.worker.collectives import GroupRanks  # noqa: E402
from muxrt.worker.graphs import CudaGraph  # noqa: E402
from muxrt.worker.lanes import LaneDied  # noqa: E402
from tests.device_mesh_world import on_devices  # noqa: E402
from tests.mesh_world import alone  # noqa: E402
from tests.rank_worlds import SETTING, assert_same, submit  # noqa: E402
from tests.real_world import DEMO, MODELS, RealWorld, demo_plan  # noqa: E402
from tests.test_device_mesh import go_on  # noqa: E402
from tests.test_gpu_engine import serve  # noqa: E402
from tests.test_shards import together  # noqa: E402
from tests.test_worker_process import children  # noqa: E402
from tests.worker_world import SHAPES, Desk, Reference, make_plan, write_models  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"found {torch.cuda.device_count()} GPUs, needs two"
    ),
]
MIB = 1 << 20
MESH = Mesh(device="gpu", gpus=(0, 1))
FIRST = torch.device("cuda", 0)


def meshed(plan: UnitPlan, mesh: Mesh = MESH) -> UnitPlan:
    """The same on two GPUs."""
    return replace(plan, spec=msgspec.structs.replace(plan.spec, mesh=mesh))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def folders(home: Path) -> dict[str, Path]:
    return {name: home / name for name in SHAPES}


def test_greedy_tokens_are_the_cpu_engine_s() -> None:
    """The demo models in float32, in crowds that are swapped, and in chunks."""
    plan = meshed(demo_plan(MODELS, tp=2, **SETTING))
    with on_devices(plan, {m: DEMO / m for m in MODELS}, device=FIRST) as executor:
        for scheduling in ({"prefill_tokens": 32}, {"preempt": "swap"}):
            worlds = [
                RealWorld(**SETTING, **scheduling),
                RealWorld(tp=2, compute=alone(executor), **SETTING, **scheduling),
            ]
            for world in worlds:
                submit(world, 10, 600, 50)
                world.run()
            assert_same(*worlds)


@pytest.mark.parametrize("kind", ["green", "stream"])
@pytest.mark.parametrize("graph_bytes", [0, 512 * MIB])
def test_two_lanes_serve_what_transformers_would(home: Path, kind: Any, graph_bytes: int) -> None:
    """Collectives of both lanes side by side, launched one by one and in graphs; swaps beside."""
    lanes = Lanes(kind=kind, sm_pct=(60, 40))
    plan = meshed(make_plan(home, 4, lanes, tp=2, graph_bytes=graph_bytes))
    with on_devices(plan, folders(home), device=FIRST) as executor:
        seats = serve(Desk(plan), executor)
    reference = Reference(home)
    for seat in seats:
        reference.check_greedy(seat.model, seat.prompt, seat.outputs)


def test_graphs_hold_exchanges() -> None:
    """Captured and replayed: a sum, shared tokens and joined rows, on the stream of the capture."""
    store = HashStore()

    def work(rank: int) -> None:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        line = GroupRanks(store, "test", Shard(rank, 2), 30.0, device)
        values = torch.ones(1000, device=device)
        tokens = torch.full((8,), rank, dtype=torch.int32, device=device)
        part = torch.full((4, 100), rank + 1.0, device=device)
        found: list[Any] = []

        def step() -> None:
            line.add(values)
            line.share(tokens)
            found[:] = [line.join(part, 200)]

        with torch.cuda.stream(torch.cuda.Stream(device)) as stream:
            step()
            graph = CudaGraph(torch.cuda.graph_pool_handle())
            graph.capture(step)
            torch.cuda.current_stream().synchronize()
            assert float(values[0]) == 2.0, "a capture does nothing"
            for _ in range(3):
                graph.replay()
            torch.cuda.current_stream().synchronize()
        del stream
        assert float(values[-1]) == 16.0 and not tokens.any()
        assert (found[0] is None) == (rank == 1)
        if found[0] is not None:
            assert found[0][0, [0, 99, 100, 199]].tolist() == [1, 1, 2, 2]
        del graph
        line.close()

    together(work)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_ends_the_mesh(home: Path, sign: signal.Signals) -> None:
    lanes = Lanes(kind="stream", sm_pct=(60, 40))
    mesh = msgspec.structs.replace(MESH, timeout_s=2.0)
    plan = meshed(make_plan(home, 4, lanes, tp=2, graph_bytes=512 * MIB), mesh)
    before = set(children(os.getpid()))
    with on_devices(plan, folders(home), device=FIRST) as executor:
        desk = Desk(plan)
        (other,) = set(children(os.getpid())) - before
        seat = desk.seat("wide", 5)
        (result,) = executor.run([desk.batch(0, [(seat, 5)])])
        assert result.error is None
        os.kill(other, sign)
        with pytest.raises(LaneDied, match="mesh is broken"):
            go_on(executor, desk, seat)
    assert set(children(os.getpid())) == before
