"""The device kernels in plain torch, where Triton cannot run: what muxrt.kernels.gpu describes."""

import torch
from torch import Tensor

from muxrt.kernels import reference, reference_sampling
from muxrt.kernels.device import DecodeWorkspace
from muxrt.kernels.types import DeviceMeta, KvCache


def embed(ids: Tensor, table: Tensor, out: Tensor) -> None:
    is_token = (ids >= 0) & (ids < len(table))
    rows = table[torch.where(is_token, ids, 0).long()]
    out.copy_(torch.where(is_token[:, None], rows, 0))


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None) -> None:
    out.copy_(reference.rms_norm(x, weight, eps, add))


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    out.copy_(reference.silu_mul(gate_up))


def rope_and_store(
    qkv: Tensor,
    kv: KvCache,
    meta: DeviceMeta,
    layer: int,
    rope: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> None:
    num_tokens = int(meta.query_starts[-1])
    q, k, v = split(qkv[:num_tokens], kv)
    positions = meta.positions[:num_tokens].long()
    turned = []
    for x, norm in zip((q, k), norms, strict=True):
        rows = x.float()  # rounded once, after the rotation
        if norm is not None:
            reference.rms_norm_heads(rows, norm, eps)
        turned.append(rows)
    reference.rope(turned[0], turned[1], rope[0][positions], rope[1][positions])
    q.copy_(turned[0])
    k.copy_(turned[1])
    reference.write_kv(k, v, meta, kv, layer)


def decode_attention(
    qkv: Tensor,
    kv: KvCache,
    meta: DeviceMeta,
    layer: int,
    out: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
) -> None:
    prefill_attention(qkv, kv, meta, layer, out, scale)


def prefill_attention(
    qkv: Tensor, kv: KvCache, meta: DeviceMeta, layer: int, out: Tensor, scale: float
) -> None:
    q, _, _ = split(qkv, kv)
    reference.attend(q, meta, kv, layer, scale, out.view(q.shape))


def copy_blocks(
    src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor, block_bytes: int
) -> None:
    reference.copy_blocks(src, dst, src_ids, dst_ids, block_bytes)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    numbers = reference_sampling.uniforms(seeds, positions)
    out.copy_(reference_sampling.sample(logits, temperatures, top_k, top_p, min_p, numbers))


def split(qkv: Tensor, kv: KvCache) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q [T, heads, head_dim], k and v [T, kv_heads, head_dim]."""
    rows = qkv.view(len(qkv), -1, kv.head_dim)
    q, k, v = rows.split((rows.shape[1] - 2 * kv.num_kv_heads, *2 * (kv.num_kv_heads,)), dim=1)
    return q, k, v
