"""The operations of a program one at a time, tensors in and tensors out, for comparisons."""

import mmap
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from muxrt.kernels import AttentionMeta, KvCache, Packed, Program, Team, pack_into, packed_elems


def rows(
    team: Team,
    x: Tensor,
    width: int,
    record: Callable[[Program, Any, Any], None],
    is_prefill: bool = False,
) -> Tensor:
    """What `record(program, x, out)` leaves in out [T, width]."""
    program = Program(team, len(x), is_prefill)
    source, out = program.floats(x.shape[1]), program.floats(width)
    record(program, source, out)
    source[:], out[:] = x.numpy(), 0
    program.run_rows(len(x))
    return torch.from_numpy(out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, team: Team) -> Tensor:
    return rows(team, x, x.shape[1], lambda p, a, out: p.rms_norm(a, weight, eps, out))


def linear(x: Tensor, packed: Packed, team: Team, is_prefill: bool = False) -> Tensor:
    return rows(team, x, packed.features, lambda p, a, out: p.linear(a, packed, out), is_prefill)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: AttentionMeta,
    kv: KvCache,
    layer: int,
    scale: float,
    team: Team,
    rope: tuple[Tensor, Tensor] | None = None,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim]."""
    num_tokens, heads, head_dim = q.shape
    positions = int(meta.positions.max()) + 1
    rope = rope or (torch.ones(positions, head_dim // 2), torch.zeros(positions, head_dim // 2))
    program = Program(team, num_tokens)
    qkv = program.floats((heads + 2 * k.shape[1]) * head_dim)
    out = program.floats(heads * head_dim)
    program.attention(qkv, kv, layer, out, rope=rope, norms=norms, eps=1e-6, scale=scale)
    qkv[:] = torch.cat((q, k, v), dim=1).flatten(1).numpy()
    program.run_batch(torch.zeros(num_tokens, dtype=torch.int64).numpy(), meta.arrays)
    return torch.from_numpy(out).view(q.shape)


def pack(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None, parts: int = 1) -> Packed:
    """A weight [features, depth] and its bias as the kernels take them."""
    features, depth = weight.shape
    data = torch.empty(packed_elems(features, depth, parts), dtype=dtype)
    return Packed(data, pack_into(data, weight, parts), bias, features, depth, parts)


def sparse_arena(num_elems: int, dtype: torch.dtype, count: int = -1) -> Tensor:
    """An arena of which only the pages that are touched take memory.

    With `count` the tensor is its first elements only; what lies behind them is there.
    """
    fd = os.memfd_create("arena")
    os.ftruncate(fd, num_elems * dtype.itemsize)
    memory = mmap.mmap(fd, num_elems * dtype.itemsize)
    os.close(fd)
    return torch.frombuffer(memory, dtype=dtype, count=count)
