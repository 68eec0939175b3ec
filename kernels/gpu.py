"""The dispatch point of device kernels: functions on torch tensors that write into given outputs.

On a CUDA device they are Triton's, on any other plain torch (muxrt.kernels.plain); with
TRITON_INTERPRET=1 Triton's interpreter runs them on CPU tensors. On CUDA no call allocates memory,
reads from the device or depends on anything but shapes and addresses: all may be captured in a CUDA
graph, once a call of the same shapes has compiled them. They run on the current stream.

Rows are tokens; T is what the batch's tensors hold, padding included (see `DeviceMeta`).
Activations are float32, bfloat16 or float16; the arena has their dtype or is float8_e4m3fn.
"""

from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from muxrt.kernels import plain
from muxrt.kernels.device import DecodeWorkspace, decode_workspace
from muxrt.kernels.types import DeviceMeta, KvCache

_triton: ModuleType | None = None
if find_spec("triton") is not None:
    from muxrt.kernels import triton_kernels

    _triton = triton_kernels

__all__ = [
    "DecodeWorkspace",
    "copy_blocks",
    "decode_attention",
    "decode_workspace",
    "embed",
    "prefill_attention",
    "rms_norm",
    "rope_and_store",
    "sample",
    "silu_mul",
]


def embed(ids: Tensor, table: Tensor, out: Tensor) -> None:
    """out[t] = table[ids[t]]; zeros for an id outside of the vocabulary, such as -1.

    ids [T] of any integer type; table [vocab, width]; out [T, width].
    """
    _kernels(out).embed(ids, table, out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None = None) -> None:
    """out = x / rms(x) * weight, row by row in float32; with `add`, x += add before, in place.

    x (the residual stream), add, out [T, width]; weight [width].
    """
    _kernels(out).rms_norm(x, weight, eps, out, add)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up. gate_up [T, 2 * width], gate first; out [T, width]."""
    _kernels(out).silu_mul(gate_up, out)


def rope_and_store(
    qkv: Tensor,
    kv: KvCache,
    meta: DeviceMeta,
    layer: int,
    rope: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
) -> None:
    """Norm q's and k's heads (if given), rotate both in place, put K and V into the arena.

    qkv [T, (heads + 2 * kv_heads) * head_dim]; rope: cos, sin [positions, head_dim / 2] float32;
    norms: weights [head_dim] of q and k. K and V are the rows that `qkv` then holds.
    """
    _kernels(qkv).rope_and_store(qkv, kv, meta, layer, rope, norms, eps)


def decode_attention(
    qkv: Tensor,
    kv: KvCache,
    meta: DeviceMeta,
    layer: int,
    out: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
) -> None:
    """Attention of sequences with one new token each, whose K and V are stored.

    qkv as `rope_and_store` leaves it; out [T, heads * head_dim], T = the batch's sequences.
    """
    _kernels(qkv).decode_attention(qkv, kv, meta, layer, out, scale, workspace)


def prefill_attention(
    qkv: Tensor, kv: KvCache, meta: DeviceMeta, layer: int, out: Tensor, scale: float
) -> None:
    """Causal attention of any number of new tokens per sequence, cached prefix included.

    qkv as `rope_and_store` leaves it; out [T, heads * head_dim].
    """
    _kernels(qkv).prefill_attention(qkv, kv, meta, layer, out, scale)


def copy_blocks(
    src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor, block_bytes: int
) -> None:
    """Block `src_ids[i]` of one arena becomes block `dst_ids[i]` of another, byte by byte.

    src, dst 1-D of any dtype, on the device or in pinned host memory; ids [N] int32 on the device,
    each dst id at most once.
    """
    _kernels(dst_ids).copy_blocks(src, dst, src_ids, dst_ids, block_bytes)


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
    """A token per row, as `muxrt.kernels.sample` draws it; -1 where logits are not finite.

    logits [N, vocab] of a float type; temperatures, top_p, min_p [N] float64; top_k (0 = off),
    seeds (the bits of uint64) [N] int64; positions [N]: of the token to draw; out [N], integers.
    The uniform number of a row is made of its seed and position (muxrt.worker.sampler.uniforms).
    """
    _kernels(out).sample(logits, temperatures, top_k, top_p, min_p, seeds, positions, out)


def _kernels(tensor: Tensor) -> ModuleType:
    """The module that has them for this tensor's device."""
    if _triton is not None and (tensor.is_cuda or _triton.IS_INTERPRETED):
        return _triton
    if tensor.is_cuda:
        raise ModuleNotFoundError(
            f"found tensors on {tensor.device} and no package triton, expected it: "
            "pip install 'muxrt[gpu]'"
        )
    return plain
