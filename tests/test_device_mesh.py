"""A model over two ranks on devices says what the CPU's engine says on one rank.

Real ranks, each a process with the device's code, on `torch.device("cpu")`: gloo stands in for
NCCL, and CUDA graphs are played by a class that repeats calls.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import msgspec  # noqa: E402
from torch.distributed import HashStore  # noqa: E402

from muxrt.config.placement import (  # noqa: E402
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
    UnitModel,
    UnitSpec,
)
from muxrt.config.shard import Shard  # noqa: E402
from muxrt.core import Batch, Phase, Result, Work  # noqa: E402
from muxrt.engine.build import UnitPlan  # noqa: E402
from muxrt.engine.messages import UnitBoot  # noqa: E402
from muxrt.models.device_llama import DeviceLlama  # noqa: E402
from muxrt.worker import device_mesh  # noqa: E402
from muxrt.worker.boot import load_shapes, plan_boot  # noqa: E402
from muxrt.worker.collectives import CPU as HERE  # noqa: E402
from muxrt.worker.collectives import GroupRanks  # noqa: E402
from muxrt.worker.device_lanes import Shares  # noqa: E402
from muxrt.worker.device_mesh import (  # noqa: E402
    Guard,
    Overdue,
    Turns,
    open_device_lanes,
)
from muxrt.worker.executor import LaneExecutor  # noqa: E402
from muxrt.worker.flight import Flight, Share, Span  # noqa: E402
from muxrt.worker.lanes import LaneDied  # noqa: E402
from muxrt.worker.load import open_on_device, warm_up  # noqa: E402
from muxrt.worker.mesh import rank_device  # noqa: E402
from tests.device_mesh_world import on_devices  # noqa: E402
from tests.device_world import device_llamas  # noqa: E402
from tests.mesh_world import Compute, alone  # noqa: E402
from tests.played_graphs import BUDGET_BYTES, Repeated, playing  # noqa: E402
from tests.rank_worlds import (  # noqa: E402
    CASES,
    SETTING,
    draw_and_score,
    serve_a_crowd,
    serve_prompts_again,
    step_of,
)
from tests.real_world import DEMO, MODELS, demo_plan  # noqa: E402
from tests.test_worker_process import children  # noqa: E402
from tests.worker_world import SHAPES, Desk, Reference, Seat, make_plan, write_models  # noqa: E402

# -- the three demo models -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> Iterator[Compute]:
    """On two ranks of two lanes."""
    plan = demo_plan(MODELS, tp=2, **SETTING)
    with on_devices(plan, {m: DEMO / m for m in MODELS}) as executor:
        yield alone(executor)


@pytest.mark.parametrize(("scheduling", "count", "longest", "output"), CASES)
def test_two_ranks_give_the_tokens_of_one(
    two: Compute, scheduling: dict[str, Any], count: int, longest: int, output: int
) -> None:
    replayed = Repeated.replayed
    serve_a_crowd(two, scheduling, count, longest, output)
    assert Repeated.replayed > replayed, "no step came from a graph"


def test_cached_prefixes_lie_on_every_rank(two: Compute) -> None:
    serve_prompts_again(two)


def test_it_draws_and_scores_as_one_rank_does(two: Compute) -> None:
    draw_and_score(two)


# -- both lanes at once ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def folders(home: Path) -> dict[str, Path]:
    return {name: home / name for name in SHAPES}


LANES = Lanes(kind="stream", sm_pct=(60, 40))


def test_busy_lanes_do_not_wait_for_each_other_nor_for_the_other_rank_s_graphs(home: Path) -> None:
    """Works of both lanes and copies, in random orders, several in flight on each.

    The other rank's graphs are larger than the budget, two of them; ours would all fit. Alone it
    would drop some, run those steps again, and exchange with a rank that replays.
    """
    plan = make_plan(home, 4, LANES, tp=2)
    rng, reference = np.random.default_rng(1), Reference(home)
    with on_devices(plan, folders(home), graph_bytes=(10, BUDGET_BYTES // 2 + 1)) as executor:
        desk = Desk(plan)
        desk.copy_lane = 2
        for _ in range(4):
            seats = {
                lane: [desk.seat(("wide", "narrow")[lane], 20) for _ in range(3)] for lane in (0, 1)
            }
            for step in range(12):
                works = []
                for lane in rng.permutation([0, 0, 1, 1]).tolist():
                    some = seats[lane][: 1 + step % 3] if step > 1 else seats[lane]
                    works.append(desk.batch(lane, [(seat, step_of(seat)) for seat in some]))
                run(executor, desk, *works)
            run(executor, desk, desk.swap_out(seats[0][0]))
            run(executor, desk, desk.swap_in(seats[0][0]), desk.decode(1, *seats[1]))
            # Lanes change hands.
            run(executor, desk, desk.decode(1, *seats[0]), desk.decode(0, *seats[1]))
            for seat in seats[0] + seats[1]:
                reference.check_greedy(seat.model, seat.prompt, seat.outputs)
                desk.leave(seat)


def run(executor: LaneExecutor, desk: Desk, *works: Work) -> None:
    for work, result in zip(works, executor.run(works), strict=True):
        desk.note(work, result)


def test_lanes_keep_their_part_of_the_device_while_others_rest(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the others do is not the same on all ranks at every moment, and the graph must be."""
    caplog.set_level("INFO")
    whole, own = ([Share(name, torch.cpu.Stream(), 4)] * 2 for name in ("whole", "own"))
    monkeypatch.setattr(device_mesh, "open_shares", lambda *_: Shares(whole, own))
    monkeypatch.setattr(device_mesh, "open_steps", playing(0))
    plan = make_plan(home, 2, LANES)
    with ExitStack() as stack:
        lines = [GroupRanks(HashStore(), "alone", Shard(), 30.0) for _ in range(3)]
        for line in lines:
            stack.callback(line.close)
        lost: list[Exception] = []
        llamas = device_llamas(home)
        lanes = open_device_lanes(plan, llamas, lines, HERE, lost.append, stack)
        desk = Desk(plan)
        seat = desk.seat("wide", 5)
        executor = stack.enter_context(LaneExecutor(lanes, ExitStack()))
        run(executor, desk, desk.batch(0, [(seat, 5)]))
        for _ in range(3):
            run(executor, desk, desk.decode(0, seat))
    assert not lost
    assert "share='own'" in caplog.text and "share='whole'" not in caplog.text


