"""Linear layers for numba: weights packed in panels, multiplied by rows of activations.

A panel is 64 output features, stored depth first ([depth, 64]): one read from front to back,
whatever the batch. Few rows stream the panel through registers. More rows go over it block by
block: a block of 128 x 64 stays in the first cache while all rows use it, and the next one is
asked for meanwhile. Narrow weights are widened on the way into registers, or once per block.

Every sum runs over the depth in order, so a row of the result depends neither on the batch nor on
the number of threads.
"""

from typing import Any

import numpy as np
from numba import carray
from numba.core import types
from numba.extending import overload

from muxrt.kernels.atomics import floats_at, int64_at
from muxrt.kernels.cpu_math import exp
from muxrt.kernels.jit import EVERYWHERE, as_float, inlined, stage
from muxrt.kernels.packing import PANEL
from muxrt.kernels.panel import LINE_BYTES, make_product, prefetch

Array = Any  # numba's view: a numpy array
Record = Any  # numba's view: a record of LINEAR
Pointer = Any


BLOCK = 128  # depth of a block: 32 KiB of floats
FEW = 6  # rows whose sums fit into registers
ROWS = 96  # of activations per item: they and their sums stay in a thread's second cache
AHEAD = 1024  # weights between what is used and what is asked for, where panels are streamed

STORE, ADD, SILU_MUL = 0, 1, 2  # what happens to the sums

LINEAR = np.dtype(
    [
        ("rows", np.int64),  # address of the number of rows
        ("block_rows", np.int64),  # of an item
        ("x", np.int64),  # address of [rows, depth] floats
        ("depth", np.int64),
        ("out", np.int64),  # address of [rows, width] floats
        ("width", np.int64),
        ("scales", np.int64),  # address of a factor per output feature, or 0
        ("bias", np.int64),  # address of a summand per output feature, or 0
        ("mode", np.int64),
        ("panels", np.int64),  # SILU_MUL has as many again for `up`
    ],
    align=True,
)

_s1, _s2, _s3, _s4, _s5, _s6 = (make_product(rows) for rows in range(1, FEW + 1))
_d3, _d4, _d5, _d6 = (make_product(rows, lines=2) for rows in range(3, FEW + 1))
_t4, _t5, _t6 = (make_product(rows, lines=1) for rows in range(4, FEW + 1))


@inlined
def _stream(
    sums: Array, rows: int, x: Array, at: int, depth: int, weights: Array, panel: int
) -> None:
    """All of a panel for at most FEW rows."""
    ahead = panel + AHEAD
    if rows == 1:
        _s1(sums, 0, PANEL, x, at, depth, weights, panel, PANEL, depth, weights, ahead)
    elif rows == 2:
        _s2(sums, 0, PANEL, x, at, depth, weights, panel, PANEL, depth, weights, ahead)
    elif rows == 3:
        _s3(sums, 0, PANEL, x, at, depth, weights, panel, PANEL, depth, weights, ahead)
    elif rows == 4:
        _s4(sums, 0, PANEL, x, at, depth, weights, panel, PANEL, depth, weights, ahead)
    elif rows == 5:
        _s5(sums, 0, PANEL, x, at, depth, weights, panel, PANEL, depth, weights, ahead)
    else:
        _s6(sums, 0, PANEL, x, at, depth, weights, panel, PANEL, depth, weights, ahead)


@inlined
def _pass(
    sums: Array, first: int, rows: int, x: Array, at: int, depth: int, block: Array, begin: int,
    num: int, weights: Array, following: int, hurry: bool,
) -> None:  # fmt: skip
    """3 to FEW rows over one block; `hurry` asks for twice as much of the following one."""
    at += first * depth
    first *= PANEL
    if hurry:
        if rows == 3:
            _d3(sums, first, PANEL, x, at, depth, block, begin, PANEL, num, weights, following)
        elif rows == 4:
            _d4(sums, first, PANEL, x, at, depth, block, begin, PANEL, num, weights, following)
        elif rows == 5:
            _d5(sums, first, PANEL, x, at, depth, block, begin, PANEL, num, weights, following)
        else:
            _d6(sums, first, PANEL, x, at, depth, block, begin, PANEL, num, weights, following)
    elif rows == 4:
        _t4(sums, first, PANEL, x, at, depth, block, begin, PANEL, num, weights, following)
    elif rows == 5:
        _t5(sums, first, PANEL, x, at, depth, block, begin, PANEL, num, weights, following)
    else:
        _t6(sums, first, PANEL, x, at, depth, block, begin, PANEL, num, weights, following)


