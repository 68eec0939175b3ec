"""Prefill attention in Triton: causal FlashAttention-2 over the paged arena, prefix included.

FlashAttention-2 (Dao 2023, section 3.1): a program takes a tile of queries of one sequence, with
all q heads of one kv head (so K and V are read once for a group), and goes over the tokens up to
them; only the last tiles need a mask. Exponents are those of 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from muxrt.kernels import device
from muxrt.kernels.triton_decode import LOG2_E, _dot
from muxrt.kernels.types import DeviceMeta, KvCache


def prefill_attention(
    qkv: Tensor,
    kv: KvCache,
    meta: DeviceMeta,
    layer: int,
    out: Tensor,
    scale: float,
    tiling: device.Tiling | None = None,
) -> None:
    """`tiling` instead of the one for the chip, for comparisons."""
    num_sequences, num_tokens = len(meta.slots), len(qkv)
    group = out.shape[1] // kv.head_dim // kv.num_kv_heads
    padded_group = triton.next_power_of_2(group)
    chip = device.chip_of(qkv.device)
    tiling = tiling or device.prefill_tiling(
        chip, kv.head_dim, group, qkv.itemsize, kv.arena.itemsize
    )
    # Tiles do not cross sequences: each may begin one more than its tokens fill.
    tiles = num_tokens // (tiling.rows // padded_group) + num_sequences
    _prefill[(tiles, kv.num_kv_heads)](
        qkv,
        kv.arena,
        kv.block_table,
        meta.slots,
        meta.starts,
        meta.query_starts,
        out,
        scale * LOG2_E,
        layer,
        num_sequences,
        qkv.shape[1],
        kv.block_table.shape[1],
        kv.blocks_per_group,
        kv.num_kv_heads,
        group,
        padded_group,
        kv.head_dim,
        triton.next_power_of_2(kv.head_dim),
        kv.block_tokens,
        kv.planes_per_block,
        tiling.rows,
        tiling.tokens,
        tiling.stages,
        triton.knobs.runtime.interpret,
        num_warps=tiling.warps,
    )


@triton.jit(do_not_specialize=["layer", "num_sequences"])
def _prefill(
    qkv: tl.tensor,
    arena: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    starts: tl.tensor,
    query_starts: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    num_sequences: tl.tensor,
    width: tl.tensor,
    columns: tl.tensor,
    blocks_per_group: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    QUERIES: tl.constexpr = ROWS // PADDED
    PLANE_ELEMS: tl.constexpr = 2 * BLOCK_TOKENS * HEAD_DIM
    # Late queries have most to read: theirs begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _sequence_of(tile, query_starts, num_sequences, QUERIES)
    first_row = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first_row
    first_query = (tile - first_row // QUERIES - sequence) * QUERIES
    if first_query >= num_queries:
        return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    queries = first_query + rows // PADDED
    heads = kv_head * GROUP + rows % PADDED
    is_value = (queries < num_queries) & (rows % PADDED < GROUP)
    is_value = is_value[:, None] & (dims < HEAD_DIM)[None, :]
    row = (first_row + queries).to(tl.int64)
    at = row[:, None] * width + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(qkv + at, mask=is_value, other=0.0)

    start = tl.load(starts + sequence)
    slot = tl.load(slots + sequence).to(tl.int64)
    plane = layer * KV_HEADS + kv_head
    ids_of_plane = table + slot * columns + plane // PLANES
    plane_start = arena + (plane % PLANES) * PLANE_ELEMS
    positions = start + queries
    end = start + tl.minimum(first_query + QUERIES, num_queries)
    seen_by_all = (start + first_query + 1) // TOKENS * TOKENS

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM], tl.float32)
    best, total, result = _attend(
        best, total, result, q, plane_start, ids_of_plane, blocks_per_group, positions, 0,
        seen_by_all, end, scale, HEAD_DIM, DIM, BLOCK_TOKENS, PLANES, TOKENS, STAGES, False,
        INTERPRETED,
    )  # fmt: skip
    best, total, result = _attend(
        best, total, result, q, plane_start, ids_of_plane, blocks_per_group, positions,
        seen_by_all, end, end, scale, HEAD_DIM, DIM, BLOCK_TOKENS, PLANES, TOKENS, STAGES, True,
        INTERPRETED,
    )  # fmt: skip
    into = row[:, None] * (KV_HEADS * GROUP) + heads[:, None]
    result = (result / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + into * HEAD_DIM + dims[None, :], result, mask=is_value)


@triton.jit
def _sequence_of(
    tile: tl.tensor, query_starts: tl.tensor, num_sequences: tl.tensor, QUERIES: tl.constexpr
) -> tl.tensor:
    """The last sequence whose first tile is not after `tile`: sequence s begins with tile
    query_starts[s] // QUERIES + s, which leaves every one before it tiles enough.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend(
    best: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    q: tl.tensor,
    plane_start: tl.tensor,
    ids_of_plane: tl.tensor,
    blocks_per_group: tl.tensor,
    positions: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Go over tokens [begin, stop), of which those from `end` on are not stored."""
    PLANE_ELEMS: tl.constexpr = 2 * BLOCK_TOKENS * HEAD_DIM
    dims = tl.arange(0, DIM)
    is_dim = (dims < HEAD_DIM)[None, :]
    for first in tl.range(begin, stop, TOKENS, num_stages=STAGES):
        tokens = first + tl.arange(0, TOKENS)
        at_id = ids_of_plane + (tokens // BLOCK_TOKENS) * blocks_per_group
        if MASKED:
            is_stored = (tokens < end)[:, None] & is_dim
            ids = tl.load(at_id, mask=tokens < end, other=0)
        else:
            is_stored = is_dim
            ids = tl.load(at_id)
        start = ids.to(tl.int64) * (PLANES * PLANE_ELEMS) + (tokens % BLOCK_TOKENS) * HEAD_DIM
        at = plane_start + start[:, None] + dims[None, :]
        if MASKED or DIM != HEAD_DIM:
            k = tl.load(at, mask=is_stored, other=0.0).to(q.dtype)
            v = tl.load(at + PLANE_ELEMS // 2, mask=is_stored, other=0.0).to(q.dtype)
        else:
            k = tl.load(at).to(q.dtype)
            v = tl.load(at + PLANE_ELEMS // 2).to(q.dtype)
        scores = _dot(q, tl.trans(k), INTERPRETED) * scale
        if MASKED:
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, axis=1))
        exponents = tl.exp2(scores - highest[:, None])  # [ROWS, TOKENS]
        fade = tl.exp2(best - highest)
        total = total * fade + tl.sum(exponents, axis=1)
        result = result * fade[:, None] + _dot(exponents.to(q.dtype), v, INTERPRETED)
        best = highest
    return best, total, result
