"""Units read each other's arenas by torch.distributed, where there is no NIXL: gloo, or NCCL.

torch.distributed has no one-sided reads, and a process group that lost a member is lost. So there
is a group of two for every reader and holder, made when the reader first asks and thrown away with
the first error: the next read makes another one, and no third unit notices. The holder has a thread
for each of its readers, which sends what it is asked for.

Both meet over a TCP connection of ours, which also carries the orders: a wait for the next order
ends when the other process does, needs no time limit, and keeps no SM busy. A TCPStore would not
do: its clients wait for a process that is frozen for as long as it is (docs/decisions.md).
"""

import fcntl
import logging
import os
import secrets
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from time import monotonic
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed
from torch import Tensor

from muxrt import kernels
from muxrt.errors import TransferFailed
from muxrt.worker.transfer import Ids

# Untyped: its stubs leave out what depends on how torch was built.
dist: Any = torch.distributed
log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0  # whoever does not answer by then is not going to send anything either
READ_TIMEOUT_S = 10.0  # of one piece of a sequence: beyond it, it is computed again
CHUNK_BYTES = 4 << 20  # sent at once, while the next ones are gathered
HOLDER, READER = 0, 1  # ranks
LENGTH = struct.Struct("<I")  # of what follows
KEY_BYTES = 16
SIOCGIFADDR = 0x8915  # the address of an interface (netdevice(7))


class _Peer(msgspec.Struct, frozen=True):
    """Where a unit listens, and what it wants to hear first."""

    host: str
    port: int
    key: bytes


class _Order(msgspec.Struct, frozen=True):
    """Send these blocks of your arena, in this order."""

    ids: bytes  # int32 little endian
    block_bytes: int


class TorchTransport:
    """Process groups of two, each made when somebody first reads from somebody."""

    name = "gloo"

    def __init__(self, arena: Tensor) -> None:
        """`arena` is on the CPU, or on a GPU: then its blocks go by NCCL."""
        self._arena = arena
        self._listener = socket.create_server((_host(), 0))
        host, port = self._listener.getsockname()[:2]
        self._peer = _Peer(host, port, secrets.token_bytes(KEY_BYTES))
        self._pairs: dict[tuple[str, bytes], _Pair] = {}  # by unit and generation, and its peer
        self._readers: dict[Thread, socket.socket] = {}  # that read from us
        self._welcomer = Thread(target=self._welcome, name="gloo", daemon=True)
        self._welcomer.start()

    def peer(self) -> bytes:
        return msgspec.msgpack.encode(self._peer)

    def scratch(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._arena.device)

    def read(
        self, unit: str, peer: bytes, ids: Ids, block_bytes: int, into: Tensor, into_ids: Ids
    ) -> None:
        key = (unit, peer)
        try:
            if key not in self._pairs:
                self._forget(unit)
                self._pairs[key] = self._meet(msgspec.msgpack.decode(peer, type=_Peer))
            self._pairs[key].read(ids, block_bytes, into, into_ids)
        except (RuntimeError, OSError) as error:  # gloo's are RuntimeErrors
            if key in self._pairs:
                self._pairs.pop(key).close()
            why = str(error).partition("\n")[0]
            raise TransferFailed(f"{self.name} cannot read from {unit}: {why}") from None

    def _meet(self, peer: _Peer) -> "_Pair":
        """A group with a holder. Raises RuntimeError or OSError where it does not answer."""
        line = socket.create_connection((peer.host, peer.port), CONNECT_TIMEOUT_S)
        try:
            line.sendall(peer.key)
            return _Pair(line, READER, self._arena.device)
        except BaseException:
            line.close()
            raise

    def _forget(self, unit: str) -> None:
        """Let go of earlier generations of a unit: nobody will name them again."""
        name = unit.rpartition("#")[0]
        for key in [*self._pairs]:
            if key[0] != unit and key[0].rpartition("#")[0] == name:
                self._pairs.pop(key).close()

    def _welcome(self) -> None:
        """Have a thread for everybody who wants to read."""
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:  # it was shut down
                return
            self._readers = {t: s for t, s in self._readers.items() if t.is_alive()}
            server = Thread(target=self._serve, args=(line,), name="gloo", daemon=True)
            self._readers[server] = line
            server.start()

    def _serve(self, line: socket.socket) -> None:
        """Send a reader what it asks for, until it is gone."""
        with line:
            try:
                line.settimeout(CONNECT_TIMEOUT_S)
                if _receive_exactly(line, KEY_BYTES) != self._peer.key:
                    raise ConnectionError("found another key than ours")
                pair = _Pair(line, HOLDER, self._arena.device)
                while True:
                    pair.serve(self._arena)
            except (RuntimeError, OSError) as error:
                log.info("event=reader_gone error=%r", str(error).partition("\n")[0])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # the thread that accepts would not notice else
        self._listener.close()
        self._welcomer.join()
        for pair in self._pairs.values():
            pair.close()
        for server, line in self._readers.items():
            with suppress(OSError):  # it is gone already
                line.shutdown(socket.SHUT_RDWR)
            server.join()


