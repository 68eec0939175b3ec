"""Kernels that work on each token's row by itself: embeddings, norms, rotary embeddings; copies."""

from typing import Any

import numpy as np
from numba import carray
from numba.core import types

from muxrt.kernels.atomics import floats_at, int64_at
from muxrt.kernels.jit import EVERYWHERE, as_float, inlined, kernel, stage
from muxrt.kernels.packing import PANEL

Array = Any  # numba's view: a numpy array
Pointer = Any

EMBED = np.dtype(
    [
        ("ids", np.int64),  # address of [tokens] int64
        ("width", np.int64),
        ("in_panels", np.int64),  # 1 = the data is packed as a linear layer's
        ("out", np.int64),  # address of [tokens, width] floats
    ]
)

NORM = np.dtype(
    [
        ("x", np.int64),  # address of [tokens, width] floats
        ("weight", np.int64),  # address of [width] floats
        ("width", np.int64),
        ("eps", np.float64),
        ("out", np.int64),  # address of [tokens, width] floats, may be x
    ]
)


@stage(EMBED, (types.float32, types.uint16))
def embed(begin: int, end: int, args: Pointer, table: Pointer) -> None:
    """Rows [begin, end) of out are the table's rows of their ids."""
    a = carray(args, 1)[0]
    ids, data = carray(int64_at(a.ids), EVERYWHERE), carray(table, EVERYWHERE)
    out = carray(floats_at(a.out), EVERYWHERE)
    for token in range(begin, end):
        row = out[token * a.width : (token + 1) * a.width]
        at, step = ids[token] * a.width, 1
        if a.in_panels:
            panel = ids[token] // PANEL
            at, step = panel * a.width * PANEL + ids[token] - panel * PANEL, PANEL
        for i in range(a.width):
            row[i] = as_float(data[at + i * step])


@inlined
def norm(x: Array, weight: Array, eps: Any, out: Array) -> None:
    """out = x / rms(x) * weight; `out` may be `x`."""
    width = len(weight)
    total = np.float32(0)
    for i in range(width):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
    for i in range(width):
        out[i] = x[i] * factor * weight[i]


@stage(NORM, (types.uint8,))
def rms_norm(begin: int, end: int, args: Pointer, _: Pointer) -> None:
    """Rows [begin, end) of out = norm(x)."""
    a = carray(args, 1)[0]
    x, out = carray(floats_at(a.x), EVERYWHERE), carray(floats_at(a.out), EVERYWHERE)
    weight = carray(floats_at(a.weight), EVERYWHERE)[: a.width]
    eps = np.float32(a.eps)
    for token in range(begin, end):
        at = token * a.width
        norm(x[at : at + a.width], weight, eps, out[at : at + a.width])


@kernel()
def copy_blocks(
    begin: int, end: int, src: Array, dst: Array, src_ids: Array, dst_ids: Array, size: int
) -> None:
    """Blocks [begin, end) of the lists of ids; src and dst in bytes, `size` of a block."""
    for i in range(begin, end):
        source, target = np.int64(src_ids[i]) * size, np.int64(dst_ids[i]) * size
        dst[target : target + size] = src[source : source + size]
