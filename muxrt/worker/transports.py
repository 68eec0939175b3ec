"""How one unit reads another unit's arena: NIXL, or memory that both have mapped."""

import mmap
import os
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from muxrt.errors import ConfigError, TransferFailed

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int32]

READ_TIMEOUT_S = 10.0  # of one sequence's blocks: beyond it they are computed again
POLL_S = 50e-6  # NIXL has no descriptor to wait on


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
        self._mapped: dict[str, tuple[mmap.mmap, Bytes]] = {}  # by unit and generation

    def peer(self) -> bytes:
        return self._peer

    def read(self, unit: str, peer: bytes, ids: Ids, block_bytes: int) -> Bytes:
        where = msgspec.msgpack.decode(peer, type=_SharedPeer)
        arena = self._map(unit, where)
        num_blocks = where.num_bytes // block_bytes
        read = arena[: num_blocks * block_bytes].reshape(-1, block_bytes)[ids]
        # Whoever is gone now may have been gone before: its pages read as zeros, or as anything.
        if not os.path.exists(f"/proc/{where.pid}/fd/{where.fd}"):
            raise TransferFailed(f"the process {where.pid} of {unit} is gone, and its K and V")
        return read

    def _map(self, unit: str, where: _SharedPeer) -> Bytes:
        if unit not in self._mapped:
            self._forget(unit)
            try:
                with open(f"/proc/{where.pid}/fd/{where.fd}", "rb") as file:
                    mapped = mmap.mmap(file.fileno(), where.num_bytes, prot=mmap.PROT_READ)
            except OSError as error:
                raise TransferFailed(f"the memory of {unit} cannot be mapped: {error}") from None
            self._mapped[unit] = (mapped, np.frombuffer(mapped, dtype=np.uint8))
        return self._mapped[unit][1]

    def _forget(self, unit: str) -> None:
        """Let go of earlier generations of a unit: nobody will name them again."""
        name = unit.rpartition("#")[0]
        for old in [old for old in self._mapped if old.rpartition("#")[0] == name]:
            mapped, array = self._mapped.pop(old)
            del array
            mapped.close()

    def close(self) -> None:
        self._mapped.clear()


class _NixlPeer(msgspec.Struct, frozen=True):
    """An agent and where its arena lies in its process."""

    metadata: bytes
    address: int


class NixlTransport:
    """Any two units: NIXL finds the way (UCX: shared memory, TCP, RDMA)."""

    name = "nixl"

    def __init__(self, unit: str, arena: Bytes) -> None:
        """`unit` is our name and generation. Raises ConfigError where NIXL cannot be used."""
        api = _nixl()
        self._agent: Any = api.nixl_agent(unit, api.nixl_agent_config(backends=["UCX"]))
        self._region = [(arena.ctypes.data, arena.nbytes, 0, unit)]
        self._registered = self._agent.register_memory(self._region, "DRAM")
        metadata = self._agent.get_agent_metadata()
        self._peer = msgspec.msgpack.encode(_NixlPeer(metadata, arena.ctypes.data))
        self._known: dict[str, str] = {}  # NIXL's name of an agent, by unit and generation
        self._scratch = np.zeros(0, dtype=np.uint8)
        self._scratch_registered: Any = None

    def peer(self) -> bytes:
        return self._peer

    def read(self, unit: str, peer: bytes, ids: Ids, block_bytes: int) -> Bytes:
        where = msgspec.msgpack.decode(peer, type=_NixlPeer)
        room = self._room(len(ids) * block_bytes)
        base = room.ctypes.data
        ours = [(base + i * block_bytes, block_bytes, 0) for i in range(len(ids))]
        theirs = [(where.address + i * block_bytes, block_bytes, 0) for i in ids.tolist()]
        try:
            if unit not in self._known:
                self._known[unit] = self._agent.add_remote_agent(where.metadata)
            self._read(self._known[unit], _merged(ours, theirs))
        except TransferFailed:
            raise
        except Exception as error:  # NIXL has a tree of its own
            raise TransferFailed(f"NIXL cannot read from {unit}: {error}") from None
        return room.reshape(-1, block_bytes)

    def _read(self, agent: str, pairs: list[tuple[int, int, int]]) -> None:
        descriptors = [
            self._agent.get_xfer_descs([(pair[side], pair[2], 0) for pair in pairs], "DRAM")
            for side in (0, 1)
        ]
        handle = self._agent.initialize_xfer("READ", *descriptors, agent)
        try:
            state, until_s = self._agent.transfer(handle), monotonic() + READ_TIMEOUT_S
            while state == "PROC":
                if monotonic() > until_s:
                    raise TransferFailed(f"nothing came within {READ_TIMEOUT_S:g} s")
                sleep(POLL_S)
                state = self._agent.check_xfer_state(handle)
            if state != "DONE":
                raise TransferFailed(f"NIXL says {state}")
        finally:
            self._agent.release_xfer_handle(handle)

    def _room(self, num_bytes: int) -> Bytes:
        """Registered memory for one read; what came before in it is gone."""
        if self._scratch.nbytes < num_bytes:
            if self._scratch_registered is not None:
                self._agent.deregister_memory(self._scratch_registered)
            self._scratch = np.zeros(1 << (num_bytes - 1).bit_length(), dtype=np.uint8)
            region = [(self._scratch.ctypes.data, self._scratch.nbytes, 0, "scratch")]
            self._scratch_registered = self._agent.register_memory(region, "DRAM")
        return self._scratch[:num_bytes]

    def close(self) -> None:
        for agent in self._known.values():
            with suppress(Exception):  # it may be long dead
                self._agent.remove_remote_agent(agent)
        if self._scratch_registered is not None:
            self._agent.deregister_memory(self._scratch_registered)
        self._agent.deregister_memory(self._registered)


def _merged(
    ours: list[tuple[int, int, int]], theirs: list[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """(our address, their address, bytes): neighbours on both sides become one."""
    merged: list[tuple[int, int, int]] = []
    for (here, size, _), (there, _, _) in zip(ours, theirs, strict=True):
        if merged:
            last_here, last_there, length = merged[-1]
            if last_there + length == there and last_here + length == here:
                merged[-1] = (last_here, last_there, length + size)
                continue
        merged.append((here, there, size))
    return merged


def has_nixl() -> bool:
    """NIXL is installed and can be loaded."""
    with suppress(ConfigError):
        _nixl()
        return True
    return False


def _nixl() -> Any:
    try:
        from nixl import _api
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"transport nixl: found no usable NIXL ({error}); pip install nixl"
        ) from None
    return _api
