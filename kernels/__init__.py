"""The kernels behind one dispatch point: callers name what they want, the device says which.

Activations are float32; the arena is float32 or bfloat16.
"""

from torch import Tensor

from muxrt.kernels import cpu
from muxrt.kernels.team import Team
from muxrt.kernels.types import AttentionMeta, KvCache

__all__ = [
    "AttentionMeta",
    "KvCache",
    "Team",
    "attention",
    "copy_blocks",
    "rms_norm",
    "rms_norm_heads",
    "rope",
    "silu_mul",
    "warm_up",
]


def warm_up() -> None:
    """Make every kernel ready, so that no request waits for a compiler.

    The first call on a machine takes half a minute and leaves the result on disk; set-up makes it.
    A process later takes about half a second.
    """
    cpu.warm_up()


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
    """Write K and V of the new tokens into the arena, then attend causally to all tokens so far.

    q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim].
    """
    return cpu.attention(q, k, v, meta, kv, layer, scale, team)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, team: Team) -> None:
    """Rotate q [T, heads, head_dim] and k in place; cos, sin [T, head_dim / 2]."""
    cpu.rope(q, k, cos, sin, team)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, team: Team, add: Tensor | None = None
) -> Tensor:
    """`x += add` in place (the residual stream), then its norm. x, add [T, width] -> [T, width]."""
    return cpu.rms_norm(x, weight, eps, team, add)


def rms_norm_heads(x: Tensor, weight: Tensor, eps: float, team: Team) -> None:
    """Norm every head of every token in place. x [T, heads, head_dim], weight [head_dim]."""
    cpu.rms_norm_heads(x, weight, eps, team)


def silu_mul(gate_up: Tensor, team: Team) -> Tensor:
    """silu(gate) * up. gate_up [T, 2 * width], gate first -> [T, width]."""
    return cpu.silu_mul(gate_up, team)


def copy_blocks(
    src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor, block_bytes: int
) -> None:
    """Block `src_ids[i]` of one arena becomes block `dst_ids[i]` of another, byte by byte.

    src, dst 1-D of any dtype; ids [N] int32, each dst id at most once.
    """
    cpu.copy_blocks(src, dst, src_ids, dst_ids, block_bytes)
