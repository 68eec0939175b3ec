"""Blocks of one process read by another one, and what is said where that cannot be."""

import importlib.util
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
import torch

from muxrt import kernels
from muxrt.errors import ConfigError, TransferFailed
from muxrt.worker import torch_transport
from muxrt.worker.kv_storage import Segment
from muxrt.worker.torch_transport import TorchTransport
from muxrt.worker.transfer import Transport
from muxrt.worker.transports import NixlTransport, SharedTransport

BLOCK_BYTES, NUM_BLOCKS = 4096, 64
HOLDER = """
import sys
from pathlib import Path
from muxrt.worker.kv_storage import Segment
from muxrt.worker.transports import NixlTransport, SharedTransport
kind, out, num_bytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
arena = Segment(num_bytes)
numbers = arena.tensor().view(-1)
numbers.copy_(__import__("torch").arange(num_bytes) % 251)
if kind == "nixl":
    held = NixlTransport("p#1", numbers)
elif kind == "gloo":
    from muxrt.worker.torch_transport import TorchTransport
    held = TorchTransport(numbers)
else:
    held = SharedTransport(arena.fd, num_bytes)
out.with_suffix(".part").write_bytes(held.peer())
out.with_suffix(".part").rename(out)
sys.stdin.read()
"""


def open_transport(kind: str, arena: Segment) -> Transport:
    if kind == "shared":
        return SharedTransport(arena.fd, arena.num_bytes)
    if kind == "gloo":
        return TorchTransport(arena.tensor())
    if importlib.util.find_spec("nixl") is None:
        pytest.skip("NIXL is not installed")
    return NixlTransport("d#1", arena.tensor())


@pytest.mark.parametrize("kind", ["shared", "nixl", "gloo"])
def test_blocks_of_another_process_are_read_until_it_dies(kind: str, tmp_path: Path) -> None:
    num_bytes = BLOCK_BYTES * NUM_BLOCKS
    arena, file = Segment(num_bytes), tmp_path / "peer"
    ours = open_transport(kind, arena)
    with holder_of(kind, file, num_bytes) as holder:
        peer, want = file.read_bytes(), (np.arange(num_bytes) % 251).reshape(NUM_BLOCKS, -1)
        random = np.random.default_rng(0)
        for _ in range(3):
            theirs, into = (random.permutation(NUM_BLOCKS)[:20].astype(np.int32) for _ in range(2))
            ours.read("p#1", peer, theirs, BLOCK_BYTES, arena.tensor(), into)
            read = arena.tensor().numpy().reshape(NUM_BLOCKS, -1)[into]
            assert np.array_equal(read, want[theirs])
        room = ours.scratch(3 * BLOCK_BYTES)
        ours.read("p#1", peer, np.int32([7, 8, 3]), BLOCK_BYTES, room, np.int32([0, 1, 2]))
        assert np.array_equal(room.numpy().reshape(3, -1), want[[7, 8, 3]])
        holder.kill()
        holder.wait()
        for _ in range(2):
            with pytest.raises(TransferFailed, match=r"p#1"):
                ours.read("p#1", peer, np.int32([1]), BLOCK_BYTES, room, np.int32([0]))
    ours.close()
    arena.close()


@contextmanager
def holder_of(kind: str, file: Path, num_bytes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Another process with an arena; its peer is in `file`."""
    command = [sys.executable, "-c", HOLDER, kind, str(file), str(num_bytes)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        wait(file.exists, holder)
        yield holder
    finally:
        holder.kill()
        holder.wait()


def test_a_group_that_broke_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_transport, "READ_TIMEOUT_S", 2.0)
    monkeypatch.setattr(torch_transport, "CONNECT_TIMEOUT_S", 0.5)
    num_bytes = BLOCK_BYTES * NUM_BLOCKS
    want = (np.arange(num_bytes) % 251).reshape(NUM_BLOCKS, -1)
    arena = Segment(num_bytes)
    ours = TorchTransport(arena.tensor())
    room, ids = ours.scratch(2 * BLOCK_BYTES), np.int32([0, 1])

    def read(peer: bytes, *blocks: int, unit: str = "p#1") -> None:
        ours.read(unit, peer, np.array(blocks, np.int32), BLOCK_BYTES, room, ids)
        assert np.array_equal(room.numpy().reshape(2, -1), want[[*blocks]])

    with holder_of("gloo", tmp_path / "one", num_bytes) as one:
        peer = (tmp_path / "one").read_bytes()
        with holder_of("gloo", tmp_path / "two", num_bytes):
            other = (tmp_path / "two").read_bytes()
            read(peer, 3, 4)
            read(other, 7, 1, unit="q#1")
            one.send_signal(signal.SIGSTOP)
            for _ in range(2):  # a group that is there, and one that cannot be made
                with pytest.raises(TransferFailed, match="gloo cannot read from p#1"):
                    read(peer, 3, 4)
            read(other, 9, 0, unit="q#1")
            one.send_signal(signal.SIGCONT)
            read(peer, 5, 6)
            with pytest.raises(TransferFailed):  # it refuses what it does not have, and goes on
                read(peer, NUM_BLOCKS, 0)
            read(peer, 63, 0)
    ours.close()
    arena.close()


def test_readers_that_leave_are_forgotten() -> None:
    arenas = [Segment(BLOCK_BYTES * 4) for _ in range(2)]
    holder = TorchTransport(arenas[0].tensor())
    for _ in range(3):
        reader = TorchTransport(arenas[1].tensor())
        blocks = np.int32([2])
        reader.read("p#1", holder.peer(), blocks, BLOCK_BYTES, arenas[1].tensor(), blocks)
        reader.close()
    until_s = monotonic() + 5
    while any(thread.is_alive() for thread in holder._readers) and monotonic() < until_s:
        sleep(0.01)
    assert not any(thread.is_alive() for thread in holder._readers)
    holder.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "gloo"]
    for arena in arenas:
        arena.close()


def wait(is_there: Callable[[], bool], holder: subprocess.Popen[bytes]) -> None:
    while not is_there():
        with pytest.raises(subprocess.TimeoutExpired):
            holder.wait(0.05)


def test_nixl_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match="transport nixl: found no usable NIXL"):
        NixlTransport("u#1", torch.zeros(64, dtype=torch.uint8))


def test_a_checksum_notices_what_changed_moved_or_is_missing() -> None:
    random = np.random.default_rng(1)
    arena = torch.from_numpy(random.integers(0, 255, 8 * 256, dtype=np.uint8))

    def of(*ids: int) -> int:
        return kernels.checksum(arena, torch.tensor(ids, dtype=torch.int32), 256)

    whole = of(3, 1, 7)
    assert 0 <= whole < 1 << 63
    assert len({whole, of(1, 3, 7), of(3, 1), of(3, 1, 7, 7), of(3, 1, 6)}) == 5
    for _ in range(200):
        place, bit = int(random.choice([3, 1, 7])) * 256 + random.integers(256), random.integers(8)
        arena[place] ^= 1 << bit
        assert of(3, 1, 7) != whole
        arena[place] ^= 1 << bit
    assert of(3, 1, 7) == whole
    words = arena.numpy().view(np.uint64).reshape(8, -1, 8)
    prime, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    sums = [0] * 8
    for row in words[[3, 1, 7]].reshape(-1, 8).tolist():
        sums = [(total * prime + word) & mask for total, word in zip(sums, row, strict=True)]
    total = 3
    for one in sums:
        total = (total * prime + one) & mask
    assert total >> 1 == whole
    with pytest.raises(ValueError, match="multiple of 64"):
        kernels.checksum(arena, torch.zeros(1, dtype=torch.int32), 100)
