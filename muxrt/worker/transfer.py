"""K and V from one unit's arena into another's: what the `Transfer` works of both sides do.

The prefill side only seals: it makes the checksum of its blocks and leaves them alone. The decode
side reads them, however that is done (`Transport`), compares the checksum, and lays them out as its
own arena wants it: the two may differ in tokens per plane and planes per block. Bytes that are not
what was sealed (the holder died, its lease ran out, a bit flipped) are an error, never a token.
"""

from collections.abc import Mapping
from time import perf_counter
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt import kernels
from muxrt.core import Result, Source, Transfer, TransferKind, unpack_ids
from muxrt.engine.build import UnitPlan
from muxrt.errors import TransferFailed

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int32]


class Geometry(msgspec.Struct, frozen=True):
    """How one model's K and V lie in the blocks of an arena."""

    block_bytes: int
    planes_per_block: int
    blocks_per_group: int
    block_tokens: int
    num_planes: int  # layers x kv heads
    row_bytes: int  # K, or V, of one token in one plane

    @classmethod
    def of(cls, plan: UnitPlan, model: str) -> "Geometry":
        layout, arena = plan.models[model].layout, plan.arena
        shape = layout.shape
        return cls(
            arena.block_bytes,
            arena.planes_per_block,
            layout.blocks_per_group,
            layout.block_tokens,
            shape.num_planes,
            shape.head_dim * shape.dtype_bytes,
        )

    def rows(self, blocks: Bytes) -> Bytes:
        """[blocks, block_bytes] of whole groups -> [planes, 2, tokens, row_bytes], a copy."""
        groups = len(blocks) // self.blocks_per_group
        planes = self.blocks_per_group * self.planes_per_block
        shape = (groups, planes, 2, self.block_tokens, self.row_bytes)
        by_plane = blocks.reshape(shape)[:, : self.num_planes].transpose(1, 2, 0, 3, 4)
        return by_plane.reshape(self.num_planes, 2, groups * self.block_tokens, self.row_bytes)

    def blocks(self, rows: Bytes) -> Bytes:
        """The opposite of `rows`; the last group is filled up with zeros."""
        groups = -(-rows.shape[2] // self.block_tokens)
        planes = self.blocks_per_group * self.planes_per_block
        room = groups * self.block_tokens
        whole = np.zeros((planes, 2, room, self.row_bytes), dtype=np.uint8)
        whole[: self.num_planes, :, : rows.shape[2]] = rows
        shape = (planes, 2, groups, self.block_tokens, self.row_bytes)
        return whole.reshape(shape).transpose(2, 0, 1, 3, 4).reshape(-1, self.block_bytes)


class Address(msgspec.Struct, frozen=True):
    """What another unit must know to read a model's blocks here: `ModelReady.address`."""

    unit: str  # name and generation
    transport: str
    peer: bytes  # opaque to all but that transport
    geometry: Geometry


class Transport(Protocol):
    """Reads blocks of other units' arenas."""

    name: str

    def peer(self) -> bytes:
        """How the others reach our arena."""

    def read(
        self, unit: str, peer: bytes, ids: Ids, block_bytes: int, into: Tensor, into_ids: Ids
    ) -> None:
        """Blocks `ids` of `unit`'s arena become blocks `into_ids` of `into`.

        `into` is our arena or from `scratch`. Raises TransferFailed.
        """

    def scratch(self, num_bytes: int) -> Tensor:
        """Memory to read into, [bytes] uint8; what the last one held is gone."""

    def close(self) -> None:
        """Nobody is read from or reads here any more."""


class Exchange:
    """Seals our blocks and fetches those of other units."""

    def __init__(self, unit: str, plan: UnitPlan, arena: Tensor, transport: Transport) -> None:
        """`unit` is our name and generation, `arena` our blocks, [bytes] uint8."""
        self._unit = unit
        self._arena, self._block_bytes = arena, plan.arena.block_bytes
        self._geometries = {model: Geometry.of(plan, model) for model in plan.models}
        self._transport = transport

    def address(self, model: str) -> bytes:
        """Where others find K and V of `model`."""
        transport = self._transport
        geometry = self._geometries[model]
        return msgspec.msgpack.encode(
            Address(self._unit, transport.name, transport.peer(), geometry)
        )

    def run(self, transfer: Transfer) -> Result:
        """Seal or fetch; an error in the result where the bytes are not to be had."""
        begun_s = perf_counter()
        try:
            checksum = self._run(transfer)
        except TransferFailed as error:
            return Result(error=error.message)
        return Result(elapsed_s=perf_counter() - begun_s, checksum=checksum)

    def _run(self, transfer: Transfer) -> int:
        """The checksum of what was sealed; 0 for a fetch. Raises TransferFailed."""
        if transfer.kind is TransferKind.SEAL:
            return seal(self._arena, unpack_ids(transfer.blocks), self._block_bytes)
        assert transfer.source is not None, "what is fetched has a source"
        self._fetch(transfer, transfer.source)
        return 0

    def _fetch(self, transfer: Transfer, source: Source) -> None:
        address = msgspec.msgpack.decode(source.address, type=Address)
        theirs, ours = address.geometry, self._geometries[transfer.model]
        self._refuse(address, source, ours)
        ids, own = unpack_ids(source.held.blocks), unpack_ids(transfer.blocks)
        if theirs == ours:
            self._read(address, source, ids, self._arena, own[: len(ids)])
            return
        room = self._transport.scratch(len(ids) * theirs.block_bytes)
        self._read(address, source, ids, room, np.arange(len(ids), dtype=np.int32))
        read = room.numpy().reshape(-1, theirs.block_bytes)
        blocks = ours.blocks(theirs.rows(read)[:, :, : transfer.num_tokens])
        mine = self._arena.numpy()[: len(self._arena) // self._block_bytes * self._block_bytes]
        mine.reshape(-1, self._block_bytes)[own[: len(blocks)]] = blocks

    def _read(
        self, address: Address, source: Source, ids: Ids, into: Tensor, into_ids: Ids
    ) -> None:
        """Read blocks and compare their checksum. Raises TransferFailed."""
        size = address.geometry.block_bytes
        self._transport.read(address.unit, address.peer, ids, size, into, into_ids)
        if seal(into, into_ids, size) != source.held.checksum:
            raise TransferFailed(
                f"the blocks that came from {source.unit} are not those that it sealed (the"
                " checksum differs)"
            )

    def _refuse(self, address: Address, source: Source, ours: Geometry) -> None:
        """Raises TransferFailed for blocks that cannot become ours."""
        theirs = address.geometry
        if address.unit != source.unit:
            raise TransferFailed(f"{source.unit} is gone; {address.unit} holds nothing of it")
        if address.transport != self._transport.name:
            raise TransferFailed(
                f"found K and V of {source.unit} behind {address.transport}, expected"
                f" {self._transport.name}, as here"
            )
        if (theirs.num_planes, theirs.row_bytes) != (ours.num_planes, ours.row_bytes):
            raise TransferFailed(
                f"found {theirs.num_planes} planes of rows of {theirs.row_bytes} bytes in"
                f" {source.unit}, expected {ours.num_planes} of {ours.row_bytes}: K and V have"
                " another dtype there, or the model is another one"
            )


def seal(arena: Tensor, ids: Ids, block_bytes: int) -> int:
    """The checksum of blocks, one after the other."""
    return kernels.checksum(arena, torch.from_numpy(ids.copy()), block_bytes)


def addresses(exchange: Exchange | None, models: Mapping[str, object]) -> dict[str, bytes]:
    """The address of each model; none where nothing is exchanged."""
    return {model: exchange.address(model) if exchange else b"" for model in models}
