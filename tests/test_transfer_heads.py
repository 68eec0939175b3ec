"""K and V between units whose ranks share the kv heads differently: each gets exactly its own."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from msgspec.structs import replace

from muxrt.core import Piece, Source, Transfer, TransferKind
from muxrt.worker.kv_storage import Segment
from muxrt.worker.transfer import Exchange, Geometry, joined
from muxrt.worker.transports import SharedTransport

Rows = npt.NDArray[np.uint8]  # [tokens, layers, heads, 2, row_bytes]: a sequence's K and V, plainly

MODEL, NUM_LAYERS, ROW_BYTES = "m", 3, 16
SPARE_GROUPS = 5  # of the arena, that the sequence does not have


@dataclass
class Rank:
    """One arena with some of the heads."""

    geometry: Geometry
    arena: Segment
    exchange: Exchange

    def place(self, blocks: Sequence[int], token: int, layer: int, head: int) -> tuple[int, int]:
        """Where K of a token lies, and V, in bytes from the arena's start: the definition."""
        one = self.geometry
        group, inside = divmod(token, one.block_tokens)
        plane = layer * (one.end_head - one.first_head) + head - one.first_head
        block = blocks[group * one.blocks_per_group + plane // one.planes_per_block]
        start = (block * one.planes_per_block + plane % one.planes_per_block) * one.plane_bytes
        value = start + one.block_tokens * one.row_bytes
        return start + inside * one.row_bytes, value + inside * one.row_bytes

    def rows(self, blocks: Sequence[int], num_tokens: int) -> Rows:
        """What it holds of a sequence."""
        memory, heads = self.arena.tensor().numpy(), self.geometry.heads
        found = np.zeros((num_tokens, NUM_LAYERS, len(heads), 2, ROW_BYTES), np.uint8)
        for token, layer, head in np.ndindex(found.shape[:3]):
            for half, at in enumerate(self.place(blocks, token, layer, heads[head])):
                found[token, layer, head, half] = memory[at : at + ROW_BYTES]
        return found

    def write(self, blocks: Sequence[int], rows: Rows) -> None:
        """Its heads of a sequence."""
        memory = self.arena.tensor().numpy()
        for token, layer in np.ndindex(rows.shape[:2]):
            for head in self.geometry.heads:
                for half, at in enumerate(self.place(blocks, token, layer, head)):
                    memory[at : at + ROW_BYTES] = rows[token, layer, head, half]


@contextmanager
def unit(
    name: str, deal: Sequence[tuple[int, int]], tokens: int, planes_per_block: int, groups: int
) -> Iterator[tuple[list[Rank], list[int]]]:
    """Ranks with these heads each, and the blocks of so many groups, equal in all of them."""
    widest = max(end - first for first, end in deal)
    blocks_per_group = -(-NUM_LAYERS * widest // planes_per_block)
    num_blocks = (groups + SPARE_GROUPS) * blocks_per_group
    with ExitStack() as stack:
        ranks = []
        for first, end in deal:
            geometry = Geometry(
                planes_per_block, blocks_per_group, tokens, NUM_LAYERS, first, end, ROW_BYTES
            )
            arena = Segment(num_blocks * planes_per_block * geometry.plane_bytes)
            stack.callback(arena.close)
            arena.tensor().numpy()[:] = 255
            transport = SharedTransport(arena.fd, arena.num_bytes)
            stack.callback(transport.close)
            exchange = Exchange(f"{name}#1", {MODEL: geometry}, arena.tensor(), transport)
            ranks.append(Rank(geometry, arena, exchange))
        chosen = np.random.default_rng(len(deal)).permutation(num_blocks)
        yield ranks, chosen[: groups * blocks_per_group].tolist()


def pack(blocks: Sequence[int]) -> bytes:
    return np.array(blocks, np.int32).tobytes()


def pieces_of(ranks: Sequence[Rank], blocks: Sequence[int], num_tokens: int) -> list[Piece]:
    """The first two groups whole; then the others, layer by layer."""
    one = ranks[0].geometry
    num_groups = -(-num_tokens // one.block_tokens)
    cuts = [(0, min(2, num_groups), 0, NUM_LAYERS)]
    cuts += [(2, num_groups, layer, layer + 1) for layer in range(NUM_LAYERS) if num_groups > 2]
    return [
        Piece(
            number=number,
            blocks=pack(blocks[begin * one.blocks_per_group : end * one.blocks_per_group]),
            first_group=begin,
            first_layer=first_layer,
            end_layer=end_layer,
            num_tokens=min(num_tokens, end * one.block_tokens),
        )
        for number, (begin, end, first_layer, end_layer) in enumerate(cuts)
    ]


def sealed(ranks: Sequence[Rank], piece: Piece) -> Piece:
    """As its unit tells of it: with the checksums of all ranks, in their order."""
    work = Transfer(0, 0, MODEL, TransferKind.SEAL, 0, (piece,))
    found = [rank.exchange.run(work).checksums for rank in ranks]
    return replace(piece, checksums=tuple(one for several in found for one in several))


def fetch_of(
    ranks: Sequence[Rank], pieces: Sequence[Piece], num_tokens: int, blocks: Sequence[int]
) -> Transfer:
    """What every rank of the other unit is told: the same."""
    address = joined([rank.exchange.address(MODEL) for rank in ranks])
    source = Source(unit="p#1", address=address, num_tokens=num_tokens, pieces=tuple(pieces))
    kind = TransferKind.FETCH
    return Transfer(0, 0, MODEL, kind, 0, tuple(pieces), pack(blocks), source)


def deal(num_heads: int, num_ranks: int) -> list[tuple[int, int]]:
    """As tensor parallel ranks have them: the same number each; of too few heads one, repeated."""
    each = max(1, num_heads // num_ranks)
    firsts = [rank * num_heads // num_ranks for rank in range(num_ranks)]
    return [(first, first + each) for first in firsts]


@pytest.mark.parametrize("seed", range(40))
def test_every_rank_has_its_heads_of_what_one_unit_would_have(seed: int) -> None:
    random = Random(seed)
    num_heads = random.choice((1, 2, 4))
    senders, receivers = (deal(num_heads, random.choice((1, 2, 4))) for _ in range(2))
    tokens, own_tokens = random.choice((4, 8)), random.choice((4, 8))
    num_tokens = random.randint(1, 37)
    groups, own_groups = -(-num_tokens // tokens), -(-num_tokens // own_tokens)
    shape = (num_tokens, NUM_LAYERS, num_heads, 2, ROW_BYTES)
    rows = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
    with (
        unit("p", senders, tokens, random.choice((1, 2, 4)), groups) as (theirs, blocks),
        unit("d", receivers, own_tokens, random.choice((1, 2, 4)), own_groups) as (ours, own),
    ):
        for rank in theirs:
            rank.write(blocks, rows)
        pieces = [sealed(theirs, piece) for piece in pieces_of(theirs, blocks, num_tokens)]
        work = fetch_of(theirs, pieces, num_tokens, own)
        for rank, (first, end) in zip(ours, receivers, strict=True):
            assert rank.exchange.run(work).error is None
            assert np.array_equal(rank.rows(own, num_tokens), rows[:, :, first:end])


def test_two_halves_together_hold_what_one_whole_holds() -> None:
    num_tokens = 21
    rows = np.random.default_rng(1).integers(0, 255, (num_tokens, NUM_LAYERS, 4, 2, ROW_BYTES))
    found = []
    for receivers in ([(0, 4)], [(0, 2), (2, 4)]):
        with unit("p", [(0, 4)], 4, 2, 6) as (theirs, blocks), unit("d", receivers, 4, 2, 6) as d:
            theirs[0].write(blocks, rows.astype(np.uint8))
            pieces = [sealed(theirs, piece) for piece in pieces_of(theirs, blocks, num_tokens)]
            for rank in d[0]:
                rank.exchange.run(fetch_of(theirs, pieces, num_tokens, d[1]))
            parts = [rank.rows(d[1], num_tokens) for rank in d[0]]
            found.append(np.concatenate(parts, axis=2))
    assert np.array_equal(*found) and np.array_equal(found[0], rows)


def test_a_damaged_head_is_noticed_by_who_takes_it_and_by_nobody_else() -> None:
    with unit("p", [(0, 4)], 4, 2, 5) as (theirs, blocks), unit("d", deal(4, 4), 8, 1, 3) as d:
        pieces = [sealed(theirs, piece) for piece in pieces_of(theirs, blocks, 17)]
        at, _ = theirs[0].place(blocks, 13, 1, 2)
        theirs[0].arena.tensor()[at] ^= 4
        errors = [rank.exchange.run(fetch_of(theirs, pieces, 17, d[1])).error for rank in d[0]]
    assert errors[:2] == [None, None] and errors[3] is None
    assert errors[2] is not None and "piece 2 that came from p#1 is not what it sealed" in errors[2]


def test_heads_that_nobody_has_are_not_made_up() -> None:
    with unit("p", [(0, 2)], 4, 1, 2) as (theirs, blocks), unit("d", [(2, 4)], 4, 1, 2) as d:
        pieces = [sealed(theirs, piece) for piece in pieces_of(theirs, blocks, 8)]
        error = d[0][0].exchange.run(fetch_of(theirs, pieces, 8, d[1])).error
    assert error == "found no kv head 2 in p#1, expected heads 2 to 3"