def test_logits_that_are_not_finite_fail_their_batch_alone(home: Path) -> None:
    """Only the first rank draws: it finds them behind the last exchange."""
    plan, llamas = make_plan(home, 4, LANES, tp=2), dict[str, DeviceLlama]()
    with on_devices(plan, folders(home), kept=llamas) as executor:
        desk = Desk(plan)
        seat = desk.seat("wide", 5)
        head = llamas["wide"].head.weight
        kept = head.clone()
        head.fill_(torch.nan)
        (result,) = executor.run([desk.batch(0, [(seat, 5)])])
        assert result.error is not None and "not finite" in result.error
        head.copy_(kept)
        good = desk.seat("wide", 5)
        run(executor, desk, desk.batch(0, [(good, 5)]), desk.batch(0, [(good, 1)]))
    Reference(home).check_greedy("wide", good.prompt, good.outputs)


# -- ranks that are lost ---------------------------------------------------------------------


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_ends_the_mesh(home: Path, sign: signal.Signals) -> None:
    plan = hasty(make_plan(home, 4, LANES, tp=2))
    before = set(children(os.getpid()))
    with on_devices(plan, folders(home)) as executor:
        desk = Desk(plan)
        (other,) = set(children(os.getpid())) - before
        seat = desk.seat("wide", 5)
        run(executor, desk, desk.batch(0, [(seat, 5)]))
        os.kill(other, sign)
        with pytest.raises(LaneDied, match="mesh is broken"):
            go_on(executor, desk, seat)
    assert set(children(os.getpid())) == before


