"""Weights that leave memory and come back: the same bytes, the same tokens, pages given back."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
from real_world import DEMO

from muxrt.core import Load, Sleep
from muxrt.errors import MuxrtError
from muxrt.kernels import HUGE_BYTES
from muxrt.models.llama import Llama
from muxrt.worker.host_weights import HostWeights, WeightMover
from muxrt.worker.kv_storage import Segment, share_weights

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that holds it, as the system counts."""
    address, found = tensor.data_ptr(), 0
    lines = Path("/proc/self/smaps").read_text().splitlines()
    inside = False
    for line in lines:
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "Rss:":
            found = int(line.split()[1]) * 1024
    return found


def held_bytes(weights: HostWeights) -> int:
    """What the weights take, mapped or not."""
    segment = weights.weights.segment
    if segment.is_private:
        return resident_bytes(segment.tensor())
    return os.fstat(segment.fd).st_blocks * 512


@pytest.fixture(params=[True, False], ids=["private", "shared"])
def moved(request: pytest.FixtureRequest) -> Iterator[tuple[HostWeights, Llama, Llama]]:
    """The weights of a demo model, asleep; the model over them; and one that stayed."""
    stayed = Llama.load(DEMO / "pydoc-s", "float32", weights="int8")
    weights, model = HostWeights.of(
        Llama.load(DEMO / "pydoc-s", "float32", weights="int8"), is_private=request.param
    )
    yield weights, model, stayed
    weights.close()


def test_asleep_it_takes_no_memory_and_awake_the_same_bytes(
    moved: tuple[HostWeights, Llama, Llama],
) -> None:
    weights, model, stayed = moved
    assert held_bytes(weights) == 0
    with ThreadPoolExecutor(2) as threads:
        weights.load(threads)
    assert held_bytes(weights) >= weights.num_bytes - PAGE
    for name, tensor in stayed.state().items():
        assert torch.equal(model.state()[name], tensor), name
    weights.drop()
    assert held_bytes(weights) == 0
    assert not model.norm.any()


def private(stack: ExitStack, num_bytes: int) -> Segment:
    segment = Segment(num_bytes, is_private=True)
    stack.callback(segment.close)
    return segment


def test_pages_of_who_slept_are_taken_over() -> None:
    """The larger one wakes on what two smaller ones left, and on new pages behind it."""
    with ExitStack() as stack:
        ours, first, second, third = (private(stack, pages * HUGE_BYTES) for pages in (4, 1, 2, 4))
        first.tensor().fill_(7)
        second.tensor().fill_(8)
        assert ours.take_pages(0, first) == HUGE_BYTES
        assert ours.take_pages(HUGE_BYTES, second) == 2 * HUGE_BYTES
        assert ours.tensor()[:HUGE_BYTES].eq(7).all()
        assert ours.tensor()[HUGE_BYTES : 3 * HUGE_BYTES].eq(8).all()
        assert not ours.tensor()[3 * HUGE_BYTES :].any()
        assert not first.tensor().any() and not second.tensor().any()
        # What came from several places is several mappings; it all goes on to the next one.
        ours.tensor()[3 * HUGE_BYTES :].fill_(9)
        assert third.take_pages(0, ours) == 4 * HUGE_BYTES
        assert third.tensor()[::HUGE_BYTES].tolist() == [7, 8, 8, 9]
        ours.tensor().fill_(1)  # all can be used as before
        third.tensor().fill_(2)
        assert ours.tensor().eq(1).all()


@pytest.fixture
def sleepers() -> dict[str, HostWeights]:
    """Two models of three huge pages, asleep; what they compute with is told apart by number."""
    models = {}
    for number, name in enumerate(("a", "b"), 1):
        state = {"w": torch.full((3 * HUGE_BYTES,), number, dtype=torch.uint8)}
        models[name] = HostWeights(share_weights(state, is_private=True))
        models[name].drop()
    return models


def spy_on_pages(weights: HostWeights, seen: list[list[int]]) -> None:
    """Note what its pages hold when they are about to be written; zeros: they are new."""
    load = weights.load

    def spied(threads: Executor) -> None:
        seen.append(weights.weights.segment.tensor()[::HUGE_BYTES].tolist())
        load(threads)

    weights.load = spied  # type: ignore[method-assign]


def test_a_model_wakes_on_pages_of_blocks_that_made_room(sleepers: dict[str, HostWeights]) -> None:
    """What lies beside those blocks stays as it is; the next one has the pages of the first."""
    with ExitStack() as stack:
        arena, seen = private(stack, 8 * HUGE_BYTES), list[list[int]]()
        arena.tensor().fill_(5)
        mover = WeightMover(sleepers, arena, HUGE_BYTES // 2, 1)
        stack.callback(mover.close)
        for weights in sleepers.values():
            spy_on_pages(weights, seen)
        mover.run(Load(0, 0, "a", sleepers["a"].num_bytes, first_block=8, end_block=14))
        assert sleepers["a"].weights.segment.tensor().eq(1).all()
        assert arena.tensor()[:: HUGE_BYTES // 2].tolist() == [5] * 8 + [0] * 6 + [5] * 2
        mover.run(Sleep(1, 0, "a", sleepers["a"].num_bytes, makes_room=True))
        mover.run(Load(2, 0, "b", sleepers["b"].num_bytes))
        assert sleepers["b"].weights.segment.tensor().eq(2).all()
        assert not sleepers["a"].weights.segment.tensor().any()
        assert seen == [[5, 5, 5], [1, 1, 1]]


def test_pages_of_who_sleeps_for_nobodys_sake_are_the_systems_to_take(
    sleepers: dict[str, HostWeights],
) -> None:
    """They stay while nobody needs them, for the model itself or for the next one that wakes."""
    with ExitStack() as stack:
        mover, seen = WeightMover(sleepers, private(stack, 0), 1, 1), list[list[int]]()
        stack.callback(mover.close)
        for weights in sleepers.values():
            spy_on_pages(weights, seen)
        home = {name: weights.weights.segment.tensor() for name, weights in sleepers.items()}
        load = {name: Load(0, 0, name, sleepers[name].num_bytes) for name in "ab"}
        sleep = {name: Sleep(1, 0, name, sleepers[name].num_bytes) for name in "ab"}
        mover.run(load["a"])
        before = lazily_free_bytes()
        mover.run(sleep["a"])
        assert lazily_free_bytes() == before + sleepers["a"].num_bytes
        mover.run(load["a"])
        assert lazily_free_bytes() == before and home["a"].eq(1).all()
        mover.run(sleep["a"])
        mover.run(load["b"])
        assert lazily_free_bytes() == before and home["b"].eq(2).all()
        assert not home["a"].any()
        assert seen == [[0, 0, 0], [1, 1, 1], [1, 1, 1]]


def lazily_free_bytes() -> int:
    """Of this process: memory that the system takes when it needs some."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("LazyFree:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such line")


def test_a_segment_that_nobody_closed_leaves_no_descriptor() -> None:
    """Test runs of hand-overs ended with a thousand of them."""
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        Segment(PAGE).tensor().fill_(1)
    assert os.listdir("/proc/self/fd") == before


def test_a_copy_that_is_cut_short_is_noticed(moved: tuple[HostWeights, Llama, Llama]) -> None:
    weights, _, _ = moved
    os.ftruncate(weights._copy, weights.num_bytes // 2)
    with ThreadPoolExecutor(2) as threads, pytest.raises(MuxrtError, match="cannot be read"):
        weights.load(threads)
