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
from muxrt.core import Piece, Result, Source, Transfer, TransferKind, unpack_ids
from muxrt.engine.build import UnitPlan
from muxrt.errors import TransferFailed

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int32]


class Geometry(msgspec.Struct, frozen=True):
    """How one model's K and V lie in the blocks of an arena."""

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
            arena.planes_per_block,
            layout.blocks_per_group,
            layout.block_tokens,
            shape.num_planes,
            shape.head_dim * shape.dtype_bytes,
        )

    @property
    def plane_bytes(self) -> int:
        """K and V of a group's tokens in one plane."""
        return 2 * self.block_tokens * self.row_bytes

    def planes(self, blocks: Ids, first: int, end: int) -> Ids:
        """Planes `first` to `end` of whole groups, as numbers of planes from the arena's start on.

        blocks [groups * blocks_per_group] -> [groups, end - first].
        """
        block, inside = np.divmod(np.arange(first, end, dtype=np.int32), self.planes_per_block)
        by_group = blocks.reshape(-1, self.blocks_per_group)
        planes: Ids = by_group[:, block] * self.planes_per_block + inside.astype(np.int32)
        return planes

    def view(self, arena: Bytes) -> Bytes:
        """[bytes] -> [planes, 2, block_tokens, row_bytes], K before V."""
        whole = arena[: len(arena) // self.plane_bytes * self.plane_bytes]
        return whole.reshape(-1, 2, self.block_tokens, self.row_bytes)


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
        """Blocks `ids` of `unit`'s arena, of any size, become blocks `into_ids` of `into`.

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
        self._arena = arena
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
        ours = self._geometries[transfer.model]
        if transfer.kind is TransferKind.SEAL:
            (piece,) = transfer.pieces
            planes = ours.planes(unpack_ids(piece.blocks), piece.first_plane, piece.end_plane)
            return seal(self._arena, planes.ravel(), ours.plane_bytes)
        assert transfer.source is not None, "what is fetched has a source"
        address = msgspec.msgpack.decode(transfer.source.address, type=Address)
        self._refuse(address, transfer.source, ours)
        own = unpack_ids(transfer.blocks)
        for piece in transfer.pieces:
            if address.geometry == ours:
                self._fetch(address, piece, own)
            else:
                self._fetch_rows(address, piece, own, ours)
        return 0

    def _fetch(self, address: Address, piece: Piece, own: Ids) -> None:
        """Planes lie there as here: they go straight to where they belong."""
        geometry = address.geometry
        theirs = geometry.planes(unpack_ids(piece.blocks), piece.first_plane, piece.end_plane)
        begin = piece.first_group * geometry.blocks_per_group
        groups = own[begin : begin + len(theirs) * geometry.blocks_per_group]
        planes = geometry.planes(groups, piece.first_plane, piece.end_plane)
        self._read(address, piece, theirs.ravel(), self._arena, planes.ravel())

    def _fetch_rows(self, address: Address, piece: Piece, own: Ids, ours: Geometry) -> None:
        """Planes have other tokens there, or lie in other blocks: row by row."""
        theirs = address.geometry
        planes = theirs.planes(unpack_ids(piece.blocks), piece.first_plane, piece.end_plane)
        room = self._transport.scratch(planes.size * theirs.plane_bytes)
        self._read(address, piece, planes.ravel(), room, np.arange(planes.size, dtype=np.int32))
        rows = theirs.view(room.numpy()).reshape(*planes.shape, 2, theirs.block_tokens, -1)
        # [groups, planes, 2, tokens, bytes] -> [groups * tokens, planes, 2, bytes]
        rows = rows.transpose(0, 3, 1, 2, 4).reshape(-1, planes.shape[1], 2, theirs.row_bytes)
        first = piece.first_group * theirs.block_tokens
        groups, inside = np.divmod(np.arange(first, piece.num_tokens), ours.block_tokens)
        mine = ours.planes(own, piece.first_plane, piece.end_plane)[groups]  # [tokens, planes]
        ours.view(self._arena.numpy())[mine, :, inside[:, None]] = rows[: len(groups)]

    def _read(
        self, address: Address, piece: Piece, planes: Ids, into: Tensor, into_planes: Ids
    ) -> None:
        """Read planes and compare their checksum. Raises TransferFailed."""
        size = address.geometry.plane_bytes
        self._transport.read(address.unit, address.peer, planes, size, into, into_planes)
        if seal(into, into_planes, size) != piece.checksum:
            raise TransferFailed(
                f"piece {piece.number} that came from {address.unit} is not what it sealed (the"
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