def test_a_lane_that_hangs_alone_ends_the_mesh(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process moves, and no exchange is timed: as when a graph waits for another rank's."""
    plan, over = hasty(make_plan(home, 4, LANES, tp=2)), Event()

    def hang(flight: Flight) -> Result:
        assert over.wait(60)
        return Result()

    with on_devices(plan, folders(home)) as executor:
        desk = Desk(plan)
        seat = desk.seat("wide", 5)
        for tokens in (5, 1):
            run(executor, desk, desk.batch(0, [(seat, tokens)]))
        monkeypatch.setattr(Flight, "wait", hang)
        try:
            with pytest.raises(LaneDied, match="a work of lane 0 does not end"):
                executor.run([desk.decode(0, seat)], timeout_s=30)
        finally:
            over.set()


def hasty(plan: UnitPlan) -> UnitPlan:
    """Its ranks wait for each other for a second."""
    mesh = msgspec.structs.replace(plan.spec.mesh, timeout_s=1.0)
    return replace(plan, spec=msgspec.structs.replace(plan.spec, mesh=mesh))


def go_on(executor: LaneExecutor, desk: Desk, seat: Seat) -> None:
    for _ in range(50):
        executor.run([desk.decode(0, seat)])


class Line:
    """Nobody is at its other end."""

    patient = 0  # how often

    def patiently(self) -> AbstractContextManager[None]:
        self.patient += 1
        return nullcontext()


def flight(read: Callable[[float], Result]) -> Flight:
    span = Span(HERE)
    span.end()
    return Flight(span, read)


def work(lane: int, number: int = 0) -> Batch:
    return Batch(number, lane, "m", Phase.DECODE, ())


class Rank:
    """Lanes of one rank, and why they were lost."""

    def __init__(self, tick_s: float) -> None:
        self.line = Line()
        self.lost: list[Exception] = []
        self.missed = Event()
        self.turns = Turns()
        self.overdue = Overdue(tick_s, self.lose)

    def lose(self, error: Exception) -> None:
        self.lost.append(error)
        self.missed.set()

    def guard(self, lane: int, timeout_s: float = 60.0) -> Guard:
        line: Any = self.line
        return Guard(lane, line, self.turns, self.overdue, timeout_s, self.lose)


@pytest.fixture
def rank() -> Iterator[Rank]:
    found = Rank(tick_s=0.01)
    yield found
    found.overdue.close()


def test_lanes_launch_in_the_order_in_which_works_were_told(rank: Rank) -> None:
    launched: list[int] = []

    def launcher(lane: int) -> Callable[[Work], Flight]:
        def launch(work: Work) -> Flight:
            launched.append(lane)
            return flight(lambda seconds: Result())

        return rank.guard(lane).over(launch)

    order = [0, 1, 1, 0, 2, 1, 0, 0, 2, 1]
    for lane in order:
        rank.turns.tell(lane)

    def live(lane: int) -> None:
        launch = launcher(lane)
        for number in range(order.count(lane)):
            launch(work(lane, number))

    threads = [Thread(target=live, args=(lane,)) for lane in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launched == order


def test_a_work_that_fails_to_launch_gives_its_turn_away(rank: Rank) -> None:
    def launch(work: Work) -> Flight:
        raise ValueError("no")

    for lane in (0, 1):
        rank.turns.tell(lane)
        with pytest.raises(ValueError, match="no"):
            rank.guard(lane).over(launch)(work(lane))
    assert [str(error) for error in rank.lost] == ["no", "no"]


def test_a_work_that_does_not_end_is_missed(rank: Rank) -> None:
    """As where a graph replays an exchange to which another rank does not come."""

    def read(seconds: float) -> Result:
        assert rank.missed.wait(60)
        return Result()

    reads = iter([lambda seconds: Result(), read])
    launch = rank.guard(1, timeout_s=0.05).over(lambda work: flight(next(reads)))
    for _ in range(2):  # the first of its kind may take longer, and who is behind it
        rank.turns.tell(1)
        launch(work(1)).wait()
    assert rank.line.patient == 1
    assert [str(error) for error in rank.lost] == ["a work of lane 1 does not end"]


# -- all that a unit's process does ----------------------------------------------------------


def test_a_unit_loads_and_warms_up_on_two_devices(
    home: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """On the CPU in the GPUs' place."""
    caplog.set_level("INFO")
    unit = UnitSpec(
        name="unit",
        models=tuple(UnitModel(name=name) for name in SHAPES),
        memory=Memory(kv_bytes=4 << 20, swap_bytes=1 << 20),
        mesh=Mesh(device="gpu", gpus=(0, 1)),
        lanes=LANES,
        scheduling=Scheduling(max_sequences=16),
    )
    specs = tuple(ModelSpec(name=name, path=str(home / name)) for name in SHAPES)
    boot = UnitBoot(unit=unit, models=specs, endpoint="inproc://none", identity="unit#1")
    shapes = load_shapes(boot)
    plan = plan_boot(boot, 2, shapes)
    with open_on_device(boot, plan, shapes, HERE, lambda _: None) as executor:
        warm_up(plan, executor, lambda _: None)
    assert caplog.text.count("event=weights_read") == 2 and "rank=0" in caplog.text
    assert capfd.readouterr().err.count("rank=1 bytes=") == 2


def test_ranks_have_the_gpus_that_the_mesh_lists() -> None:
    mesh, first = Mesh(device="gpu", gpus=(3, 1)), torch.device("cuda", 3)
    assert [rank_device(mesh, first, rank) for rank in range(2)] == ["cuda:3", "cuda:1"]
    assert rank_device(mesh, None, 1) is None
