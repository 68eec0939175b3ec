"""Weights that leave memory and come back: the same bytes, the same tokens, pages given back."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
from real_world import DEMO

from muxrt.errors import MuxrtError
from muxrt.models.llama import Llama
from muxrt.worker.host_weights import HostWeights
from muxrt.worker.kv_storage import Segment
from muxrt.worker.pages import HUGE_BYTES

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
    assert resident_bytes(model.norm) == 0
    with ThreadPoolExecutor(2) as threads:
        weights.load(threads)
    assert resident_bytes(model.norm) >= weights.num_bytes - PAGE
    for name, tensor in stayed.state().items():
        assert torch.equal(model.state()[name], tensor), name
    weights.drop()
    assert resident_bytes(model.norm) == 0
    assert not model.norm.any()


def test_pages_of_who_slept_are_taken_over() -> None:
    """The larger one wakes on what the smaller one left, and on new pages behind it."""
    with ExitStack() as stack:
        sizes = [3 * HUGE_BYTES + 5, 2 * HUGE_BYTES + 70]
        ours, theirs = (Segment(size, is_private=True) for size in sizes)
        stack.callback(ours.close)
        stack.callback(theirs.close)
        theirs.tensor().fill_(7)
        assert ours.take_pages(0, theirs) == 2 * HUGE_BYTES
        assert ours.tensor()[: 2 * HUGE_BYTES].eq(7).all()
        assert not ours.tensor()[2 * HUGE_BYTES :].any()
        assert not theirs.tensor()[: 2 * HUGE_BYTES].any()
        assert theirs.tensor()[2 * HUGE_BYTES :].eq(7).all()
        theirs.tensor().fill_(1)  # both can be used as before
        ours.tensor().fill_(2)
        assert theirs.tensor().eq(1).all()


def test_a_copy_that_is_cut_short_is_noticed(moved: tuple[HostWeights, Llama, Llama]) -> None:
    weights, _, _ = moved
    os.ftruncate(weights._copy, weights.num_bytes // 2)
    with ThreadPoolExecutor(2) as threads, pytest.raises(MuxrtError, match="cannot be read"):
        weights.load(threads)
