"""Lanes and the executor's life: what they open they give back, whatever happens."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from readable import is_readable

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from muxrt.config.placement import Lanes  # noqa: E402
from muxrt.core import Batch, Phase, Result, SamplingParams, Work  # noqa: E402
from muxrt.errors import ConfigError, MuxrtError  # noqa: E402
from muxrt.kernels import Team  # noqa: E402
from muxrt.worker.build import open_executor  # noqa: E402
from muxrt.worker.executor import LaneExecutor  # noqa: E402
from muxrt.worker.frames import FrameReader, write_frame  # noqa: E402
from muxrt.worker.kv_storage import Segment, Storage, share_weights  # noqa: E402
from muxrt.worker.lanes import LaneDied, Run, ThreadLane, split_cores  # noqa: E402
from tests.worker_world import (  # noqa: E402
    CORES,
    Desk,
    load_models,
    make_plan,
    write_models,
)

SHM = Path("/dev/shm")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@dataclass(frozen=True)
class Held:
    """What this process holds of the machine."""

    descriptors: int
    threads: int  # of the kernel: OpenMP's too
    children: tuple[int, ...]
    mappings: int
    shared: frozenset[str]

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        tasks = list(Path("/proc/self/task").iterdir())
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
        maps = Path("/proc/self/maps").read_text()
        shared = frozenset(entry.name for entry in SHM.iterdir()) if SHM.is_dir() else frozenset()
        return cls(
            len(os.listdir("/proc/self/fd")),
            len(tasks),
            tuple(children),
            maps.count("memfd:muxrt"),
            shared,
        )


def use(executor: LaneExecutor, desk: Desk) -> None:
    seat = desk.seat("wide", 9)
    results = executor.run([desk.batch(0, [(seat, 9)]), desk.decode(0, seat)])
    results += executor.run([desk.swap_out(seat)])
    assert [result.error for result in results] == [None] * 3
    desk.leave(seat)


@pytest.mark.parametrize(("kind", "split"), [("cores", (1, 1)), ("processes", (1,))])
def test_twenty_executors_leave_nothing_behind(home: Path, kind: Any, split: Any) -> None:
    plan = make_plan(home, 8, Lanes(kind=kind, split=split[: len(CORES)]))

    def live(seed: int) -> None:
        with open_executor(plan, load_models(home), CORES) as executor:
            use(executor, Desk(plan, seed))
        executor.close()  # twice does no harm

    live(0)  # what the process keeps for good, it has from here on
    before = Held.now()
    for seed in range(20):
        live(seed)
    assert Held.now() == before


def test_a_lane_starts_where_more_than_1024_files_are_open(home: Path) -> None:
    """It was waited for with `select`, which refuses descriptors from 1,024 on."""
    plan = make_plan(home, lanes=Lanes(kind="processes"))
    with ExitStack() as files:
        for _ in range(1100):
            files.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        with open_executor(plan, load_models(home), CORES) as executor:
            use(executor, Desk(plan))


def test_lanes_that_cannot_start_give_everything_back(home: Path) -> None:
    plan = make_plan(home, lanes=Lanes(kind="processes"))

    def fail() -> None:
        models = load_models(home)
        del models["narrow"]._state["norm"]  # the child will not find it
        with pytest.raises(MuxrtError, match="lane-0 could not start: KeyError"):
            open_executor(plan, models, CORES)

    fail()  # what the process keeps for good, it has from here on
    before = Held.now()
    fail()
    assert Held.now() == before


def test_a_thread_lane_that_cannot_start_says_so() -> None:
    def make(team: Team) -> Run:
        raise ConfigError("no")

    before = threading.active_count()
    lane = ThreadLane("lane-0", CORES[:1], make)
    with pytest.raises(ConfigError, match="no"):
        lane.wait_started()
    lane.close()
    assert threading.active_count() == before


def test_a_lanes_seconds_leave_no_gap_between_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated lanes were idle less often than real ones, whose works took longer than said."""
    now_s = 0.0

    def clock() -> float:  # time passes, whoever looks
        nonlocal now_s
        now_s += 1.0
        return now_s

    def run(work: Work) -> Result:
        nonlocal now_s
        assert is_go.wait(60)
        now_s += 10.0
        return Result()

    monkeypatch.setattr("muxrt.worker.lanes.perf_counter", clock)
    is_go = threading.Event()
    with ExitStack() as stack:
        lane = ThreadLane("muxrt-test", CORES[:1], lambda team: run)
        stack.callback(lane.close)
        lane.wait_started()
        works = [Batch(number, 0, "m", Phase.DECODE, ()) for number in range(5)]
        for work in works:
            lane.launch(work)
        first_s = 1.0  # when the first was launched
        is_go.set()
        results: list[Result] = []
        while len(results) < len(works):
            assert is_readable(lane.fileno(), 60)
            results += lane.collect()
        assert sum(result.elapsed_s for result in results) == now_s - first_s
        now_s += 1000.0  # nothing to do
        lane.launch(works[0])
        assert is_readable(lane.fileno(), 60)
        assert lane.collect()[0].elapsed_s == 11.0


