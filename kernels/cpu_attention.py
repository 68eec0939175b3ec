"""Attention over the arena for numba: each block is read once per tile of queries.

A tile is up to 64 rows, a row being one query head of one new token; all heads that share a kv
head lie in the same tile. Everything of a tile is stored transposed ([head_dim, rows]), so that
vectors run along rows whatever the head size, and K and V enter as scalars, a chunk of keys at a
time. Softmax is online, over these chunks.

Results of a row depend neither on the batch nor on the number of threads, but on the number of new
tokens of its sequence (in last bits): with at most `FEW` query heads per kv head a single token
takes the shorter way of `_decode`.
"""

from typing import Any

import numpy as np
from numba import carray
from numba.core import types

from muxrt.kernels.atomics import floats_at, int32_at, int64_at
from muxrt.kernels.cpu_math import exp
from muxrt.kernels.cpu_rows import norm
from muxrt.kernels.jit import EVERYWHERE, as_arena, as_float, inlined, kernel, stage
from muxrt.kernels.panel import (
    LINE_BYTES,
    NARROW,
    ROWS,
    WIDE,
    dots,
    exp_and_sum,
    largest,
    make_panel,
    make_product,
    prefetch,
)

Array = Any  # numba's view: a numpy array
Pointer = Any
Record = Any  # numba's view: a record of ATTENTION
Geometry = Any  # (heads, kv_heads, head_dim, block_tokens, blocks_per_group, planes_per_block)

FEW = 8  # query heads of a kv head up to which a decode step is rows of products, not a tile
AT_ONCE = 4  # of them whose sums over the values fit into registers
CHUNK = 64  # keys per step of the online softmax
MASKED = np.float32(-1e30)  # finite: a difference of two infinities would be NaN

ATTENTION = np.dtype(
    [
        ("qkv", np.int64),  # address of [tokens, heads + 2 * kv_heads, head_dim] floats
        ("out", np.int64),  # address of [tokens, heads, head_dim] floats
        *((name, np.int64) for name in ("heads", "kv_heads", "head_dim")),
        *((name, np.int64) for name in ("block_tokens", "blocks_per_group", "planes_per_block")),
        ("layer", np.int64),
        ("scale", np.float64),
        ("table", np.int64),  # address of [slots, columns] int32
        ("columns", np.int64),
        # Addresses of what `AttentionMeta` has.
        *((name, np.int64) for name in ("slots", "starts", "query_starts", "positions", "owners")),
        ("cos", np.int64),  # address of [positions, head_dim / 2] floats
        ("sin", np.int64),
        ("q_norm", np.int64),  # address of [head_dim] floats, or 0
        ("k_norm", np.int64),
        ("eps", np.float64),
        ("tile_queries", np.int64),
    ]
)


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


@inlined
def _geometry(a: Record) -> Geometry:
    return (
        a.heads,
        a.kv_heads,
        a.head_dim,
        a.block_tokens,
        a.blocks_per_group,
        a.planes_per_block,
    )


@kernel()
def num_tiles(query_starts: Array, num_sequences: int, tile_queries: int) -> int:
    """Tiles of a batch: work items per kv head."""
    tiles = 0
    for sequence in range(num_sequences):
        num_queries = query_starts[sequence + 1] - query_starts[sequence]
        tiles += (num_queries + tile_queries - 1) // tile_queries
    return tiles


@inlined
def _rotate(x: Array, heads: int, half: int, cos: Array, sin: Array) -> None:
    """Dimension i of a head pairs with i + half."""
    for head in range(heads):
        low = x[head * 2 * half : (head * 2 + 1) * half]
        high = x[(head * 2 + 1) * half : (head + 1) * 2 * half]
        for i in range(half):
            a, b = low[i], high[i]
            low[i] = a * cos[i] - b * sin[i]
            high[i] = b * cos[i] + a * sin[i]


@inlined
def _norm_heads(x: Array, heads: int, weight: int, head_dim: int, eps: float) -> None:
    """Norm every head in place; `weight` is an address."""
    weights = carray(floats_at(weight), EVERYWHERE)[:head_dim]
    for head in range(heads):
        row = x[head * head_dim : (head + 1) * head_dim]
        norm(row, weights, np.float32(eps), row)


@inlined
def _store(heads: Array, arena: Array, at: int, head_dim: int) -> None:
    target = arena[at : at + head_dim]
    for d in range(head_dim):
        target[d] = as_arena(heads[d], arena)


