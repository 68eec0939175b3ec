"""The device's engine on a GPU: tokens, graphs, lanes, what is left behind. `pytest -m gpu`."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
pytest.importorskip("transformers")

import triton.language as tl  # noqa: E402

from muxrt.config.placement import Lanes  # noqa: E402
from muxrt.core import Work  # noqa: E402
from muxrt.models.device_llama import DeviceLlama  # noqa: E402
from muxrt.worker.device_build import open_device_executor  # noqa: E402
from muxrt.worker.device_process import PIPE_DIRECTORY  # noqa: E402
from muxrt.worker.device_streams import device_sms, open_green  # noqa: E402
from muxrt.worker.driver import open_driver  # noqa: E402
from muxrt.worker.graphs import CudaGraph  # noqa: E402
from muxrt.worker.green import share_out  # noqa: E402
from tests.real_world import MODELS, RealWorld, prompts  # noqa: E402
from tests.test_worker_lanes import Held  # noqa: E402
from tests.worker_world import SHAPES, Desk, Reference, make_plan, write_models  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
# What the driver and the allocator may keep of one opening for the next.
SLACK_BYTES = 64 * MIB


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture
def device() -> Iterator[Any]:
    yield torch.device("cuda", 0)
    torch.cuda.synchronize()


def llamas(home: Path, device: Any) -> dict[str, DeviceLlama]:
    return {name: DeviceLlama.load(home / name, torch.float32, device) for name in SHAPES}


def test_greedy_tokens_are_the_cpu_engine_s(device: Any) -> None:
    """The demo models in float32, all at once, with swaps; both engines make the same decisions."""
    found = []
    for where in (None, device):
        world = RealWorld(
            device=where, depth=2, max_sequences=16, num_groups=1.0, swap_groups=2.0, preempt="swap"
        )
        for model in MODELS:
            for prompt in prompts(model, 8, longest=150):
                world.submit(model, prompt, 24)
        found.append([served.tokens for served in world.run().served.values()])
    assert found[0] == found[1]


def serve(desk: Desk, executor: Any) -> list[Any]:
    """Both models side by side, a prompt each, and decode steps of which some are in flight."""
    seats = [desk.seat("wide", 21), desk.seat("narrow", 9)]
    lanes = range(desk.plan.num_lanes)

    def do(*works: Work) -> None:
        for one, result in zip(works, executor.run(works), strict=True):
            desk.note(one, result)

    for lane, seat in enumerate(seats):
        do(desk.batch(lane % len(lanes), [(seat, len(seat.prompt))]))
    for _ in range(20):
        pairs = [(lane % len(lanes), seat) for lane, seat in enumerate(seats)]
        do(*(desk.decode(lane, seat) for lane, seat in pairs for _ in range(2)))
    desk.copy_lane = len(lanes)
    do(desk.swap_out(seats[0]))
    do(desk.swap_in(seats[0]))
    do(desk.decode(0, seats[0]))
    return seats


@pytest.mark.parametrize("kind", ["green", "stream", "mps"])
@pytest.mark.parametrize("sm_pct", [(100,), (60, 40)])
def test_lanes_serve_what_transformers_would(
    home: Path, device: Any, kind: str, sm_pct: tuple[int, ...]
) -> None:
    if kind == "mps" and not (Path(PIPE_DIRECTORY) / "control").exists():
        pytest.skip("no MPS daemon: scripts/mps.sh start")
    lanes = Lanes(kind=kind, sm_pct=sm_pct)  # type: ignore[arg-type]
    desk = Desk(make_plan(home, planes_per_block=2, lanes=lanes))
    with open_device_executor(desk.plan, llamas(home, device), device) as executor:
        seats = serve(desk, executor)
    reference = Reference(home)
    for seat in seats:
        reference.check_greedy(seat.model, seat.prompt, seat.outputs)


def test_graphs_give_what_launches_one_by_one_give(home: Path, device: Any) -> None:
    found = []
    for graph_bytes in (0, 512 * MIB):
        lanes = Lanes(kind="stream")
        plan = make_plan(home, planes_per_block=2, lanes=lanes, graph_bytes=graph_bytes)
        desk = Desk(plan)
        with open_device_executor(plan, llamas(home, device), device) as executor:
            found.append([seat.outputs for seat in serve(desk, executor)])
    assert found[0] == found[1]


class Doubled:
    """A step on a buffer."""

    def __init__(self, device: Any) -> None:
        self.x = torch.ones(1 << 20, device=device)

    def run(self) -> None:
        self.x.mul_(2.0)


def test_a_capture_does_nothing_and_a_replay_all(device: Any) -> None:
    """What the CPU's tests let another class stand in for."""
    step, stream = Doubled(device), torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        graph = CudaGraph(torch.cuda.graph_pool_handle())
        graph.capture(step.run)
        stream.synchronize()
        assert float(step.x[0]) == 1.0
        for _ in range(3):
            graph.replay()
        stream.synchronize()
    assert float(step.x[-1]) == 8.0


