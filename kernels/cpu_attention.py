"""Attention over the arena for numba: blocks are read in place, each once per tile of queries.

A tile is up to 64 rows, a row being one query head of one new token; all heads that share a kv
head lie in the same tile. Everything of a tile is stored transposed ([head_dim, rows]), so that
vectors run along rows whatever the head size, and K and V enter as scalars straight from their
blocks. Softmax is online, over chunks of keys.

Results of a row depend neither on the batch nor on the number of threads, but on the number of new
tokens of its sequence (in last bits): with fewer than `FEW` query heads per kv head a single token
takes the shorter way of `_decode`.
"""

from typing import Any

import numpy as np

from muxrt.kernels.jit import as_arena, as_float, float_of_bits, inlined, kernel, prefetch
from muxrt.kernels.panel import NARROW, ROWS, WIDE, make_panel

Array = Any  # numba's view: a numpy array
Geometry = Any  # (heads, kv_heads, head_dim, block_tokens, blocks_per_group, planes_per_block)

FEW = 8  # query heads of a kv head from which on a decode step is a tile (measured)
LINE_BYTES = 64  # of a cache line
CHUNK = 64  # keys per step of the online softmax
MASKED = np.float32(-1e30)  # finite: a difference of two infinities would be NaN


@inlined
def exp(x: Any) -> Any:
    """e**x of a float32 <= 88, within 2 units in the last place; below -87 it is e**-87.

    Branch-free, so that loops around it become vector code (libm's is a call per element).
    """
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.0 / 720)
    p = p * r + np.float32(1.0 / 120)
    p = p * r + np.float32(1.0 / 24)
    p = p * r + np.float32(1.0 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * float_of_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@inlined
def _locate(geometry: Geometry, plane: int) -> tuple[int, int, int]:
    """(column of the plane's block within a group, elements of a block, the plane's offset in it).

    With `_offset` KvCache's formula, cut so that no division is left for the inner loops.
    """
    _, _, head_dim, block_tokens, _, planes_per_block = geometry
    elems = 2 * block_tokens * head_dim
    return plane // planes_per_block, planes_per_block * elems, (plane % planes_per_block) * elems


@inlined
def _offset(ids: Array, group: int, geometry: Geometry, where: Any) -> Any:
    """Element offset, in 64 bits, of K of a group's first token; `ids` is a row of block ids."""
    column, block_elems, inner = where
    return np.int64(ids[group * geometry[4] + column]) * block_elems + inner


@kernel()
def survey(starts: Array, query_starts: Array, tile_queries: int) -> tuple[int, int]:
    """(tiles of a batch, keys that they read): work items per kv head, and how long they take."""
    tiles, keys = 0, 0
    for sequence in range(len(starts)):
        num_queries = query_starts[sequence + 1] - query_starts[sequence]
        count = (num_queries + tile_queries - 1) // tile_queries
        tiles += count
        keys += count * (starts[sequence] + num_queries)
    return tiles, keys


@kernel()
def store_kv(
    begin: int,
    end: int,
    k: Array,
    v: Array,
    k_stride: int,
    v_stride: int,
    arena: Array,
    table: Array,
    slots: Array,
    positions: Array,
    token_sequence: Array,
    geometry: Geometry,
    layer: int,
) -> None:
    """Write K and V of tokens [begin, end) into their planes; `*_stride` floats per token."""
    _, kv_heads, head_dim, block_tokens, _, _ = geometry
    to_values = block_tokens * head_dim
    for token in range(begin, end):
        slot = slots[token_sequence[token]]
        for head in range(kv_heads):
            group = positions[token] // block_tokens
            where = _locate(geometry, layer * kv_heads + head)
            at = _offset(table[slot], group, geometry, where)
            at += (positions[token] - group * block_tokens) * head_dim
            keys, values = (
                arena[at : at + head_dim],
                arena[at + to_values : at + to_values + head_dim],
            )
            source = token * k_stride + head * head_dim
            new_keys = k[source : source + head_dim]
            source = token * v_stride + head * head_dim
            new_values = v[source : source + head_dim]
            for d in range(head_dim):
                keys[d] = as_arena(new_keys[d], arena)
                values[d] = as_arena(new_values[d], arena)


def _make_tile(width: int) -> Any:
    """Attention of a tile of at most `width` rows; row r is query r // groups, head r % groups."""
    multiply, multiply_more = make_panel(width, fresh=True), make_panel(width, fresh=False)

    @inlined
    def load_queries(q: Array, stride: int, groups: int, head_dim: int, scale: Any, num: int,
                     into: Array) -> None:  # fmt: skip
        """into[d, row] = q * scale; rows beyond the tile are 0 and come to nothing."""
        into[: head_dim * width] = np.float32(0)
        for row in range(num * groups):
            at = (row // groups) * stride + (row % groups) * head_dim
            for d in range(head_dim):
                into[d * width + row] = q[at + d] * scale

    @inlined
    def mask(
        scores: Array, first: int, num_keys: int, position: int, groups: int, rows: int
    ) -> None:
        """Hide keys that lie after a row's own token."""
        for key in range(max(0, position + 1 - first), num_keys):
            hidden = min(rows, (first + key - position) * groups)
            scores[key * width : key * width + hidden] = MASKED

    @inlined
    def soften(scores: Array, num_keys: int, top: Array, total: Array, shrink: Array) -> bool:
        """scores -> exp(scores - top); True where what was summed before must shrink.

        Lines are WIDE floats, that is `WIDE // width` keys side by side, whatever the width:
        LLVM makes vector code of these loops, but would unroll loops of 16 into scalars.
        `top` and `shrink` repeat along a line; `total` is a partial sum per place.
        """
        num_lines = (num_keys * width + WIDE - 1) // WIDE
        scores[num_keys * width : num_lines * WIDE] = MASKED
        for i in range(WIDE):
            shrink[i] = top[i]
        for at in range(0, num_lines * WIDE, WIDE):
            line = scores[at : at + WIDE]
            for i in range(WIDE):
                top[i] = line[i] if line[i] > top[i] else top[i]
        for row in range(width):
            for i in range(row + width, WIDE, width):
                top[row] = max(top[row], top[i])
            for i in range(row + width, WIDE, width):
                top[i] = top[row]
        grown = False
        for i in range(WIDE):
            grown |= shrink[i] < top[i]
            shrink[i] = exp(shrink[i] - top[i])
            total[i] *= shrink[i]
        for at in range(0, num_lines * WIDE, WIDE):
            line = scores[at : at + WIDE]
            for i in range(WIDE):
                line[i] = exp(line[i] - top[i])
                total[i] += line[i]
        return grown

    @inlined
    def tile(
        q: Array,
        q_stride: int,
        arena: Array,
        table: Array,
        slot: int,
        plane: int,
        position: int,
        num: int,
        geometry: Geometry,
        scale: Any,
        scratch: Array,
        out: Array,
    ) -> None:
        """Queries at positions [position, position + num) of one slot, one kv head's plane."""
        heads, kv_heads, head_dim, block_tokens, _, _ = geometry
        to_values, per_line = block_tokens * head_dim, LINE_BYTES // arena.itemsize
        groups = heads // kv_heads
        rows = num * groups
        ids, where = table[slot], _locate(geometry, plane)
        queries = scratch[: head_dim * width]
        sums = scratch[head_dim * width : 2 * head_dim * width]
        # Panels work on whole sets of ROWS keys: the last one may spill over the chunk.
        scores = scratch[2 * head_dim * width : (2 * head_dim + CHUNK + ROWS) * width]
        state = scratch[(2 * head_dim + CHUNK + ROWS) * width :]
        top, total, shrink = state[:WIDE], state[WIDE : 2 * WIDE], state[2 * WIDE : 3 * WIDE]
        load_queries(q, q_stride, groups, head_dim, scale, num, queries)
        sums[:] = np.float32(0)
        top[:] = MASKED
        total[:] = np.float32(0)
        context = position + num
        for first in range(0, context, CHUNK):
            num_keys = min(CHUNK, context - first)
            key = 0
            while key < num_keys:
                group = (first + key) // block_tokens
                skip = first + key - group * block_tokens
                run = min(num_keys - key, block_tokens - skip)
                at = _offset(ids, group, geometry, where) + skip * head_dim
                following = min(first + key + run, context - 1) // block_tokens
                ahead = _offset(ids, following, geometry, where)
                for some in range(0, run, ROWS):
                    # Blocks lie anywhere: the processor cannot guess the next one.
                    for i in range(some * head_dim, (some + ROWS) * head_dim, per_line):
                        prefetch(arena, ahead + i)
                    # Rows past the end may never have been written: repeat the last one instead.
                    last = run - 1 - some
                    a0 = at + some * head_dim
                    a1, a2 = a0 + min(1, last) * head_dim, a0 + min(2, last) * head_dim
                    a3 = a0 + min(3, last) * head_dim
                    multiply(
                        scores, (key + some) * width, arena, a0, a1, a2, a3, 1, queries, 0, head_dim
                    )
                key += run
            if first + num_keys > position + 1:
                mask(scores, first, num_keys, position, groups, rows)
            if soften(scores, num_keys, top, total, shrink):
                for line_at in range(0, head_dim * width, WIDE):
                    line = sums[line_at : line_at + WIDE]
                    for i in range(WIDE):
                        line[i] *= shrink[i]
            key = 0
            while key < num_keys:
                group = (first + key) // block_tokens
                skip = first + key - group * block_tokens
                run = min(num_keys - key, block_tokens - skip)
                at = _offset(ids, group, geometry, where) + to_values + skip * head_dim
                following = min(first + key + run, context - 1) // block_tokens
                ahead = _offset(ids, following, geometry, where) + to_values
                for d in range(0, head_dim, ROWS):
                    for i in range(d * block_tokens, (d + ROWS) * block_tokens, per_line):
                        prefetch(arena, ahead + i)
                    multiply_more(
                        sums, d * width, arena, at + d, at + d + 1, at + d + 2, at + d + 3,
                        head_dim, scores, key * width, run,
                    )  # fmt: skip
                key += run
        for row in range(rows):
            for i in range(row + width, WIDE, width):
                total[row] += total[i]
            at = ((row // groups) * heads + row % groups) * head_dim
            for d in range(head_dim):
                out[at + d] = sums[d * width + row] / total[row]

    return tile


_narrow_tile, _wide_tile = _make_tile(NARROW), _make_tile(WIDE)


@inlined
def _decode(
    q: Array,
    arena: Array,
    table: Array,
    slot: int,
    plane: int,
    position: int,
    geometry: Geometry,
    scale: Any,
    out: Array,
) -> None:
    """One new token with few query heads: dot products along the head, no transposition."""
    heads, kv_heads, head_dim, block_tokens, _, _ = geometry
    to_values, per_line = block_tokens * head_dim, LINE_BYTES // arena.itemsize
    groups = heads // kv_heads
    context = position + 1
    ids, where = table[slot], _locate(geometry, plane)
    scores = np.empty(groups * context, np.float32)
    queries = np.empty(groups * head_dim, np.float32)
    for i in range(groups * head_dim):
        queries[i] = q[i] * scale
    for first in range(0, context, block_tokens):
        run = min(block_tokens, context - first)
        at = _offset(ids, first // block_tokens, geometry, where)
        ahead = _offset(ids, min(first + block_tokens, position) // block_tokens, geometry, where)
        for key in range(run):
            for i in range(key * head_dim, (key + 1) * head_dim, per_line):
                prefetch(arena, ahead + i)
            keys = arena[at + key * head_dim : at + (key + 1) * head_dim]
            for group in range(groups):
                query = queries[group * head_dim : (group + 1) * head_dim]
                score = np.float32(0)
                for d in range(head_dim):
                    score += query[d] * as_float(keys[d])
                scores[group * context + first + key] = score
    for group in range(groups):
        line = scores[group * context : (group + 1) * context]
        top = MASKED
        for i in range(context):
            top = max(top, line[i])
        total = np.float32(0)
        for i in range(context):
            line[i] = exp(line[i] - top)
            total += line[i]
        for i in range(context):
            line[i] /= total
    out[: groups * head_dim] = np.float32(0)
    for first in range(0, context, block_tokens):
        run = min(block_tokens, context - first)
        at = _offset(ids, first // block_tokens, geometry, where) + to_values
        ahead = _offset(ids, min(first + block_tokens, position) // block_tokens, geometry, where)
        for group in range(groups):
            result = out[group * head_dim : (group + 1) * head_dim]
            weights = scores[group * context + first : group * context + first + run]
            for key in range(0, run - 3, 4):
                w0, w1, w2, w3 = weights[key], weights[key + 1], weights[key + 2], weights[key + 3]
                if group == 0:
                    for i in range(key * head_dim, (key + 4) * head_dim, per_line):
                        prefetch(arena, ahead + to_values + i)
                here = at + key * head_dim
                v0 = arena[here : here + head_dim]
                v1 = arena[here + head_dim : here + 2 * head_dim]
                v2 = arena[here + 2 * head_dim : here + 3 * head_dim]
                v3 = arena[here + 3 * head_dim : here + 4 * head_dim]
                for d in range(head_dim):
                    result[d] += (
                        w0 * as_float(v0[d]) + w1 * as_float(v1[d])
                        + w2 * as_float(v2[d]) + w3 * as_float(v3[d])
                    )  # fmt: skip
            for key in range(run // 4 * 4, run):
                values = arena[at + key * head_dim : at + (key + 1) * head_dim]
                for d in range(head_dim):
                    result[d] += weights[key] * as_float(values[d])


@kernel()
def attend(
    begin: int,
    end: int,
    q: Array,
    q_stride: int,
    arena: Array,
    table: Array,
    slots: Array,
    starts: Array,
    query_starts: Array,
    geometry: Geometry,
    layer: int,
    scale: Any,
    tile_queries: int,
    num_tiles: int,
    out: Array,
) -> None:
    """Attend for items [begin, end) of kv heads x tiles, heads outermost: that balances threads.

    q as rows of `q_stride` floats, out [T * heads * head_dim].
    """
    heads, kv_heads, head_dim, _, _, _ = geometry
    groups = heads // kv_heads
    scratch = np.empty((2 * head_dim + CHUNK + ROWS + 3) * WIDE, np.float32)
    sequence, first = 0, 0  # a sequence and its first tile
    for item in range(begin, end):
        head, tile = item // num_tiles, item % num_tiles
        if tile < first:
            sequence, first = 0, 0
        while True:
            num = query_starts[sequence + 1] - query_starts[sequence]
            count = (num + tile_queries - 1) // tile_queries
            if tile < first + count:
                break
            first += count
            sequence += 1
        skip = (tile - first) * tile_queries
        num = min(tile_queries, num - skip)
        token, position = query_starts[sequence] + skip, starts[sequence] + skip
        slot, plane = slots[sequence], layer * kv_heads + head
        queries = q[token * q_stride + head * groups * head_dim :]
        result = out[(token * heads + head * groups) * head_dim :]
        if num == 1 and groups < FEW:
            _decode(queries, arena, table, slot, plane, position, geometry, scale, result)
        elif num * groups <= NARROW:
            _narrow_tile(
                queries, q_stride, arena, table, slot, plane, position, num, geometry, scale,
                scratch, result,
            )  # fmt: skip
        else:
            _wide_tile(
                queries, q_stride, arena, table, slot, plane, position, num, geometry, scale,
                scratch, result,
            )  # fmt: skip
