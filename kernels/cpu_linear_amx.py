"""Linear layers where cores have AMX: the same panels of weights, multiplied in bfloat16 parts.

First the activations are split into parts, tile by tile, for all panels (`split_rows`). Then a
panel goes through block by block: a block of weights is split, all rows use it, and what comes next
is asked for meanwhile.

Every sum runs over the depth in the same order and the same parts, so a row of the result depends
neither on the batch nor on the number of threads.
"""

from typing import Any

import numpy as np
from numba import carray
from numba.core import types

from muxrt.kernels.amx import (
    ALIGNMENT,
    COLUMNS,
    PARTS,
    STEP,
    TILE,
    TILE_ROWS,
    TURNS,
    close_tiles,
    make_multiply,
    num_parts,
    open_tiles,
    split_row,
    split_step,
)
from muxrt.kernels.atomics import floats_at, int64_at, uint16_at
from muxrt.kernels.cpu_linear import LINEAR, SILU_MUL, finish_item
from muxrt.kernels.jit import EVERYWHERE, inlined, stage
from muxrt.kernels.packing import PANEL
from muxrt.kernels.panel import LANES

Array = Any  # numba's view: a numpy array
Pointer = Any

BLOCK = 2 * STEP  # of the depth: its parts and those of the rows fit into the first cache
AHEAD = 4 * STEP * PANEL  # weights between what is used and what is asked for
HALF = TURNS * LANES  # floats that are asked for while they are split; later come as many again
PAIR = 2 * TILE_ROWS  # rows that are multiplied at once

PLANES_BYTES = 5 * 2**18  # of the parts of an item's rows: more than half of a second cache

SPLIT = np.dtype(
    [
        ("rows", np.int64),  # address of the number of rows
        ("x", np.int64),  # address of [rows, depth] floats
        ("depth", np.int64),
        ("planes", np.int64),  # address of their parts
    ],
    align=True,
)

# 32 rows with 32 features.
multiply_corner, multiply_corner_and_ask = (make_multiply(asks) for asks in (False, True))