@stage(ATTENTION, (types.float32, types.uint16))
def rotate_and_store(begin: int, end: int, args: Pointer, data: Pointer) -> None:
    """Tokens [begin, end): norm heads where the model does, rotate q and k, store k and v."""
    a = carray(args, 1)[0]
    arena = carray(data, EVERYWHERE)
    geometry, to_values = _geometry(a), a.block_tokens * a.head_dim
    table = carray(int32_at(a.table), (EVERYWHERE, a.columns))
    slots, owners = carray(int32_at(a.slots), EVERYWHERE), carray(int32_at(a.owners), EVERYWHERE)
    positions = carray(int64_at(a.positions), EVERYWHERE)
    qkv, half = carray(floats_at(a.qkv), EVERYWHERE), a.head_dim // 2
    width = (a.heads + 2 * a.kv_heads) * a.head_dim
    all_cos, all_sin = carray(floats_at(a.cos), EVERYWHERE), carray(floats_at(a.sin), EVERYWHERE)
    for token in range(begin, end):
        position = positions[token]
        q = qkv[token * width : (token + 1) * width]
        k = q[a.heads * a.head_dim :]
        v = k[a.kv_heads * a.head_dim :]
        if a.q_norm != 0:
            _norm_heads(q, a.heads, a.q_norm, a.head_dim, a.eps)
        if a.k_norm != 0:
            _norm_heads(k, a.kv_heads, a.k_norm, a.head_dim, a.eps)
        cos = all_cos[position * half : (position + 1) * half]
        sin = all_sin[position * half : (position + 1) * half]
        _rotate(q, a.heads, half, cos, sin)
        _rotate(k, a.kv_heads, half, cos, sin)
        ids, group = table[slots[owners[token]]], position // a.block_tokens
        for head in range(a.kv_heads):
            at = _offset(ids, group, geometry, _locate(geometry, a.layer * a.kv_heads + head))
            at += (position - group * a.block_tokens) * a.head_dim
            _store(k[head * a.head_dim :], arena, at, a.head_dim)
            _store(v[head * a.head_dim :], arena, at + to_values, a.head_dim)


