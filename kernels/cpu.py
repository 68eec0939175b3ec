"""The kernels on CPU cores: torch tensors in, numba kernels split over the lane's team.

Every array a kernel gets is a flat view of its tensor: nothing is copied on the way.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt.kernels import cpu_attention, cpu_rows
from muxrt.kernels.jit import compile_for
from muxrt.kernels.panel import WIDE
from muxrt.kernels.team import Team
from muxrt.kernels.types import AttentionMeta, KvCache

Array = npt.NDArray[Any]

# Below this a second thread costs more than it saves: a hand-off takes 15 to 25 us, as long as
# these many floats take to read (scripts/bench_kernels.py).
SHARED_FLOATS = 64 * 1024

_INT, _FLOATS, _TABLE = "int64", "float32[::1]", "int32[:, ::1]"
_IDS, _POSITIONS, _ROWS = "int32[::1]", "int64[::1]", "float32[:, ::1]"
_GEOMETRY = "UniTuple(int64, 6)"
_ARENAS = (_FLOATS, "uint16[::1]")


def _signature(*arguments: str) -> str:
    return f"({', '.join((_INT, _INT, *arguments))})"


@cache
def warm_up() -> None:
    """Compile every kernel for every type it is called with, or read it from disk.

    Takes half a minute once per machine and version, then about a tenth of a second per process.
    Afterwards no call compiles anything.
    """
    for function, signatures in _signatures().items():
        compile_for(function, signatures)


def _signatures() -> dict[Callable[..., Any], list[str]]:
    store = (_FLOATS, _FLOATS, _INT, _INT)
    table = (_TABLE, _IDS)
    return {
        cpu_attention.survey: [f"({_IDS}, {_IDS}, {_INT})"],
        cpu_attention.store_kv: [
            _signature(*store, arena, *table, _POSITIONS, _IDS, _GEOMETRY, _INT)
            for arena in _ARENAS
        ],
        cpu_attention.attend: [
            _signature(
                _FLOATS,
                _INT,
                arena,
                *table,
                _IDS,
                _IDS,
                _GEOMETRY,
                _INT,
                "float32",
                _INT,
                _INT,
                _FLOATS,
            )
            for arena in _ARENAS
        ],  # fmt: skip
        cpu_rows.rope: [
            _signature(_FLOATS, _INT, _INT, _FLOATS, _INT, _INT, _ROWS, _ROWS),
        ],
        cpu_rows.rms_norm: [_signature(_FLOATS, _FLOATS, "float32", _FLOATS)],
        cpu_rows.add_rms_norm: [_signature(_FLOATS, _FLOATS, _FLOATS, "float32", _FLOATS)],
        cpu_rows.rms_norm_heads: [_signature(_FLOATS, _INT, _INT, _FLOATS, "float32")],
        cpu_rows.silu_mul: [_signature(_FLOATS, _INT, _FLOATS)],
        cpu_rows.copy_blocks: [
            _signature("uint8[::1]", "uint8[::1]", _IDS, _IDS, _INT),
        ],
    }


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: AttentionMeta,
    kv: KvCache,
    layer: int,
    scale: float,
    team: Team,
) -> Tensor:
    """See `muxrt.kernels.attention`."""
    num_tokens, heads, head_dim = q.shape
    q, k, v = _rowwise(q), _rowwise(k), _rowwise(v)
    arena, table = _arena(kv.arena), _array(kv.block_table)
    slots, starts, query_starts = _array(meta.slots), _array(meta.starts), _array(meta.query_starts)
    geometry = (
        heads, kv.num_kv_heads, head_dim, kv.block_tokens, kv.blocks_per_group, kv.planes_per_block
    )  # fmt: skip
    _split(
        team, cpu_attention.store_kv, num_tokens, 2 * num_tokens * k.shape[1] * head_dim,
        _flat(k), _flat(v), k.stride(0), v.stride(0), arena, table, slots,
        _array(meta.positions), _array(meta.token_sequence), geometry, layer,
    )  # fmt: skip
    tile_queries = max(1, WIDE * kv.num_kv_heads // heads)
    tiles, keys = cpu_attention.survey(starts, query_starts, tile_queries)
    out = torch.empty((num_tokens, heads, head_dim), dtype=torch.float32)
    _split(
        team, cpu_attention.attend, kv.num_kv_heads * tiles,
        2 * keys * kv.num_kv_heads * head_dim,
        _flat(q), q.stride(0), arena, table, slots, starts, query_starts, geometry, layer,
        np.float32(scale), tile_queries, tiles, out.view(-1).numpy(),
    )  # fmt: skip
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, team: Team) -> None:
    """See `muxrt.kernels.rope`."""
    assert q.stride()[1:] == (q.shape[2], 1) and k.stride()[1:] == (k.shape[2], 1)
    _split(
        team, cpu_rows.rope, q.shape[0], q.numel() + k.numel(),
        _flat(q), q.stride(0), q.shape[1], _flat(k), k.stride(0), k.shape[1],
        _array(cos), _array(sin),
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, team: Team, add: Tensor | None) -> Tensor:
    """See `muxrt.kernels.rms_norm`."""
    out = torch.empty_like(x)
    kernel, inputs = cpu_rows.rms_norm, [_flat(x)]
    if add is not None:
        kernel, inputs = cpu_rows.add_rms_norm, [_flat(x), _flat(add.contiguous())]
    _split(
        team, kernel, x.shape[0], 2 * x.numel(),
        *inputs, weight.numpy(), np.float32(eps), _flat(out),
    )  # fmt: skip
    return out


def rms_norm_heads(x: Tensor, weight: Tensor, eps: float, team: Team) -> None:
    """See `muxrt.kernels.rms_norm_heads`."""
    assert x.stride()[1:] == (x.shape[2], 1)
    _split(
        team, cpu_rows.rms_norm_heads, x.shape[0], 2 * x.numel(),
        _flat(x), x.stride(0), x.shape[1], weight.numpy(), np.float32(eps),
    )  # fmt: skip


def silu_mul(gate_up: Tensor, team: Team) -> Tensor:
    """See `muxrt.kernels.silu_mul`."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, width), dtype=torch.float32)
    _split(
        team, cpu_rows.silu_mul, num_tokens, 2 * gate_up.numel(),
        _flat(gate_up.contiguous()), width, _flat(out),
    )  # fmt: skip
    return out