@inlined
def _go_over(
    sums: Array, rows: int, x: Array, at: int, depth: int, block: Array, begin: int, num: int,
    weights: Array, following: int,
) -> None:  # fmt: skip
    """All rows over one block, a few at a time; the passes share the asking for the next one."""
    passes = (rows + FEW - 1) // FEW
    hurry = passes < 4
    step = (2 if hurry else 1) * num * (LINE_BYTES // weights.itemsize)
    last = max(0, num * PANEL - step)
    first = 0
    for i in range(passes):
        end = rows * (i + 1) // passes
        ask = following + min(i * step, last)
        _pass(sums, first, end - first, x, at, depth, block, begin, num, weights, ask, hurry)
        first = end


def widen(weights: Array, begin: int, num: int, scratch: Array) -> tuple[Array, int]:
    """In kernels: an array of floats in which `num` weights lie, and where."""
    raise NotImplementedError


@overload(widen, strict=False)  # type: ignore[untyped-decorator]
def _widen(weights: Any, begin: Any, num: Any, scratch: Any) -> Any:
    if isinstance(weights.dtype, types.Float):
        return lambda weights, begin, num, scratch: (weights, begin)

    def convert(weights: Array, begin: int, num: int, scratch: Array) -> tuple[Array, int]:
        source, target = weights[begin : begin + num], scratch[:num]
        for i in range(num):
            target[i] = as_float(source[i])
        return scratch, 0

    return convert


@inlined
def _multiply(
    sums: Array, rows: int, x: Array, at: int, depth: int, weights: Array, panel: int,
    scratch: Array,
) -> None:  # fmt: skip
    """sums [rows, PANEL] = rows of x, from element `at` on, times the panel at `panel`."""
    sums[: rows * PANEL] = np.float32(0)
    if rows <= FEW:
        _stream(sums, rows, x, at, depth, weights, panel)
        return
    for start in range(0, depth, BLOCK):
        num = min(BLOCK, depth - start)
        place = panel + start * PANEL
        following = place + num * PANEL
        block, begin = widen(weights, place, num * PANEL, scratch)
        _go_over(sums, rows, x, at + start, depth, block, begin, num, weights, following)


@inlined
def _finish(sums: Array, rows: int, first: int, num: int, a: Record) -> None:
    """Scale the sums of features [first, first + num), and add their bias."""
    if a.scales != 0:
        scales = carray(floats_at(a.scales), EVERYWHERE)[first : first + num]
        for row in range(rows):
            line = sums[row * PANEL : row * PANEL + num]
            for i in range(num):
                line[i] *= scales[i]
    if a.bias != 0:
        bias = carray(floats_at(a.bias), EVERYWHERE)[first : first + num]
        for row in range(rows):
            line = sums[row * PANEL : row * PANEL + num]
            for i in range(num):
                line[i] += bias[i]


@inlined
def _put(sums: Array, rows: int, at: int, num: int, width: int, out: Array, mode: int) -> None:
    for row in range(rows):
        line = sums[row * PANEL : row * PANEL + num]
        target = out[at + row * width : at + row * width + num]
        for i in range(0, num, 16):
            prefetch(out, at + (row + 8) * width + i)
        if mode == ADD:
            for i in range(num):
                target[i] += line[i]
        else:
            for i in range(num):
                target[i] = line[i]


@inlined
def _silu_mul(gate: Array, up: Array, num: int) -> None:
    """gate = silu(gate) * up."""
    for i in range(num):
        # Through e**-|gate|, which cannot overflow.
        small = exp(-abs(gate[i]))
        share = (np.float32(1) if gate[i] >= 0 else small) / (np.float32(1) + small)
        gate[i] = gate[i] * share * up[i]


@inlined
def finish_item(
    sums: Array, up: Array, rows: int, first: int, column: int, out: Array, a: Record
) -> None:
    """What `mode` says with the sums [rows, PANEL] of rows from `first`, features from `column`."""
    num = min(PANEL, a.width - column)
    _finish(sums, rows, column, num, a)
    if a.mode == SILU_MUL:
        _finish(up, rows, a.width + column, num, a)
        _silu_mul(sums, up, rows * PANEL)
    _put(sums, rows, first * a.width + column, num, a.width, out, a.mode)


@stage(LINEAR, (types.float32, types.uint16, types.int8))
def linear(begin: int, end: int, args: Pointer, weights: Pointer) -> None:
    """Items [begin, end) of out = x W + bias; `mode` says what becomes of them.

    An item is a panel for a block of rows; all panels of a block follow each other, so that its
    rows are read from a near cache.
    STORE overwrites out, ADD adds to it; SILU_MUL takes the panels of `gate` and `up` together and
    stores silu(gate) * up.
    """
    a = carray(args, 1)[0]
    num_rows = carray(int64_at(a.rows), 1)[0]
    x, out = carray(floats_at(a.x), EVERYWHERE), carray(floats_at(a.out), EVERYWHERE)
    data = carray(weights, EVERYWHERE)
    tile = min(a.block_rows, num_rows)
    sums, up = np.empty(tile * PANEL, np.float32), np.empty(tile * PANEL, np.float32)
    scratch = np.empty(BLOCK * PANEL, np.float32)
    panel_size = a.depth * PANEL
    for item in range(begin, end):
        block, panel = item // a.panels, item % a.panels
        column, first = panel * PANEL, block * a.block_rows
        rows = min(a.block_rows, num_rows - first)
        at = first * a.depth
        _multiply(sums, rows, x, at, a.depth, data, panel * panel_size, scratch)
        if a.mode == SILU_MUL:
            other = (panel + a.panels) * panel_size
            _multiply(up, rows, x, at, a.depth, data, other, scratch)
        finish_item(sums, up, rows, first, column, out, a)