def test_a_killed_lane_process_is_noticed(home: Path) -> None:
    plan = make_plan(home, lanes=Lanes(kind="processes"))
    desk = Desk(plan)
    with open_executor(plan, load_models(home), CORES) as executor:
        use(executor, desk)
        os.kill(executor._lanes[0].pid, 9)  # type: ignore[attr-defined]
        assert is_readable(executor.fileno(), 30)
        with pytest.raises(LaneDied, match=r"of lane lane-0 ended by signal 9"):
            executor.drain()
        seat = desk.seat("wide", 3)
        with pytest.raises(LaneDied):
            executor.run([desk.batch(0, [(seat, 3)])])


def test_a_long_payload_does_not_block_the_loop(home: Path) -> None:
    """A pipe holds 64 KiB: opening slots on a busy lane must not wait for it."""
    plan = make_plan(home, 8, Lanes(kind="processes"))
    desk = Desk(plan)
    bias = dict.fromkeys(range(3, 100), -1.0)
    asked = SamplingParams(temperature=0, logit_bias=bias, stop_token_ids=tuple(range(50_000)))
    results: list[Result] = []
    with open_executor(plan, load_models(home), CORES) as executor:
        for _ in range(8):
            seat = desk.seat("wide", 20, asked)
            executor.launch(desk.batch(0, [(seat, 20)]), lambda _, result: results.append(result))
        while len(results) < 8:
            executor.drain(30.0)
    assert all(result.error is None for result in results)


# -- cores -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "split", "lanes"),
    [
        ((4, 5, 6), None, ((4, 5, 6),)),
        ((4, 5, 6), (1, 2), ((4,), (5, 6))),
        ((4, 5, 6), (1, 1), ((4,), (5,))),
    ],
)
def test_cores_are_dealt_in_order(cores: Any, split: Any, lanes: Any) -> None:
    assert split_cores(cores, split) == lanes


def test_a_split_beyond_the_mesh_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lanes.split: found \[2, 2\], which needs 4 cores"):
        split_cores((0, 1, 2), (2, 2))


def test_lanes_compute_on_their_cores_with_their_own_number_of_threads() -> None:
    """torch keeps one thread count for the process: a lane must not get its neighbour's."""
    if len(CORES) < 2:
        pytest.skip("needs two cores")
    found: dict[str, list[Any]] = {}

    def make(team: Team) -> Run:
        def run(work: Work) -> Result:
            torch.ones(1 << 20).add_(1)  # large enough for OpenMP
            facts = [os.sched_getaffinity(0), torch.get_num_threads(), team.size]
            found[threading.current_thread().name] = facts
            return Result()

        return run

    shares = {"both": CORES[:2], "first": CORES[:1], "second": CORES[1:2]}
    lanes = {name: ThreadLane(name, cores, make) for name, cores in shares.items()}
    work = Batch(0, 0, "none", Phase.DECODE, ())
    for lane in lanes.values():
        lane.wait_started()
    for lane in lanes.values():
        lane.launch(work)
        assert is_readable(lane.fileno(), 30)
        assert [result.error for result in lane.collect()] == [None]
        assert lane.collect() == []
    for lane in lanes.values():
        lane.close()
    assert found == {name: [set(c), len(c), len(c)] for name, c in shares.items()}


# -- memory and frames -------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("is_private", [True, False])
def test_a_segment_takes_pages_when_touched_and_gives_them_back_at_close(is_private: bool) -> None:
    size = 64 << 20
    before = resident_bytes()
    segment = Segment(size, is_private=is_private)
    tensor = segment.tensor()
    assert resident_bytes() - before < size // 4
    tensor.fill_(7)
    assert resident_bytes() - before > size * 3 // 4
    segment.close()
    assert resident_bytes() - before < size // 4
    assert int(tensor[5]) == 0  # a late reader does no harm


def test_two_holders_of_a_segment_see_the_same_bytes() -> None:
    mine = Segment(100)
    theirs = Segment(100, os.dup(mine.fd))
    mine.tensor()[3] = 9
    assert theirs.tensor(torch.int32).tolist()[0] == 9 << 24
    theirs.close()
    assert int(mine.tensor()[3]) == 9
    mine.close()


def test_weights_move_into_shared_memory_as_they_are() -> None:
    state = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(4, 6).t(),  # stored another way round
    }
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    shared = share_weights(state)
    assert not state
    for name, tensor in shared.state().items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name])
        assert tensor.data_ptr() % 64 == 0
    shared.segment.close()


def test_the_models_see_one_arena_in_their_own_dtype(home: Path) -> None:
    storage = Storage(make_plan(home, 8))
    wide, narrow = storage.kv_cache("wide"), storage.kv_cache("narrow")
    assert wide.arena.data_ptr() == narrow.arena.data_ptr()
    assert wide.plane_elems == narrow.plane_elems
    assert (wide.block_tokens, narrow.block_tokens) == (8, 4)
    storage.close()
    half = Storage(make_plan(home, 8, dtype="bfloat16"))
    assert half.kv_cache("wide").arena.dtype == torch.bfloat16
    half.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_frames_arrive_whole_however_the_bytes_come(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    os.set_blocking(receive, False)
    reader = FrameReader(receive)
    assert list(reader.read()) == []
    write_frame(send, b"")
    write_frame(send, b"abc")
    os.write(send, b"\x02\x00")
    assert list(reader.read()) == [b"", b"abc"]
    os.write(send, b"\x00\x00x")
    assert list(reader.read()) == []
    os.write(send, b"y")
    assert list(reader.read()) == [b"xy"]
    assert not reader.is_at_end
