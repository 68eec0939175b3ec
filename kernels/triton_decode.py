"""Decode attention in Triton over the paged arena: split K and V, the q heads of a group together.

Flash-Decoding (Dao, Haziza, Massa, Sizov 2023): a program takes one kv head of one sequence and a
part of its tokens, keeps the running maximum and sum of FlashAttention (Dao et al. 2022, section
3.1), and a second kernel adds the parts up. Exponents are those of 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from muxrt.kernels.device import DecodeWorkspace
from muxrt.kernels.types import DeviceMeta, KvCache

LOG2_E = 1.4426950408889634


def decode_attention(
    qkv: Tensor,
    kv: KvCache,
    meta: DeviceMeta,
    layer: int,
    out: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
) -> None:
    num_sequences, splits, tiling = len(meta.slots), workspace.splits, workspace.tiling
    num_heads = out.shape[1] // kv.head_dim
    padded_dim = triton.next_power_of_2(kv.head_dim)
    _decode[(kv.num_kv_heads, num_sequences, splits)](
        qkv,
        kv.arena,
        kv.block_table,
        meta.slots,
        meta.starts,
        meta.query_starts,
        out,
        workspace.parts,
        workspace.weights,
        scale * LOG2_E,
        layer,
        qkv.shape[1],
        kv.block_table.shape[1],
        kv.blocks_per_group,
        kv.num_kv_heads,
        num_heads // kv.num_kv_heads,
        kv.head_dim,
        kv.block_tokens,
        kv.planes_per_block,
        tiling.rows,
        padded_dim,
        tiling.tokens,
        splits,
        tiling.stages,
        triton.knobs.runtime.interpret,
        num_warps=tiling.warps,
    )
    if splits > 1:
        _add_parts[(num_heads, num_sequences)](
            workspace.parts,
            workspace.weights,
            meta.query_starts,
            out,
            num_heads,
            kv.head_dim,
            padded_dim,
            splits,
            triton.next_power_of_2(splits),
        )


@triton.jit(do_not_specialize=["layer"])
def _decode(
    qkv: tl.tensor,
    arena: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    starts: tl.tensor,
    query_starts: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    width: tl.tensor,
    columns: tl.tensor,
    blocks_per_group: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    PLANE_ELEMS: tl.constexpr = 2 * BLOCK_TOKENS * HEAD_DIM
    HEADS: tl.constexpr = KV_HEADS * GROUP
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(query_starts + sequence).to(tl.int64)
    if row >= tl.load(query_starts + sequence + 1):
        return
    context = tl.load(starts + sequence) + 1
    part = tl.cdiv(tl.cdiv(context, TOKENS), SPLITS) * TOKENS
    begin = split * part
    end = tl.minimum(begin + part, context)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    is_row = rows < GROUP
    is_dim = dims < HEAD_DIM
    heads = kv_head * GROUP + rows
    is_value = is_row[:, None] & is_dim[None, :]
    q = tl.load(
        qkv + row * width + heads[:, None] * HEAD_DIM + dims[None, :], mask=is_value, other=0.0
    )
    slot = tl.load(slots + sequence).to(tl.int64)
    plane = layer * KV_HEADS + kv_head
    ids_of_plane = table + slot * columns + plane // PLANES
    plane_start = (plane % PLANES) * PLANE_ELEMS

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM], tl.float32)
    for first in tl.range(begin, end, TOKENS, num_stages=STAGES):
        tokens = first + tl.arange(0, TOKENS)
        is_token = tokens < end
        ids = tl.load(
            ids_of_plane + (tokens // BLOCK_TOKENS) * blocks_per_group, mask=is_token, other=0
        )
        start = ids.to(tl.int64) * (PLANES * PLANE_ELEMS) + plane_start
        start += (tokens % BLOCK_TOKENS) * HEAD_DIM
        at = arena + start[:, None] + dims[None, :]
        is_stored = is_token[:, None] & is_dim[None, :]
        k = tl.load(at, mask=is_stored, other=0.0).to(q.dtype)
        v = tl.load(at + PLANE_ELEMS // 2, mask=is_stored, other=0.0).to(q.dtype)
        if ROWS == 1:
            products = q.to(tl.float32) * k.to(tl.float32)  # [TOKENS, DIM]
            scores = tl.sum(products, axis=1)[None, :]
        else:
            scores = _dot(q, tl.trans(k), INTERPRETED)
        scores = tl.where(is_token[None, :], scores * scale, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, axis=1))
        exponents = tl.exp2(scores - highest[:, None])  # [ROWS, TOKENS]
        fade = tl.exp2(best - highest)
        total = total * fade + tl.sum(exponents, axis=1)
        if ROWS == 1:
            column = tl.trans(exponents)  # [TOKENS, 1]
            added = tl.sum(column * v.to(tl.float32), axis=0)[None, :]
        else:
            added = _dot(exponents.to(q.dtype), v, INTERPRETED)
        result = result * fade[:, None] + added
        best = highest

    if SPLITS == 1:
        result = result / total[:, None]
        into = out + row * (HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(into, result.to(out.dtype.element_ty), mask=is_value)
    else:
        # A part without tokens has best = -inf: it weighs nothing, and its result is not read.
        at_part = (sequence.to(tl.int64) * HEADS + heads) * SPLITS + split
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(weights + at_part, best + tl.log2(total), mask=is_row)
        into = parts + at_part[:, None] * HEAD_DIM + dims[None, :]
        tl.store(into, result / total[:, None], mask=is_value)


@triton.jit
def _add_parts(
    parts: tl.tensor,
    weights: tl.tensor,
    query_starts: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """The parts of one head of one sequence, each by its share of the sum of exponents."""
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    row = tl.load(query_starts + sequence).to(tl.int64)
    if row >= tl.load(query_starts + sequence + 1):
        return
    splits = tl.arange(0, PADDED)
    dims = tl.arange(0, DIM)
    at = (sequence * heads + head) * SPLITS + splits
    weight = tl.load(weights + at, mask=splits < SPLITS, other=float("-inf"))
    share = tl.exp2(weight - tl.max(weight, axis=0))
    share = share / tl.sum(share, axis=0)
    is_read = (weight > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
    part = tl.load(parts + at[:, None] * HEAD_DIM + dims[None, :], mask=is_read, other=0.0)
    result = tl.sum(part * share[:, None], axis=0)
    into = out + (row * heads + head) * HEAD_DIM + dims
    tl.store(into, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """a @ b, as exact as float32 where they are (three products of TF32)."""
    if INTERPRETED:  # it holds bfloat16 as integers and cannot multiply it
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="tf32x3")