def test_a_budget_for_graphs_is_kept(home: Path, device: Any) -> None:
    """Graphs that were dropped leave their memory to the next."""
    plan = make_plan(home, lanes=Lanes(kind="stream"), graph_bytes=1)
    desk = Desk(plan)
    with open_device_executor(plan, llamas(home, device), device) as executor:
        seats = [desk.seat("wide", 5) for _ in range(6)]
        work = desk.batch(0, [(seat, 5) for seat in seats])
        desk.note(work, executor.run([work])[0])

        def steps() -> int:
            """Each bucket twice, so that its graph takes the place of the one before."""
            for size in (1, 1, 2, 2, 4, 4, 6, 6):
                work = desk.decode(0, *seats[:size])
                desk.note(work, executor.run([work])[0])
            torch.cuda.synchronize()
            reserved: int = torch.cuda.memory_reserved(device)
            return reserved

        steps()
        before = steps()
        for _ in range(4):
            assert steps() - before < 8 * MIB


@triton.jit
def note_sm(out, spins):  # type: ignore[no-untyped-def]
    """Which SM each program ran on, after some time of nothing."""
    program = tl.program_id(0)
    lane = tl.arange(0, 1)
    total = lane
    for i in range(spins):
        total += (total * 1664525 + i) & 1023
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r,r", [total], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.store(out + program + lane, sm)


@pytest.mark.parametrize("percents", [(60, 40), (20, 30, 50)])
def test_green_lanes_run_on_disjoint_sms(device: Any, percents: tuple[int, ...]) -> None:
    with ExitStack() as stack:
        urgent = [0] + [-1] * (len(percents) - 1)
        counts = share_out(*device_sms(device), percents)
        shares = open_green(open_driver(), device, counts, urgent, stack)
        outs = []
        for share in shares:
            out = torch.full((64 * share.sm_count,), -1, dtype=torch.int32, device=device)
            torch.cuda.synchronize()
            with torch.cuda.stream(share.stream):
                note_sm[(len(out),)](out, 20000)
            outs.append(out)
        torch.cuda.synchronize()
        seen = [set(out.tolist()) for out in outs]
    total = torch.cuda.get_device_properties(device).multi_processor_count
    assert sum(share.sm_count for share in shares) == total
    assert [len(sms) for sms in seen] == [share.sm_count for share in shares]
    assert len(set().union(*seen)) == total, "an SM served two lanes"


def test_a_graph_keeps_the_sms_of_its_capture(device: Any) -> None:
    """Replayed on a stream of the whole device, it stays where it was captured."""
    with ExitStack() as stack:
        counts = share_out(*device_sms(device), (50, 50))
        first, _ = open_green(open_driver(), device, counts, [0, 0], stack)
        out = torch.full((64 * 132,), -1, dtype=torch.int32, device=device)
        note_sm[(len(out),)](out, 10)  # compiled before the capture
        torch.cuda.synchronize()
        graph = CudaGraph(torch.cuda.graph_pool_handle())
        with torch.cuda.stream(first.stream):
            graph.capture(lambda: note_sm[(len(out),)](out, 20000))
        whole = torch.cuda.Stream(device)
        with torch.cuda.stream(whole):
            graph.replay()
        torch.cuda.synchronize()
        assert len(set(out.tolist())) == first.sm_count


@pytest.mark.parametrize("kind", ["green", "stream", "mps"])
def test_fifty_openings_leave_nothing_behind(home: Path, device: Any, kind: str) -> None:
    if kind == "mps" and not (Path(PIPE_DIRECTORY) / "control").exists():
        pytest.skip("no MPS daemon: scripts/mps.sh start")
    lanes = Lanes(kind=kind, sm_pct=(60, 40))  # type: ignore[arg-type]
    plan = make_plan(home, lanes=lanes)
    models = llamas(home, device)
    times = 5 if kind == "mps" else 50  # a process takes seconds to start

    def open_and_close() -> None:
        desk = Desk(plan)
        with open_device_executor(plan, dict(models), device) as executor:
            seat = desk.seat("wide", 5)
            work = desk.batch(0, [(seat, 5)])
            desk.note(work, executor.run([work])[0])

    def free_bytes() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(device)[0]
        return free

    for _ in range(2):
        open_and_close()
    before, free = Held.now(), free_bytes()
    for _ in range(times):
        open_and_close()
    after = Held.now()
    assert (after.descriptors, after.threads, after.children) == (
        before.descriptors,
        before.threads,
        before.children,
    )
    assert free - free_bytes() < SLACK_BYTES