@inlined
def _gather(
    arena: Array, ids: Array, geometry: Geometry, where: Any, first: int, num: int, context: int,
    keys: Array, values: Array,
) -> None:  # fmt: skip
    """K and V of `num` tokens from `first` on as floats, [num, head_dim] each, from their blocks.

    Asks for what the next chunk needs: blocks lie anywhere, the processor cannot guess them.
    """
    _, _, head_dim, block_tokens, _, _ = geometry
    to_values, per_line = block_tokens * head_dim, LINE_BYTES // arena.itemsize
    key = 0
    while key < num:
        group = (first + key) // block_tokens
        skip = first + key - group * block_tokens
        run = min(num - key, block_tokens - skip)
        at = _offset(ids, group, geometry, where) + skip * head_dim
        following = min(first + key + CHUNK, context - 1) // block_tokens
        ahead = _offset(ids, following, geometry, where)
        begin, size = key * head_dim, run * head_dim
        for i in range(0, size, per_line):
            prefetch(arena, ahead + i)
            prefetch(arena, ahead + to_values + i)
        source, target = arena[at : at + size], keys[begin : begin + size]
        for i in range(size):
            target[i] = as_float(source[i])
        at += to_values
        source, target = arena[at : at + size], values[begin : begin + size]
        for i in range(size):
            target[i] = as_float(source[i])
        key += run


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
        heads, kv_heads, head_dim, _, _, _ = geometry
        groups = heads // kv_heads
        rows = num * groups
        ids, where = table[slot], _locate(geometry, plane)
        size = head_dim * width
        queries, sums = scratch[:size], scratch[size : 2 * size]
        # Panels work on whole sets of ROWS keys: the last one may spill over the chunk.
        scores = scratch[2 * size : 2 * size + (CHUNK + ROWS) * width]
        state = scratch[2 * size + (CHUNK + ROWS) * width :]
        top, total, shrink = state[:WIDE], state[WIDE : 2 * WIDE], state[2 * WIDE : 3 * WIDE]
        chunk = (CHUNK + ROWS) * head_dim
        keys = state[3 * WIDE : 3 * WIDE + chunk]
        values = state[3 * WIDE + chunk : 3 * WIDE + 2 * chunk]
        load_queries(q, q_stride, groups, head_dim, scale, num, queries)
        sums[:] = np.float32(0)
        top[:] = MASKED
        total[:] = np.float32(0)
        context = position + num
        for first in range(0, context, CHUNK):
            num_keys = min(CHUNK, context - first)
            _gather(arena, ids, geometry, where, first, num_keys, context, keys, values)
            for key in range(0, num_keys, ROWS):
                at = key * head_dim
                multiply(
                    scores, key * width, keys, at, at + head_dim, at + 2 * head_dim,
                    at + 3 * head_dim, 1, queries, 0, head_dim,
                )  # fmt: skip
            if first + num_keys > position + 1:
                mask(scores, first, num_keys, position, groups, rows)
            if soften(scores, num_keys, top, total, shrink):
                for line_at in range(0, size, WIDE):
                    line = sums[line_at : line_at + WIDE]
                    for i in range(WIDE):
                        line[i] *= shrink[i]
            for d in range(0, head_dim, ROWS):
                multiply_more(
                    sums, d * width, values, d, d + 1, d + 2, d + 3, head_dim, scores, 0, num_keys
                )
        for row in range(rows):
            for i in range(row + width, WIDE, width):
                total[row] += total[i]
            at = ((row // groups) * heads + row % groups) * head_dim
            for d in range(head_dim):
                out[at + d] = sums[d * width + row] / total[row]

    return tile


_narrow_tile, _wide_tile = _make_tile(NARROW), _make_tile(WIDE)


_w1, _w2, _w3, _w4 = (make_product(rows) for rows in range(1, AT_ONCE + 1))
_n1, _n2, _n3, _n4 = (make_product(rows, NARROW) for rows in range(1, AT_ONCE + 1))


@inlined
def _add_values(
    out: Array, d: int, width: int, heads: int, weights: Array, first: int, stride: int,
    arena: Array, at: int, num: int, ahead: int,
) -> None:  # fmt: skip
    """out[:, d : d + 64 or 16] += weights x values, for up to AT_ONCE query heads."""
    if d % width + WIDE <= width:
        if heads == 1:
            _w1(out, d, width, weights, first, stride, arena, at, width, num, arena, ahead)
        elif heads == 2:
            _w2(out, d, width, weights, first, stride, arena, at, width, num, arena, ahead)
        elif heads == 3:
            _w3(out, d, width, weights, first, stride, arena, at, width, num, arena, ahead)
        else:
            _w4(out, d, width, weights, first, stride, arena, at, width, num, arena, ahead)
    elif heads == 1:
        _n1(out, d, width, weights, first, stride, arena, at, width, num, arena, ahead)
    elif heads == 2:
        _n2(out, d, width, weights, first, stride, arena, at, width, num, arena, ahead)
    elif heads == 3:
        _n3(out, d, width, weights, first, stride, arena, at, width, num, arena, ahead)
    else:
        _n4(out, d, width, weights, first, stride, arena, at, width, num, arena, ahead)


@inlined
def _weigh(
    keys: Array, at: int, num: int, head_dim: int, queries: Array, row: int, top: Array,
    total: Array, out: Array, weights: Array, into: int,
) -> None:  # fmt: skip
    """weights[into :] = softmax, so far unscaled, of one query head over up to 16 keys."""
    dots(weights, into, keys, at, head_dim, num, queries, row * head_dim, head_dim)
    highest = largest(weights, into, num, MASKED)
    if highest > top[row]:
        shrink = exp(top[row] - highest)
        top[row] = highest
        total[row] *= shrink
        result = out[row * head_dim : (row + 1) * head_dim]
        for d in range(head_dim):
            result[d] *= shrink
    total[row] += exp_and_sum(weights, into, top[row])


@inlined
def _decode(
    q: Array,
    arena: Array,
    ids: Array,
    plane: int,
    num_planes: int,
    position: int,
    geometry: Geometry,
    scale: Any,
    out: Array,
) -> None:
    """One new token, the query heads of consecutive kv heads: planes are read as they lie.

    Keys and values are rows of products, never moved; softmax is online, over 16 keys at a time,
    so that one pass reads the K and V of all heads of a block from front to back.
    """
    heads, kv_heads, head_dim, block_tokens, _, _ = geometry
    to_values, groups = block_tokens * head_dim, heads // kv_heads
    rows, per_line = num_planes * groups, LINE_BYTES // arena.itemsize
    weights = np.empty(groups * NARROW, np.float32)
    queries = np.empty(rows * head_dim, np.float32)
    top, total = np.full(rows, MASKED), np.zeros(rows, np.float32)
    for i in range(rows * head_dim):
        queries[i] = q[i] * scale
        out[i] = np.float32(0)
    for first in range(0, position + 1, block_tokens):
        run = min(block_tokens, position + 1 - first)
        for head in range(num_planes):
            at = _offset(ids, first // block_tokens, geometry, _locate(geometry, plane + head))
            # Within a block planes follow each other; where the next block lies nobody can guess.
            ahead = at + 2 * to_values
            if head + 1 == num_planes:
                later = min(first + block_tokens, position) // block_tokens
                ahead = _offset(ids, later, geometry, _locate(geometry, plane))
            for key in range(0, run, NARROW):
                num, skip = min(NARROW, run - key), key * head_dim
                for i in range(skip, skip + num * head_dim, per_line):
                    prefetch(arena, ahead + i)
                for g in range(groups):
                    _weigh(
                        arena, at + skip, num, head_dim, queries, head * groups + g, top, total,
                        out, weights, g * NARROW,
                    )  # fmt: skip
                d = 0
                while d < head_dim:
                    for g in range(0, groups, AT_ONCE):
                        _add_values(
                            out, (head * groups + g) * head_dim + d, head_dim,
                            min(AT_ONCE, groups - g), weights, g * NARROW, NARROW, arena,
                            at + to_values + skip + d, num, ahead + to_values + skip,
                        )  # fmt: skip
                    d += WIDE if d + WIDE <= head_dim else NARROW
    for row in range(rows):
        factor = np.float32(1) / total[row]
        result = out[row * head_dim : (row + 1) * head_dim]
        for d in range(head_dim):
            result[d] *= factor


@stage(ATTENTION, (types.float32, types.uint16))
def attend(begin: int, end: int, args: Pointer, data: Pointer) -> None:
    """Items [begin, end) of tiles x kv heads, heads innermost: their planes lie side by side."""
    a = carray(args, 1)[0]
    arena, geometry = carray(data, EVERYWHERE), _geometry(a)
    table = carray(int32_at(a.table), (EVERYWHERE, a.columns))
    slots, starts = carray(int32_at(a.slots), EVERYWHERE), carray(int32_at(a.starts), EVERYWHERE)
    query_starts = carray(int32_at(a.query_starts), EVERYWHERE)
    q, out = carray(floats_at(a.qkv), EVERYWHERE), carray(floats_at(a.out), EVERYWHERE)
    stride = (a.heads + 2 * a.kv_heads) * a.head_dim
    groups = a.heads // a.kv_heads
    scale = np.float32(a.scale)
    num_floats = (2 * a.head_dim + CHUNK + ROWS + 3) * WIDE + 2 * (CHUNK + ROWS) * a.head_dim
    scratch = np.empty(num_floats, np.float32)
    sequence, first = 0, 0  # a sequence and its first tile
    item = begin
    while item < end:
        tile, head = item // a.kv_heads, item % a.kv_heads
        item += 1
        while True:
            num = np.int64(query_starts[sequence + 1]) - query_starts[sequence]
            count = (num + a.tile_queries - 1) // a.tile_queries
            if tile < first + count:
                break
            first += count
            sequence += 1
        skip = (tile - first) * a.tile_queries
        num = min(a.tile_queries, num - skip)
        token, position = query_starts[sequence] + skip, starts[sequence] + skip
        slot, plane = slots[sequence], a.layer * a.kv_heads + head
        queries = q[token * stride + head * groups * a.head_dim :]
        result = out[(token * a.heads + head * groups) * a.head_dim :]
        if num == 1 and groups <= FEW and a.head_dim % NARROW == 0:
            planes = min(a.kv_heads - head, end - item + 1)
            item += planes - 1
            _decode(queries, arena, table[slot], plane, planes, position, geometry, scale, result)
        elif num * groups <= NARROW:
            _narrow_tile(
                queries, stride, arena, table, slot, plane, position, num, geometry, scale,
                scratch, result,
            )  # fmt: skip
        else:
            _wide_tile(
                queries, stride, arena, table, slot, plane, position, num, geometry, scale,
                scratch, result,
            )  # fmt: skip
