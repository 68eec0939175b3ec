"""Kernels that work on each token's row by itself: rotary embeddings, norms, activations, copies.

Where an array is flat, `stride` is the distance from one token's row to the next, in floats.
"""

from typing import Any

import numpy as np

from muxrt.kernels.cpu_attention import exp
from muxrt.kernels.jit import inlined, kernel

Array = Any  # numba's view: a numpy array


@inlined
def _rotate(x: Array, at: int, heads: int, half: int, cos: Array, sin: Array) -> None:
    for head in range(heads):
        low = x[at + head * 2 * half : at + (head * 2 + 1) * half]
        high = x[at + (head * 2 + 1) * half : at + (head + 1) * 2 * half]
        for i in range(half):
            a, b = low[i], high[i]
            low[i] = a * cos[i] - b * sin[i]
            high[i] = b * cos[i] + a * sin[i]


@kernel()
def rope(
    begin: int,
    end: int,
    q: Array,
    q_stride: int,
    heads: int,
    k: Array,
    k_stride: int,
    kv_heads: int,
    cos: Array,
    sin: Array,
) -> None:
    """Rotate tokens [begin, end) of q and k in place; cos and sin [T, head_dim / 2]."""
    half = cos.shape[1]
    for token in range(begin, end):
        _rotate(q, token * q_stride, heads, half, cos[token], sin[token])
        _rotate(k, token * k_stride, kv_heads, half, cos[token], sin[token])


@inlined
def _norm(x: Array, weight: Array, eps: Any, out: Array) -> None:
    """out = x / rms(x) * weight; `out` may be `x`."""
    width = len(weight)
    total = np.float32(0)
    for i in range(width):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
    for i in range(width):
        out[i] = x[i] * factor * weight[i]


@kernel()
def rms_norm(begin: int, end: int, x: Array, weight: Array, eps: Any, out: Array) -> None:
    """Rows [begin, end) of x and out, both [T, width]."""
    for token in range(begin, end):
        _norm(x[token], weight, eps, out[token])


@kernel()
def add_rms_norm(
    begin: int, end: int, x: Array, add: Array, weight: Array, eps: Any, out: Array
) -> None:
    """The same after `x += add`, which stays in x."""
    for token in range(begin, end):
        old, new = x[token], add[token]
        for i in range(len(weight)):
            old[i] += new[i]
        _norm(old, weight, eps, out[token])


@kernel()
def rms_norm_heads(
    begin: int, end: int, x: Array, stride: int, heads: int, weight: Array, eps: Any
) -> None:
    """Norm every head of tokens [begin, end) in place."""
    head_dim = len(weight)
    for token in range(begin, end):
        for head in range(heads):
            at = token * stride + head * head_dim
            row = x[at : at + head_dim]
            _norm(row, weight, eps, row)


@kernel()
def silu_mul(begin: int, end: int, gate_up: Array, out: Array) -> None:
    """out = gate / (1 + e**-gate) * up; gate_up [T, 2 * width], out [T, width]."""
    width = out.shape[1]
    for token in range(begin, end):
        gate, up = gate_up[token, :width], gate_up[token, width:]
        result = out[token]
        for i in range(width):
            # Through e**-|gate|, which cannot overflow.
            small = exp(-abs(gate[i]))
            share = (np.float32(1) if gate[i] >= 0 else small) / (np.float32(1) + small)
            result[i] = gate[i] * share * up[i]


@kernel()
def copy_blocks(
    begin: int, end: int, src: Array, dst: Array, src_ids: Array, dst_ids: Array, size: int
) -> None:
    """Blocks [begin, end) of the lists of ids; src and dst in bytes, `size` of a block."""
    for i in range(begin, end):
        source, target = np.int64(src_ids[i]) * size, np.int64(dst_ids[i]) * size
        dst[target : target + size] = src[source : source + size]