def copy_blocks(
    src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor, block_bytes: int
) -> None:
    """See `muxrt.kernels.copy_blocks`."""
    cpu_rows.copy_blocks(
        0, len(src_ids), _bytes(src), _bytes(dst), _array(src_ids), _array(dst_ids), block_bytes
    )


def _split(
    team: Team, kernel: Callable[..., Any], work_items: int, num_floats: int, *args: Any
) -> None:
    """Run on the team where the work (in floats that pass through) is worth the hand-off."""
    if num_floats < SHARED_FLOATS or team.size == 1:
        kernel(0, work_items, *args)
    else:
        team.run(kernel, work_items, *args)


def _rowwise(x: Tensor) -> Tensor:
    """x [T, heads, head_dim] with each token's heads in one piece; a copy only if they are not."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _flat(x: Tensor) -> Array:
    """The memory of x from its first to its last element, strides and all."""
    if x.is_contiguous():
        return x.view(-1).numpy()
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((max(span, 0),), (1,)).numpy()


def _array(x: Tensor) -> Array:
    assert x.is_contiguous(), f"a kernel needs contiguous memory, got strides {x.stride()}"
    return x.numpy()


def _arena(arena: Tensor) -> Array:
    """numpy has no bfloat16: its bits, then."""
    return _array(arena.view(torch.uint16) if arena.dtype == torch.bfloat16 else arena)


def _bytes(arena: Tensor) -> Array:
    return _array(arena.view(torch.uint8))