class _Pair:
    """A reader and a holder. What any of this raises, RuntimeError or OSError, is its end."""

    def __init__(self, line: socket.socket, rank: int, device: torch.device) -> None:
        self._line, self._other = line, 1 - rank
        make = _gloo if device.type == "cpu" else _nccl
        self._group = make(_LineStore(line), rank)
        self._rooms = [torch.empty(0, dtype=torch.uint8, device=device)] * 2

    def read(self, ids: Ids, block_bytes: int, into: Tensor, into_ids: Ids) -> None:
        """Blocks `ids` of the holder's arena become blocks `into_ids` of `into`."""
        until_s = monotonic() + READ_TIMEOUT_S
        _send(self._line, _Order(ids.astype("<i4").tobytes(), block_bytes))
        before: tuple[Any, Tensor, Ids] | None = None
        for turn, mine in enumerate(_chunks(into_ids, block_bytes)):
            room = self._room(turn, len(mine) * block_bytes)
            coming = (self._group.recv([room], self._other, 0), room, mine)
            if before is not None:
                _place(before, into, block_bytes, until_s)
            before = coming
        if before is not None:
            _place(before, into, block_bytes, until_s)

    def serve(self, arena: Tensor) -> None:
        """Wait for an order, and do it."""
        self._line.settimeout(None)
        order = msgspec.msgpack.decode(_receive(self._line), type=_Order)
        until_s = monotonic() + READ_TIMEOUT_S
        ids, size = np.frombuffer(order.ids, dtype="<i4").astype(np.int32), order.block_bytes
        if not 0 <= int(ids.min()) <= int(ids.max()) < len(arena) // size:
            raise ConnectionError(f"found an order for blocks beyond our {len(arena)} bytes")
        sent: list[Any] = []
        for turn, chunk in enumerate(_chunks(ids, size)):
            if turn > 1:
                _finish(sent[turn - 2], until_s)
            room = self._room(turn, len(chunk) * size)
            _copy(arena, room, chunk, np.arange(len(chunk), dtype=np.int32), size)
            sent.append(self._group.send([room], self._other, 0))
        for work in sent[-2:]:
            _finish(work, until_s)

    def _room(self, turn: int, num_bytes: int) -> Tensor:
        """One of two buffers, in turns. [num_bytes] uint8."""
        room = self._rooms[turn % 2]
        if len(room) < num_bytes:
            room = self._rooms[turn % 2] = room.new_empty(max(num_bytes, CHUNK_BYTES))
        return room[:num_bytes]

    def close(self) -> None:
        """The other one learns of it at once."""
        self._line.close()


class _LineStore(dist.Store):  # type: ignore[misc]
    """What a group of two must know of each other, told over a connection."""

    def __init__(self, line: socket.socket) -> None:
        super().__init__()
        self._line = line
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._known[key] = bytes(value)
        _send(self._line, (key, self._known[key]))

    def get(self, key: str) -> bytes:
        """What either of us set; waits for it. Raises OSError where it does not come."""
        while key not in self._known:
            name, value = msgspec.msgpack.decode(_receive(self._line), type=tuple[str, bytes])
            self._known[name] = value
        return self._known[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


def _gloo(store: _LineStore, rank: int) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_host())]
    options._timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: _LineStore, rank: int) -> Any:
    """Not run yet (docs/gpu-status.md)."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=READ_TIMEOUT_S)
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _host() -> str:
    """Our address: of the interface that GLOO_SOCKET_IFNAME names, else of this machine only."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    if not name:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        found = fcntl.ioctl(asker, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


def _send(line: socket.socket, message: object) -> None:
    data = msgspec.msgpack.encode(message)
    line.sendall(LENGTH.pack(len(data)) + data)


def _receive(line: socket.socket) -> bytes:
    (num_bytes,) = LENGTH.unpack(_receive_exactly(line, LENGTH.size))
    return _receive_exactly(line, num_bytes)


def _receive_exactly(line: socket.socket, num_bytes: int) -> bytes:
    """Raises OSError where the other end closes, or takes too long."""
    found = bytearray()
    while len(found) < num_bytes:
        more = line.recv(num_bytes - len(found))
        if not more:
            raise ConnectionError("the other process closed the connection")
        found += more
    return bytes(found)


def _finish(work: Any, until_s: float) -> None:
    """Wait for it. Raises RuntimeError where it failed or takes too long."""
    work.wait(timedelta(seconds=max(1e-3, until_s - monotonic())))


def _place(came: tuple[Any, Tensor, Ids], into: Tensor, block_bytes: int, until_s: float) -> None:
    """Wait for blocks, and put them where they belong."""
    work, room, mine = came
    _finish(work, until_s)
    _copy(room, into, np.arange(len(mine), dtype=np.int32), mine, block_bytes)


def _chunks(ids: Ids, block_bytes: int) -> Iterator[Ids]:
    """Of about CHUNK_BYTES each."""
    size = max(1, CHUNK_BYTES // block_bytes)
    return (ids[begin : begin + size] for begin in range(0, len(ids), size))


def _copy(source: Tensor, into: Tensor, ids: Ids, into_ids: Ids, block_bytes: int) -> None:
    theirs, ours = torch.from_numpy(ids.copy()), torch.from_numpy(into_ids.copy())
    if source.device.type == "cpu":
        kernels.copy_blocks(source, into, theirs, ours, block_bytes)
        return
    narrow, wide = (
        memory[: len(memory) // block_bytes * block_bytes].view(-1, block_bytes)
        for memory in (source, into)
    )
    wide[ours.to(into.device)] = narrow[theirs.to(source.device)]