def rows_at_once(depth: int) -> int:
    """Rows of an item, so that their parts stay in a thread's second cache."""
    fit = PLANES_BYTES // (2 * PARTS * depth)
    return max(3 * PAIR, min(8 * PAIR, fit // PAIR * PAIR))


def plane_elems(rows: int, depth: int) -> int:
    """uint16 elements of the parts of [rows, depth], whole pairs of tiles of rows."""
    return -(-rows // PAIR) * 2 * _steps(depth) * PARTS * TILE


def _steps(depth: int) -> int:
    return (depth + STEP - 1) // STEP


steps_of = inlined(_steps)


@stage(SPLIT, (types.uint8,))
def split_rows(begin: int, end: int, args: Pointer, _: Pointer) -> None:
    """Parts of the rows [16 begin, 16 end), as tiles: [row tile, step, part, row, depth]."""
    a = carray(args, 1)[0]
    num_rows = carray(int64_at(a.rows), 1)[0]
    x, planes = carray(floats_at(a.x), EVERYWHERE), carray(uint16_at(a.planes), EVERYWHERE)
    last = np.empty(STEP, np.float32)  # what there is of the last step, and zeros
    whole = a.depth // STEP * STEP
    for row in range(begin * TILE_ROWS, min(end * TILE_ROWS, num_rows)):
        tile, inner = row // TILE_ROWS, row % TILE_ROWS
        to = tile * steps_of(a.depth) * PARTS * TILE + inner * STEP
        for start in range(0, whole, STEP):
            split_row(x, row * a.depth + start, planes, to)
            to += PARTS * TILE
        if whole < a.depth:
            last[:] = np.float32(0)
            last[: a.depth - whole] = x[row * a.depth + whole : (row + 1) * a.depth]
            split_row(last, 0, planes, to)


@inlined
def _aligned(elems: int) -> Array:
    """Memory for tiles, uint16, at a cache line."""
    memory = np.empty(elems + ALIGNMENT // 2, np.uint16)
    skipped = (-memory.ctypes.data % ALIGNMENT) // 2
    return memory[skipped : skipped + elems]


@inlined
def _split_block(
    weights: Array, panel: int, begin: int, steps: int, depth: int, last: Array, blocks: Array
) -> None:
    """`steps` steps of a panel, from depth `begin` on, as tiles: [step, column tile, part]."""
    tiles = COLUMNS * num_parts(weights) * TILE
    for i in range(steps):
        start = begin + i * STEP
        at = panel + start * PANEL
        if start + STEP <= depth:
            split_step(weights, at, blocks, i * tiles, weights, at + AHEAD)
        else:
            there = (depth - start) * PANEL
            for k in range(STEP * PANEL):
                last[k] = weights[at + k] if k < there else 0
            split_step(last, 0, blocks, i * tiles, weights, at + AHEAD)


@inlined
def _multiply(
    sums: Array, num_pairs: int, planes: Array, at: int, depth: int, weights: Array, panel: int,
    blocks: Array, last: Array,
) -> None:  # fmt: skip
    """sums [32 num_pairs, PANEL] = the rows whose parts are at `at` times the panel at `panel`."""
    to_tile = steps_of(depth) * PARTS * TILE
    half = COLUMNS // 2 * num_parts(weights) * TILE
    block = STEP if num_pairs <= 2 else BLOCK  # the fewer rows, the finer the mix
    for begin in range(0, depth, block):
        steps, fresh = min(block // STEP, steps_of(depth - begin)), begin == 0
        _split_block(weights, panel, begin, steps, depth, last, blocks)
        ahead, a = panel + begin * PANEL + AHEAD + HALF, at + begin // STEP * PARTS * TILE
        multiply_corner_and_ask(
            sums, 0, fresh, planes, a, to_tile, blocks, 0, steps, weights, ahead
        )
        corner, ahead = PANEL // 2, ahead + HALF // 2
        multiply_corner_and_ask(
            sums, corner, fresh, planes, a, to_tile, blocks, half, steps, weights, ahead
        )
        for pair in range(1, num_pairs):
            a += 2 * to_tile
            corner = pair * PAIR * PANEL
            multiply_corner(sums, corner, fresh, planes, a, to_tile, blocks, 0, steps, weights, 0)
            corner += PANEL // 2
            multiply_corner(
                sums, corner, fresh, planes, a, to_tile, blocks, half, steps, weights, 0
            )


@stage(LINEAR, (types.float32, types.uint16, types.int8))
def linear_amx(begin: int, end: int, args: Pointer, weights: Pointer) -> None:
    """As `cpu_linear.linear`, but an item is a panel for `rows_at_once` rows, and x their parts."""
    a = carray(args, 1)[0]
    num_rows = carray(int64_at(a.rows), 1)[0]
    planes, out = carray(uint16_at(a.x), EVERYWHERE), carray(floats_at(a.out), EVERYWHERE)
    data = carray(weights, EVERYWHERE)
    block_rows = min(a.block_rows, (num_rows + PAIR - 1) // PAIR * PAIR)
    sums, up = np.empty(block_rows * PANEL, np.float32), np.empty(block_rows * PANEL, np.float32)
    blocks = _aligned(BLOCK * PANEL * num_parts(data))
    last = np.empty(STEP * PANEL, data.dtype)
    panel_size = a.depth * PANEL
    open_tiles()
    for item in range(begin, end):
        block, panel = item // a.panels, item % a.panels
        column, first = panel * PANEL, block * a.block_rows
        rows = min(a.block_rows, num_rows - first)
        pairs = (rows + PAIR - 1) // PAIR
        at = first // TILE_ROWS * steps_of(a.depth) * PARTS * TILE
        _multiply(sums, pairs, planes, at, a.depth, data, panel * panel_size, blocks, last)
        if a.mode == SILU_MUL:
            other = (panel + a.panels) * panel_size
            _multiply(up, pairs, planes, at, a.depth, data, other, blocks, last)
        finish_item(sums, up, rows, first, column, out, a)
    close_tiles()


STAGES = (split_rows, linear_amx)
