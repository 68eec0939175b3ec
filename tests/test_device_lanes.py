"""Lanes of a device on the CPU: order, errors, shares, and nothing left behind."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from readable import is_readable

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import msgspec  # noqa: E402

from muxrt.config.placement import (  # noqa: E402
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
    UnitModel,
    UnitSpec,
)
from muxrt.core import Batch, Phase, Result, Work  # noqa: E402
from muxrt.engine.messages import Loading, UnitBoot  # noqa: E402
from muxrt.errors import MuxrtError  # noqa: E402
from muxrt.worker.boot import load_shapes, plan_boot  # noqa: E402
from muxrt.worker.device_build import open_device_executor  # noqa: E402
from muxrt.worker.device_lanes import DeviceLane, Shares  # noqa: E402
from muxrt.worker.device_process import (  # noqa: E402
    DeviceLaneSetup,
    check_mps,
    lane_setups,
)
from muxrt.worker.device_storage import DeviceStorage  # noqa: E402
from muxrt.worker.device_streams import check_device, priorities  # noqa: E402
from muxrt.worker.driver import Driver  # noqa: E402
from muxrt.worker.flight import Flight, Launch, Share, Span  # noqa: E402
from muxrt.worker.lanes import LaneDied  # noqa: E402
from muxrt.worker.load import open_on_device, warm_up  # noqa: E402
from muxrt.worker.process_lane import ProcessLane  # noqa: E402
from tests.device_world import CPU, device_llamas  # noqa: E402
from tests.fake_driver import FakeDriver  # noqa: E402
from tests.test_worker_lanes import Held  # noqa: E402
from tests.worker_world import SHAPES, Desk, Reference, make_plan, write_models  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def work(number: int) -> Batch:
    return Batch(number, 0, "m", Phase.DECODE, ())


class Device:
    """Launches works that are over when the test says so."""

    def __init__(self, read: Callable[[int], Result]) -> None:
        self.over = threading.Semaphore(0)
        self.launched: list[int] = []
        self._read = read

    def launch(self, work: Work) -> Flight:
        assert work.id >= 0, "a batch that cannot be launched"
        self.launched.append(work.id)
        span = Span(CPU)
        span.end()

        def read(seconds: float) -> Result:
            assert self.over.acquire(timeout=60)
            return self._read(work.id)

        return Flight(span, read)


def collect(lane: DeviceLane, number: int) -> list[Result]:

    results: list[Result] = []
    while len(results) < number:
        assert is_readable(lane.fileno(), 60)
        results += lane.collect()
    return results


def test_works_are_launched_before_others_are_over_and_answered_in_order() -> None:
    device = Device(lambda number: Result(tokens=(number,)))
    lane = DeviceLane("lane", lambda: device.launch, CPU)
    for number in range(3):
        lane.launch(work(number))
    device.over.release()
    assert collect(lane, 1)[0].tokens == (0,)
    assert lane.collect() == []
    device.over.release(2)
    assert [result.tokens for result in collect(lane, 2)] == [(1,), (2,)]
    assert device.launched == [0, 1, 2]
    lane.close()


def test_a_work_that_fails_fails_alone() -> None:
    def read(number: int) -> Result:
        if number == 1:
            raise ValueError("no")
        return Result(tokens=(number,))

    device = Device(read)
    device.over.release(3)
    lane = DeviceLane("lane", lambda: device.launch, CPU)
    for number in (0, 1, -1, 2):
        lane.launch(work(number))
    first, second, third, fourth = collect(lane, 4)
    assert (first.tokens, fourth.tokens) == ((0,), (2,))
    assert second.error == "ValueError: no"
    assert "cannot be launched" in (third.error or "")
    lane.close()


def test_a_lost_device_takes_the_unit_with_it() -> None:
    """An error of CUDA stays: whatever is asked of the context fails from then on."""

    def read(number: int) -> Result:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    device = Device(read)
    device.over.release()
    lane = DeviceLane("lane", lambda: device.launch, CPU)
    lane.launch(work(0))
    with pytest.raises(LaneDied, match="the device failed under lane lane"):
        collect(lane, 1)
    lane.close()


def test_a_lane_that_cannot_start_says_why() -> None:
    def make() -> Launch:
        raise MuxrtError("no memory for it")

    lane = DeviceLane("lane", make, CPU)
    with pytest.raises(MuxrtError, match="no memory for it"):
        lane.wait_started()
    lane.close()


def test_a_lane_has_all_of_the_device_while_the_others_rest() -> None:
    whole = [Share("whole", None, 132), Share("whole", None, 132)]
    own = [Share("own", None, 80), Share("own", None, 52)]
    shares = Shares(whole, own)
    shares.launched(0)
    assert shares.choose(0).sm_count == 132
    shares.launched(1)
    assert (shares.choose(0).sm_count, shares.choose(1).sm_count) == (80, 52)
    shares.done(0)
    assert shares.choose(1).sm_count == 132


def test_a_lane_tells_what_it_has_in_flight() -> None:
    shares = Shares([Share("whole", None, 2)] * 2, [Share("own", None, 1)] * 2)
    device = Device(lambda number: Result())
    lane = DeviceLane("lane", lambda: device.launch, CPU, shares, 0)
    lane.launch(work(0))
    assert shares.choose(1).name == "own"
    device.over.release()
    collect(lane, 1)
    assert shares.choose(1).name == "whole"
    lane.close()


def test_decodes_go_before_prefills() -> None:
    assert priorities(1) == [0]
    assert priorities(3) == [0, -1, -1]


@pytest.mark.parametrize("kind", ["green", "stream"])
def test_two_lanes_serve_what_transformers_would(home: Path, kind: str) -> None:
    """Each lane runs its own model; swaps go beside them."""
    lanes = Lanes(kind=kind, sm_pct=(60, 40))  # type: ignore[arg-type]
    desk = Desk(make_plan(home, planes_per_block=2, lanes=lanes))
    desk.copy_lane = 2
    seats = [desk.seat("wide", 11), desk.seat("narrow", 7)]
    with open_device_executor(desk.plan, device_llamas(home), CPU) as executor:

        def do(*works: Work) -> None:
            for one, result in zip(works, executor.run(works), strict=True):
                desk.note(one, result)

        do(*(desk.batch(lane, [(seat, len(seat.prompt))]) for lane, seat in enumerate(seats)))
        for _ in range(4):
            do(*(desk.decode(lane, seat) for lane, seat in enumerate(seats)))
        do(desk.swap_out(seats[0]))
        do(desk.swap_in(seats[0]))
        # The next steps on the other lane.
        do(*(desk.decode(1 - lane, seat) for lane, seat in enumerate(seats)))
    reference = Reference(home)
    for seat in seats:
        assert len(seat.outputs) == 6
        reference.check_greedy(seat.model, seat.prompt, seat.outputs)


def test_fifty_executors_leave_nothing_behind(home: Path) -> None:
    plan = make_plan(home, lanes=Lanes(kind="stream", sm_pct=(50, 50)))
    llamas = device_llamas(home)

    def open_and_close() -> None:
        with open_device_executor(plan, dict(llamas), CPU):
            pass

    open_and_close()
    before = Held.now()
    for _ in range(50):
        open_and_close()
    assert Held.now() == before


def test_mps_needs_its_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with pytest.raises(
        MuxrtError, match=r"no MPS daemon has its pipe in .*: start one with scripts/mps.sh"
    ):
        check_mps()
    (tmp_path / "control").touch()
    check_mps()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_torch_without_a_gpu_is_refused() -> None:
    with pytest.raises(MuxrtError, match="mesh.device: found gpu, but torch"):
        check_device(torch.device("cuda", 0))
    check_device(CPU)


def test_a_unit_loads_and_warms_up_on_a_device(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All that its process does before it is ready, on the CPU in the GPU's place."""
    caplog.set_level("INFO")
    told: list[Loading] = []
    unit = UnitSpec(
        name="unit",
        models=tuple(UnitModel(name=name) for name in SHAPES),
        memory=Memory(kv_bytes=4 << 20, swap_bytes=1 << 20),
        mesh=Mesh(device="gpu"),
        lanes=Lanes(kind="stream", sm_pct=(60, 40)),
        scheduling=Scheduling(max_sequences=16),
    )
    specs = tuple(ModelSpec(name=name, path=str(home / name)) for name in SHAPES)
    boot = UnitBoot(unit=unit, models=specs, endpoint="inproc://none", identity="unit#1")
    shapes = load_shapes(boot)
    plan = plan_boot(boot, 2, shapes)
    with open_on_device(boot, plan, shapes, CPU, told.append) as executor:
        warm_up(plan, executor, told.append)
    stages = [(one.stage, one.model) for one in told if one.done == one.total]
    assert stages == [("weights", "wide"), ("weights", "narrow"), ("warm-up", None)]
    assert len([one for one in told if one.stage == "warm-up"]) == 5  # 2 lanes x 2 models, the end
    assert caplog.text.count("gb_per_s=") == 2


def mps_setups(home: Path) -> list[DeviceLaneSetup]:
    plan = make_plan(home, lanes=Lanes(kind="mps", sm_pct=(70, 50)))
    storage = DeviceStorage(plan, CPU)
    return list(lane_setups(plan, device_llamas(home), storage, Driver(FakeDriver())))


def test_lanes_under_mps_start_from_pieces_of_the_unit_s_memory(home: Path) -> None:
    setups = mps_setups(home)
    assert [setup.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for setup in setups] == ["70", "50"]
    for setup in setups:
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(setup), type=DeviceLaneSetup)
        assert sent == setup
        assert sent.memory.keys() == {"", "wide", "narrow"} == {"", *sent.models}
        plan = sent.plan
        assert sent.memory[""].num_bytes == plan.num_blocks * plan.arena.block_bytes
        assert len(sent.descriptors) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_lane_process_that_has_no_gpu_says_so(home: Path) -> None:
    before = Held.now()
    lane = ProcessLane.start(mps_setups(home)[0])
    try:
        with pytest.raises(MuxrtError, match="lane lane-0 could not start: .*found gpu, but torch"):
            lane.wait_started()
    finally:
        lane.close()
    assert Held.now().children == before.children
