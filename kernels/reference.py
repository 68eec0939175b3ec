"""The kernels in plain torch: slow, and the definition of what every other one computes.

Tensors are float32 unless said otherwise, on any one device; K and V are rounded to the arena's
dtype on the way in (float8_e4m3fn: the nearest number it has, so at most 448).
"""

from itertools import pairwise

import torch
from torch import Tensor

from muxrt.kernels.packing import Packed, unpack
from muxrt.kernels.types import AttentionMeta, DeviceMeta, KvCache

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0


def plane_offsets(kv: KvCache, layer: int, slots: Tensor, positions: Tensor) -> Tensor:
    """Element offset of K, int64. slots, positions [T] -> [T, kv_heads]."""
    heads = torch.arange(kv.num_kv_heads, device=slots.device)
    plane = layer * kv.num_kv_heads + heads  # [kv_heads]
    group = positions // kv.block_tokens
    column = group[:, None] * kv.blocks_per_group + (plane // kv.planes_per_block)[None, :]
    ids = kv.block_table[slots.long()[:, None], column].long()  # [T, kv_heads]
    planes = ids * kv.planes_per_block + (plane % kv.planes_per_block)[None, :]
    rows = (positions % kv.block_tokens) * kv.head_dim
    return planes * kv.plane_elems + rows[:, None]


def write_kv(
    k: Tensor, v: Tensor, meta: AttentionMeta | DeviceMeta, kv: KvCache, layer: int
) -> None:
    """Store K and V of the new tokens. k, v [T, kv_heads, head_dim]."""
    num_tokens = int(meta.query_starts[-1])
    slots = meta.slots[meta.token_sequence[:num_tokens].long()]
    start = plane_offsets(kv, layer, slots, meta.positions[:num_tokens])
    index = start[:, :, None] + torch.arange(kv.head_dim, device=start.device)
    arena = _elements(kv.arena)
    arena[index] = _elements(_rounded(k[:num_tokens], kv.arena.dtype))
    arena[index + kv.plane_elems // 2] = _elements(_rounded(v[:num_tokens], kv.arena.dtype))


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers too large for float8 become its largest: it has no infinity to say so."""
    if dtype == FLOAT8:
        x = x.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8)
    return x.to(dtype)


def _elements(x: Tensor) -> Tensor:
    """The same memory in a dtype that torch can index: it cannot index float8."""
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x


def gather_kv(kv: KvCache, layer: int, slot: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of the first `num_tokens` tokens of a slot, each [num_tokens, kv_heads, head_dim]."""
    positions = torch.arange(num_tokens, device=kv.arena.device)
    start = plane_offsets(kv, layer, torch.full_like(positions, slot), positions)
    index = start[:, :, None] + torch.arange(kv.head_dim, device=start.device)
    arena = _elements(kv.arena)
    k, v = arena[index], arena[index + kv.plane_elems // 2]
    return k.view(kv.arena.dtype), v.view(kv.arena.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta, kv: KvCache, layer: int, scale: float
) -> Tensor:
    """Write K and V, then attend causally, cached prefix included; softmax in float64.

    q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim].
    """
    write_kv(k, v, meta, kv, layer)
    out = torch.empty_like(q)
    attend(q, meta, kv, layer, scale, out)
    return out


def attend(
    q: Tensor,
    meta: AttentionMeta | DeviceMeta,
    kv: KvCache,
    layer: int,
    scale: float,
    out: Tensor,
) -> None:
    """Attention of new tokens whose K and V are stored. q, out [T, heads, head_dim]."""
    bounds = meta.query_starts.tolist()
    for sequence, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        start = int(meta.starts[sequence])
        keys, values = gather_kv(kv, layer, int(meta.slots[sequence]), start + end - begin)
        out[begin:end] = _attend(q[begin:end], keys, values, start, scale)


def _attend(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float) -> Tensor:
    """Queries at positions `start`.. against all keys up to themselves."""
    groups = q.shape[1] // keys.shape[1]
    keys = keys.double().repeat_interleave(groups, dim=1)  # [context, heads, head_dim]
    values = values.double().repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    future = _count(keys)[None, :] > start + _count(q)[:, None]
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def _count(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate q and k in place: dimension i pairs with i + head_dim / 2.

    q [T, heads, head_dim], k [T, kv_heads, head_dim], cos and sin [T, head_dim / 2].
    """
    for x in (q, k):
        low, high = x.float().chunk(2, dim=-1)
        c, s = cos[:, None, :], sin[:, None, :]
        rotated = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
        x.copy_(rotated)


def rms_norm(x: Tensor, weight: Tensor, eps: float, add: Tensor | None = None) -> Tensor:
    """`x += add` in place (the residual stream), then its norm. x, add [T, width] -> [T, width].

    What is added is rounded to the dtype of x; the norm is float32.
    """
    if add is not None:
        x += add
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()


def rms_norm_heads(x: Tensor, weight: Tensor, eps: float) -> None:
    """Norm every head of every token in place. x [T, heads, head_dim], weight [head_dim]."""
    x.copy_(rms_norm(x.clone(), weight, eps))


def linear(x: Tensor, packed: Packed) -> Tensor:
    """x @ weight.T + bias with the weights as they were packed. [T, depth] -> [T, features]."""
    out = x.double() @ unpack(packed).double().T
    return (out if packed.bias is None else out + packed.bias).float()


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up [T, 2 * width], gate first -> [T, width]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def copy_blocks(
    src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor, block_bytes: int
) -> None:
    """Block `src_ids[i]` of one arena becomes block `dst_ids[i]` of another, byte by byte.

    src, dst 1-D of any dtype; ids [N] int32, each dst id at most once.
    """
    blocks(dst, block_bytes)[dst_ids.long()] = blocks(src, block_bytes)[src_ids.long()]


def blocks(arena: Tensor, block_bytes: int) -> Tensor:
    """An arena's whole blocks as bytes. [elements] -> [blocks, block_bytes] uint8."""
    data = arena.view(torch.uint8)
    return data[: data.numel() // block_bytes * block_bytes].view(-1, block_bytes)
