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
from muxrt.kernels.panel import ROWS, WIDE
from muxrt.kernels.team import Team
from muxrt.kernels.types import AttentionMeta, KvCache

Array = npt.NDArray[Any]

# Below this a second thread costs more than it saves: a hand-off takes 15 to 25 us, as long as
# these many floats take to read (scripts/bench_kernels.py).
SHARED_FLOATS = 64 * 1024

_INT, _FLOATS, _TABLE = "int64", "float32[::1]", "int32[:, ::1]"
_IDS, _POSITIONS, _ROWS = "int32[::1]", "int64[::1]", "float32[:, ::1]"
_BYTES = "uint8[::1]"
_GEOMETRY = "UniTuple(int64, 6)"
_ARENAS = (_FLOATS, "uint16[::1]")


def _signature(*arguments: str) -> str:
    return f"({', '.join((_INT, _INT, *arguments))})"


@cache
def warm_up() -> None:
    """Compile every kernel for every type it is called with, or read it from disk.

    Takes half a minute once per machine and version, then about half a second per process.
    Afterwards no call compiles anything.
    """
    for function, signatures in _signatures().items():
        compile_for(function, signatures)


def _signatures() -> dict[Callable[..., Any], list[str]]:
    kv = (_FLOATS, _FLOATS, _INT, _INT)
    heads = (_FLOATS, _INT, _INT)
    tiles = (_GEOMETRY, _INT, "float32", _INT, _INT, _FLOATS)
    return {
        cpu_attention.survey: [f"({_IDS}, {_IDS}, {_INT})"],
        cpu_attention.store_kv: [
            _signature(*kv, arena, _TABLE, _IDS, _POSITIONS, _IDS, _GEOMETRY, _INT)
            for arena in _ARENAS
        ],
        cpu_attention.attend: [
            _signature(_FLOATS, _INT, arena, _TABLE, _IDS, _IDS, _IDS, *tiles) for arena in _ARENAS
        ],
        cpu_rows.rope: [_signature(*heads, *heads, _ROWS, _ROWS)],
        cpu_rows.rms_norm: [_signature(_ROWS, _FLOATS, "float32", _ROWS)],
        cpu_rows.add_rms_norm: [_signature(_ROWS, _ROWS, _FLOATS, "float32", _ROWS)],
        cpu_rows.rms_norm_heads: [_signature(*heads, _FLOATS, "float32")],
        cpu_rows.silu_mul: [_signature(_ROWS, _ROWS)],
        cpu_rows.copy_blocks: [
            _signature(_BYTES, _BYTES, _IDS, _IDS, _INT),
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
    kv_heads = kv.num_kv_heads
    if heads > WIDE * kv_heads or head_dim % ROWS:
        raise ValueError(f"no kernel for {heads}/{kv_heads} heads of {head_dim}")
    q, k, v = _rowwise(q), _rowwise(k), _rowwise(v)
    arena, table, *blocks = kv.arrays
    slots, starts, query_starts, positions, owners = meta.arrays
    geometry = (heads, kv_heads, head_dim, *blocks)
    store = (_flat(k), _flat(v), k.stride(0), v.stride(0), arena, table, slots, positions, owners)
    num_floats = 2 * num_tokens * kv_heads * head_dim
    _split(team, cpu_attention.store_kv, num_tokens, num_floats, *store, geometry, layer)
    out = torch.empty((num_tokens, heads, head_dim), dtype=torch.float32)
    tile = max(1, WIDE * kv_heads // heads)  # queries
    tiles, keys = cpu_attention.survey(starts, query_starts, tile)
    batch = (_flat(q), q.stride(0), arena, table, slots, starts, query_starts)
    work = (geometry, layer, np.float32(scale), tile, tiles, out.view(-1).numpy())
    num_floats = 2 * keys * kv_heads * head_dim
    _split(team, cpu_attention.attend, kv_heads * tiles, num_floats, *batch, *work)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, team: Team) -> None:
    """See `muxrt.kernels.rope`."""
    queries = (_flat(q), q.stride(0), q.shape[1])
    keys = (_flat(k), k.stride(0), k.shape[1])
    num_floats = q.numel() + k.numel()
    _split(team, cpu_rows.rope, q.shape[0], num_floats, *queries, *keys, cos.numpy(), sin.numpy())


def rms_norm(x: Tensor, weight: Tensor, eps: float, team: Team, add: Tensor | None) -> Tensor:
    """See `muxrt.kernels.rms_norm`."""
    out = torch.empty_like(x)
    rest = (weight.numpy(), np.float32(eps), out.numpy())
    if add is None:
        _split(team, cpu_rows.rms_norm, len(x), 2 * x.numel(), x.numpy(), *rest)
    else:
        sums = (x.numpy(), add.numpy())
        _split(team, cpu_rows.add_rms_norm, len(x), 4 * x.numel(), *sums, *rest)
    return out


def rms_norm_heads(x: Tensor, weight: Tensor, eps: float, team: Team) -> None:
    """See `muxrt.kernels.rms_norm_heads`."""
    rows = (_flat(x), x.stride(0), x.shape[1])
    rest = (weight.numpy(), np.float32(eps))
    _split(team, cpu_rows.rms_norm_heads, x.shape[0], 2 * x.numel(), *rows, *rest)


def silu_mul(gate_up: Tensor, team: Team) -> Tensor:
    """See `muxrt.kernels.silu_mul`."""
    num_tokens, width = gate_up.shape
    out = torch.empty((num_tokens, width // 2), dtype=torch.float32)
    _split(
        team, cpu_rows.silu_mul, num_tokens, 2 * num_tokens * width, gate_up.numpy(), out.numpy()
    )
    return out


def copy_blocks(
    src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor, block_bytes: int
) -> None:
    """See `muxrt.kernels.copy_blocks`."""
    arenas = (src.view(torch.uint8).numpy(), dst.view(torch.uint8).numpy())
    ids = (src_ids.numpy(), dst_ids.numpy())
    cpu_rows.copy_blocks(0, len(src_ids), *arenas, *ids, block_bytes)


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
    """The memory of x [T, heads, head_dim] from its first to its last element.

    Raises ValueError unless each token's heads lie in one piece.
    """
    stride, *inner = x.stride()
    num_tokens, heads, head_dim = x.shape
    if inner != [head_dim, 1]:
        raise ValueError(f"heads are scattered: shape {list(x.shape)}, strides {x.stride()}")
    span = (num_tokens - 1) * stride + heads * head_dim
    return x.as_strided((span,), (1,)).numpy()
