"""A Triton kernel that norms and rotates q and k, and puts K and V into the arena, in one pass."""

import triton
import triton.language as tl
from torch import Tensor

from muxrt.kernels import device
from muxrt.kernels.types import DeviceMeta, KvCache

HEADS = 16  # that a program takes of one token

Norms = tuple[Tensor | None, Tensor | None]


def rope_and_store(
    qkv: Tensor,
    kv: KvCache,
    meta: DeviceMeta,
    layer: int,
    rope: tuple[Tensor, Tensor],
    norms: Norms,
    eps: float,
) -> None:
    device.check_kv_dtype(device.chip_of(qkv.device), kv.arena.dtype)
    rows, width = qkv.shape
    all_heads = width // kv.head_dim
    _rope_and_store[(rows, triton.cdiv(all_heads, HEADS))](
        qkv,
        kv.arena,
        kv.block_table,
        meta.slots,
        meta.query_starts,
        meta.positions,
        meta.token_sequence,
        *rope,
        *norms,
        eps,
        layer,
        len(meta.slots),
        kv.block_table.shape[1],
        kv.blocks_per_group,
        all_heads - 2 * kv.num_kv_heads,
        kv.num_kv_heads,
        kv.head_dim,
        kv.block_tokens,
        kv.planes_per_block,
        norms[0] is not None,
        norms[1] is not None,
        HEADS,
        triton.next_power_of_2(kv.head_dim // 2),
    )


@triton.jit(do_not_specialize=["layer", "num_sequences"])
def _rope_and_store(
    qkv: tl.tensor,
    arena: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    query_starts: tl.tensor,
    positions: tl.tensor,
    token_sequence: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    eps: tl.tensor,
    layer: tl.tensor,
    num_sequences: tl.tensor,
    columns: tl.tensor,
    blocks_per_group: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """Some heads of one token: q's, then k's, then v's, as they lie in the row."""
    ALL_HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    PLANE_ELEMS: tl.constexpr = 2 * BLOCK_TOKENS * HEAD_DIM
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(query_starts + num_sequences):
        return
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, PAIRS)
    is_inside = (heads < ALL_HEADS)[:, None] & (pairs < HALF)[None, :]
    at = (token * ALL_HEADS + heads[:, None]) * HEAD_DIM + pairs[None, :]
    low = tl.load(qkv + at, mask=is_inside, other=0.0).to(tl.float32)  # [HEADS, PAIRS]
    high = tl.load(qkv + at + HALF, mask=is_inside, other=0.0).to(tl.float32)

    is_q = (heads < Q_HEADS)[:, None]
    is_v = (heads >= Q_HEADS + KV_HEADS)[:, None]
    if HAS_Q_NORM or HAS_K_NORM:
        squares = tl.sum(low * low + high * high, axis=1)
        inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        if HAS_Q_NORM:
            weight = q_norm + pairs[None, :]
            weight_low = tl.load(weight, mask=(pairs < HALF)[None, :], other=0.0)
            weight_high = tl.load(weight + HALF, mask=(pairs < HALF)[None, :], other=0.0)
            low = tl.where(is_q, low * inverse * weight_low.to(tl.float32), low)
            high = tl.where(is_q, high * inverse * weight_high.to(tl.float32), high)
        if HAS_K_NORM:
            weight = k_norm + pairs[None, :]
            weight_low = tl.load(weight, mask=(pairs < HALF)[None, :], other=0.0)
            weight_high = tl.load(weight + HALF, mask=(pairs < HALF)[None, :], other=0.0)
            is_k = (is_q | is_v) == 0
            low = tl.where(is_k, low * inverse * weight_low.to(tl.float32), low)
            high = tl.where(is_k, high * inverse * weight_high.to(tl.float32), high)

    position = tl.load(positions + token)
    angle = position.to(tl.int64) * HALF + pairs
    c = tl.load(cos + angle, mask=pairs < HALF, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=pairs < HALF, other=0.0)[None, :]
    turned_low = tl.where(is_v, low, low * c - high * s).to(qkv.dtype.element_ty)
    turned_high = tl.where(is_v, high, high * c + low * s).to(qkv.dtype.element_ty)
    is_turned = is_inside & (is_v == 0)
    tl.store(qkv + at, turned_low, mask=is_turned)
    tl.store(qkv + at + HALF, turned_high, mask=is_turned)

    slot = tl.load(slots + tl.load(token_sequence + token)).to(tl.int64)
    kv_head = tl.where(heads < Q_HEADS + KV_HEADS, heads - Q_HEADS, heads - Q_HEADS - KV_HEADS)
    is_stored = (heads >= Q_HEADS) & (heads < ALL_HEADS)
    plane = tl.where(is_stored, layer * KV_HEADS + kv_head, 0)
    column = (position // BLOCK_TOKENS) * blocks_per_group + plane // PLANES
    ids = tl.load(table + slot * columns + column, mask=is_stored, other=0).to(tl.int64)
    start = (ids * PLANES + plane % PLANES) * PLANE_ELEMS + (position % BLOCK_TOKENS) * HEAD_DIM
    start += tl.where(heads >= Q_HEADS + KV_HEADS, PLANE_ELEMS // 2, 0)
    into = arena + start[:, None] + pairs[None, :]
    is_stored_pair = is_inside & is_stored[:, None]
    tl.store(into, _narrow(turned_low, arena.dtype.element_ty), mask=is_stored_pair)
    tl.store(into + HALF, _narrow(turned_high, arena.dtype.element_ty), mask=is_stored_pair)


@triton.jit
def _narrow(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """In the arena's dtype; numbers too large for float8 become its largest."""
    if tl.float8e4nv == DTYPE:
        return tl.clamp(x.to(tl.float32), -448.0, 448.0).to(DTYPE)
    return x.to(DTYPE)
