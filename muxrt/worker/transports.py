"""How one unit reads another unit's arena: NIXL, or memory that both have mapped."""

import mmap
import os
import warnings
from contextlib import suppress
from threading import Event, Lock, Thread
from time import monotonic, sleep
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt import kernels
from muxrt.errors import ConfigError, TransferFailed

Ids = npt.NDArray[np.int32]

READ_TIMEOUT_S = 10.0  # of one sequence's blocks: beyond it they are computed again
POLL_S = 50e-6  # NIXL has no descriptor to wait on
LOOK_S = 1e-3  # between looks at who wants to know us


class _SharedPeer(msgspec.Struct, frozen=True):
    """A memfd of another process of this machine and user."""

    pid: int
    fd: int
    num_bytes: int


class SharedTransport:
    """Units of one machine: the other one's arena is mapped, and read like our own."""

    name = "shared"

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._peer = msgspec.msgpack.encode(_SharedPeer(os.getpid(), fd, num_bytes))
        # By unit and generation, and whose of its ranks it is.
        self._mapped: dict[tuple[str, _SharedPeer], tuple[mmap.mmap, Tensor]] = {}

    def peer(self) -> bytes:
        return self._peer

    def read(
        self, unit: str, peer: bytes, ids: Ids, block_bytes: int, into: Tensor, into_ids: Ids
    ) -> None:
        where = msgspec.msgpack.decode(peer, type=_SharedPeer)
        theirs, ours = torch.from_numpy(ids.copy()), torch.from_numpy(into_ids.copy())
        kernels.copy_blocks(self._map(unit, where), into, theirs, ours, block_bytes)
        # Whoever is gone now may have been gone before: its pages read as zeros, or as anything.
        if not os.path.exists(f"/proc/{where.pid}/fd/{where.fd}"):
            raise TransferFailed(f"the process {where.pid} of {unit} is gone, and its K and V")

    def scratch(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _map(self, unit: str, where: _SharedPeer) -> Tensor:
        key = (unit, where)
        if key not in self._mapped:
            self._forget(unit)
            try:
                with open(f"/proc/{where.pid}/fd/{where.fd}", "rb") as file:
                    mapped = mmap.mmap(file.fileno(), where.num_bytes, prot=mmap.PROT_READ)
            except OSError as error:
                raise TransferFailed(f"the memory of {unit} cannot be mapped: {error}") from None
            with warnings.catch_warnings():  # it is only read
                warnings.simplefilter("ignore", UserWarning)
                self._mapped[key] = (mapped, torch.frombuffer(mapped, dtype=torch.uint8))
        return self._mapped[key][1]

    def _forget(self, unit: str) -> None:
        """Let go of earlier generations of a unit: nobody will name them again."""
        name = unit.rpartition("#")[0]
        for key in [*self._mapped]:
            if key[0] != unit and key[0].rpartition("#")[0] == name:
                del self._mapped[key]  # the map is closed with its last tensor

    def close(self) -> None:
        self._mapped.clear()


class _NixlPeer(msgspec.Struct, frozen=True):
    """An agent and where its arena lies in its process."""

    metadata: bytes
    address: int


class NixlTransport:
    """Any two units: NIXL finds the way (UCX: shared memory, TCP, RDMA).

    NIXL's own progress thread takes a whole core, idle or not. A look every millisecond takes a
    twentieth of one, and is enough: bytes move without the holder once two agents know each other.
    """

    name = "nixl"

    def __init__(self, unit: str, arena: Tensor) -> None:
        """`unit` is our name and generation. Raises ConfigError where NIXL cannot be used."""
        api = _nixl()
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent: Any = api.nixl_agent(unit, config)
        self._arena = self._register(arena)
        metadata = self._agent.get_agent_metadata()
        self._peer = msgspec.msgpack.encode(_NixlPeer(metadata, arena.data_ptr()))
        self._known: dict[bytes, str] = {}  # NIXL's name of an agent, by its metadata
        self._scratch: tuple[Tensor, Any] | None = None
        self._lock = Lock()  # agents are not made for two threads
        self._is_closed = Event()
        self._looker = Thread(target=self._look, name="nixl", daemon=True)
        self._looker.start()

    def _register(self, memory: Tensor) -> Any:
        region = [(memory.data_ptr(), memory.nbytes, 0, "")]
        return self._agent.register_memory(region, "DRAM")

    def _look(self) -> None:
        """Answer who wants to know us."""
        while not self._is_closed.wait(LOOK_S):
            with self._lock:
                self._agent.get_new_notifs()

    def peer(self) -> bytes:
        return self._peer

    def scratch(self, num_bytes: int) -> Tensor:
        if self._scratch is None or len(self._scratch[0]) < num_bytes:
            room = torch.empty(1 << (num_bytes - 1).bit_length(), dtype=torch.uint8)
            with self._lock:
                if self._scratch is not None:
                    self._agent.deregister_memory(self._scratch[1])
                self._scratch = (room, self._register(room))
        return self._scratch[0][:num_bytes]

    def read(
        self, unit: str, peer: bytes, ids: Ids, block_bytes: int, into: Tensor, into_ids: Ids
    ) -> None:
        where = msgspec.msgpack.decode(peer, type=_NixlPeer)
        ours = [into.data_ptr() + i * block_bytes for i in into_ids.tolist()]
        theirs = [where.address + i * block_bytes for i in ids.tolist()]
        try:
            with self._lock:
                if where.metadata not in self._known:
                    self._known[where.metadata] = self._agent.add_remote_agent(where.metadata)
            self._read(self._known[where.metadata], _merged(ours, theirs, block_bytes))
        except TransferFailed:
            raise
        except Exception as error:  # NIXL has a tree of its own
            raise TransferFailed(f"NIXL cannot read from {unit}: {error}") from None

    def _read(self, agent: str, runs: list[tuple[int, int, int]]) -> None:
        with self._lock:
            descriptors = [
                self._agent.get_xfer_descs([(run[side], run[2], 0) for run in runs], "DRAM")
                for side in (0, 1)
            ]
            handle = self._agent.initialize_xfer("READ", *descriptors, agent)
            state = self._agent.transfer(handle)
        until_s = monotonic() + READ_TIMEOUT_S
        try:
            while state == "PROC":
                if monotonic() > until_s:
                    raise TransferFailed(f"nothing came within {READ_TIMEOUT_S:g} s")
                sleep(POLL_S)
                with self._lock:
                    state = self._agent.check_xfer_state(handle)
            if state != "DONE":
                raise TransferFailed(f"NIXL says {state}")
        finally:
            with self._lock:
                self._agent.release_xfer_handle(handle)

    def close(self) -> None:
        self._is_closed.set()
        self._looker.join()
        for agent in self._known.values():
            with suppress(Exception):  # it may be long dead
                self._agent.remove_remote_agent(agent)
        if self._scratch is not None:
            self._agent.deregister_memory(self._scratch[1])
        self._agent.deregister_memory(self._arena)


def _merged(ours: list[int], theirs: list[int], size: int) -> list[tuple[int, int, int]]:
    """(our address, their address, bytes): neighbours on both sides become one."""
    merged: list[tuple[int, int, int]] = []
    for here, there in zip(ours, theirs, strict=True):
        if merged:
            last_here, last_there, length = merged[-1]
            if last_there + length == there and last_here + length == here:
                merged[-1] = (last_here, last_there, length + size)
                continue
        merged.append((here, there, size))
    return merged


def _nixl() -> Any:
    try:
        from nixl import _api
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"transport nixl: found no usable NIXL ({error}); pip install nixl"
        ) from None
    return _api
