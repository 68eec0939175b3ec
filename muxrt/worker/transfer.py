"""K and V from one unit's arena into another's: what the `Transfer` works of both sides do.

The prefill side only seals: it makes the checksum of its blocks and leaves them alone. The decode
side reads them, however that is done (`Transport`), compares the checksum, and lays them out as its
own arena wants it: the two may differ in tokens per plane and planes per block, and in how many
ranks share the kv heads. Each rank fetches exactly its own heads, from whoever has them. Bytes
that are not what was sealed (the holder died, its lease ran out, a bit flipped) are an error, never
a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """How one model's K and V, those of some of its kv heads, lie in the blocks of an arena."""

    planes_per_block: int
    blocks_per_group: int
    block_tokens: int
    num_layers: int
    first_head: int  # of the model's kv heads; those up to `end_head` are there
    end_head: int
    row_bytes: int  # K, or V, of one token in one plane

    @classmethod
    def of(cls, plan: UnitPlan, model: str) -> "Geometry":
        """All heads, as a unit that is one rank has them."""
        layout, arena = plan.models[model].layout, plan.arena
        shape = layout.shape
        return cls(
            arena.planes_per_block,
            layout.blocks_per_group,
            layout.block_tokens,
            shape.num_layers,
            0,
            shape.num_kv_heads,
            shape.head_dim * shape.dtype_bytes,
        )

    @property
    def heads(self) -> range:
        """The kv heads that are there, as the whole model numbers them."""
        return range(self.first_head, self.end_head)

    @property
    def plane_bytes(self) -> int:
        """K and V of a group's tokens in one plane."""
        return 2 * self.block_tokens * self.row_bytes

    def planes(self, blocks: Ids, layers: range, heads: range) -> Ids:
        """Planes of whole groups, as numbers of planes from the arena's start on.

        blocks [groups * blocks_per_group] -> [groups, layers, heads].
        """
        plane = np.add.outer(
            np.array(layers, dtype=np.int32) * len(self.heads),
            np.array(heads, dtype=np.int32) - self.first_head,
        )
        block, inside = np.divmod(plane, self.planes_per_block)
        by_group = blocks.reshape(-1, self.blocks_per_group)
        planes: Ids = by_group[:, block] * self.planes_per_block + inside
        return planes

    def view(self, arena: Bytes) -> Bytes:
        """[bytes] -> [planes, 2, block_tokens, row_bytes], K before V."""
        whole = arena[: len(arena) // self.plane_bytes * self.plane_bytes]
        return whole.reshape(-1, 2, self.block_tokens, self.row_bytes)


class Share(msgspec.Struct, frozen=True):
    """An arena with some kv heads of a model."""

    peer: bytes  # opaque to all but the transport
    geometry: Geometry


class Address(msgspec.Struct, frozen=True):
    """What another unit must know to read a model's blocks here: `ModelReady.address`.

    There is a share for each rank of the unit. A sequence has the same block ids in all of them,
    and the checksums of a piece are those of their heads, share after share.
    """

    unit: str  # name and generation
    transport: str
    shares: tuple[Share, ...]


def joined(addresses: Sequence[bytes]) -> bytes:
    """The address of a unit whose ranks, in order, have these: each holds some heads."""
    found = [msgspec.msgpack.decode(address, type=Address) for address in addresses]
    shares = tuple(share for address in found for share in address.shares)
    return msgspec.msgpack.encode(msgspec.structs.replace(found[0], shares=shares))


@dataclass(frozen=True, slots=True)
class _Take:
    """Heads that one share has for us."""

    share: Share
    heads: range
    first: int  # of their checksums, among those of a piece


def takes(address: Address, heads: range) -> Iterator[_Take]:
    """Who has `heads`: each comes from the first share that has it."""
    before, missing = 0, heads
    for share in address.shares:
        theirs = share.geometry.heads
        found = range(max(theirs.start, missing.start), min(theirs.stop, missing.stop))
        if found.start == missing.start and len(found):
            yield _Take(share, found, before + found.start - theirs.start)
            missing = range(found.stop, missing.stop)
        before += len(theirs)
    if len(missing):
        raise TransferFailed(
            f"found no kv head {missing.start} in {address.unit}, expected heads {heads.start} to"
            f" {heads.stop - 1}"
        )


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
    """Seals our blocks and fetches those of other units: of the kv heads that we have."""

    def __init__(
        self, unit: str, geometries: Mapping[str, Geometry], arena: Tensor, transport: Transport
    ) -> None:
        """`unit` is our name and generation, `arena` our blocks, [bytes] uint8.

        `geometries` by model say which heads are ours, and how they lie in `arena`.
        """
        self._unit = unit
        self._arena = arena
        self._geometries = geometries
        self._transport = transport

    def address(self, model: str) -> bytes:
        """Where others find K and V of `model`; `joined` is of several ranks."""
        share = Share(self._transport.peer(), self._geometries[model])
        return msgspec.msgpack.encode(Address(self._unit, self._transport.name, (share,)))

    def run(self, transfer: Transfer) -> Result:
        """Seal or fetch; an error in the result where the bytes are not to be had."""
        begun_s = perf_counter()
        try:
            checksums = self._run(transfer)
        except TransferFailed as error:
            return Result(error=error.message)
        return Result(elapsed_s=perf_counter() - begun_s, checksums=checksums)

    def _run(self, transfer: Transfer) -> tuple[int, ...]:
        """The checksums of what was sealed; none of a fetch. Raises TransferFailed."""
        ours = self._geometries[transfer.model]
        if transfer.kind is TransferKind.SEAL:
            (piece,) = transfer.pieces
            layers = range(piece.first_layer, piece.end_layer)
            planes = ours.planes(unpack_ids(piece.blocks), layers, ours.heads)
            return seal_heads(self._arena, planes, ours.plane_bytes)
        assert transfer.source is not None, "what is fetched has a source"
        address = msgspec.msgpack.decode(transfer.source.address, type=Address)
        self._refuse(address, transfer.source, ours)
        own = unpack_ids(transfer.blocks)
        found = [*takes(address, ours.heads)]
        for piece in transfer.pieces:
            for take in found:
                if take.share.geometry.block_tokens == ours.block_tokens:
                    self._fetch(address.unit, take, piece, own, ours)
                else:
                    self._fetch_rows(address.unit, take, piece, own, ours)
        return ()

    def _fetch(self, unit: str, take: _Take, piece: Piece, own: Ids, ours: Geometry) -> None:
        """Planes have the same tokens there: they go straight to where they belong."""
        layers = range(piece.first_layer, piece.end_layer)
        theirs = take.share.geometry.planes(unpack_ids(piece.blocks), layers, take.heads)
        begin = piece.first_group * ours.blocks_per_group
        groups = own[begin : begin + len(theirs) * ours.blocks_per_group]
        planes = ours.planes(groups, layers, take.heads)
        self._read(unit, take, piece, theirs, self._arena, planes)

    def _fetch_rows(self, unit: str, take: _Take, piece: Piece, own: Ids, ours: Geometry) -> None:
        """Planes have more or fewer tokens there: row by row."""
        theirs, layers = take.share.geometry, range(piece.first_layer, piece.end_layer)
        planes = theirs.planes(unpack_ids(piece.blocks), layers, take.heads)
        room = self._transport.scratch(planes.size * theirs.plane_bytes)
        into = np.arange(planes.size, dtype=np.int32).reshape(planes.shape)
        self._read(unit, take, piece, planes, room, into)
        rows = theirs.view(room.numpy()).reshape(*planes.shape, 2, theirs.block_tokens, -1)
        # [groups, layers, heads, 2, tokens, bytes] -> [groups * tokens, layers, heads, 2, bytes]
        rows = rows.transpose(0, 4, 1, 2, 3, 5).reshape(-1, *planes.shape[1:], 2, theirs.row_bytes)
        first = piece.first_group * theirs.block_tokens
        groups, inside = np.divmod(np.arange(first, piece.num_tokens), ours.block_tokens)
        mine = ours.planes(own, layers, take.heads)[groups]  # [tokens, layers, heads]
        view = ours.view(self._arena.numpy())
        view[mine, :, inside[:, None, None]] = rows[: len(groups)]

    def _read(
        self, unit: str, take: _Take, piece: Piece, planes: Ids, into: Tensor, into_planes: Ids
    ) -> None:
        """Read planes [groups, layers, heads] and compare checksums. Raises TransferFailed."""
        size = take.share.geometry.plane_bytes
        ids, into_ids = planes.ravel(), into_planes.ravel()
        self._transport.read(unit, take.share.peer, ids, size, into, into_ids)
        sealed = piece.checksums[take.first : take.first + len(take.heads)]
        if seal_heads(into, into_planes, size) != sealed:
            raise TransferFailed(
                f"piece {piece.number} that came from {unit} is not what it sealed (the checksum"
                " differs)"
            )

    def _refuse(self, address: Address, source: Source, ours: Geometry) -> None:
        """Raises TransferFailed for blocks that cannot become ours."""
        if address.unit != source.unit:
            raise TransferFailed(f"{source.unit} is gone; {address.unit} holds nothing of it")
        if address.transport != self._transport.name:
            raise TransferFailed(
                f"found K and V of {source.unit} behind {address.transport}, expected"
                f" {self._transport.name}, as here"
            )
        for share in address.shares:
            theirs = share.geometry
            if (theirs.num_layers, theirs.row_bytes) != (ours.num_layers, ours.row_bytes):
                raise TransferFailed(
                    f"found {theirs.num_layers} layers of rows of {theirs.row_bytes} bytes in"
                    f" {source.unit}, expected {ours.num_layers} of {ours.row_bytes}: K and V have"
                    " another dtype there, or the model is another one"
                )


def seal_heads(arena: Tensor, planes: Ids, plane_bytes: int) -> tuple[int, ...]:
    """A checksum for each head of planes [groups, layers, heads]."""
    by_head = np.ascontiguousarray(planes.transpose(2, 0, 1)).reshape(planes.shape[2], -1)
    return tuple(kernels.checksum(arena, torch.from_numpy(ids), plane_bytes) for ids in by_head)


def addresses(exchange: Exchange | None, models: Mapping[str, object]) -> dict[str, bytes]:
    """The address of each model; none where nothing is exchanged."""
    return {model: exchange.address(model) if exchange else b"" for model in models}
