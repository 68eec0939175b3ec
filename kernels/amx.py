"""Matrix products of floats on a core's AMX unit, which multiplies bfloat16 only.

A float32 has 24 bits of mantissa, three bfloat16 have 8 each: x = x0 + x1 + x2 exactly, each part
being what truncation left of the part before. Of the nine products of the parts of two floats the
six largest are added (in float32); the other three together are below 2**-21 of the whole. Six
multiplications at 16 times the speed (Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial
Intelligence Datatype, 2019). A bfloat16 or int8 weight is one part and takes three.

A tile is 16 rows of 64 bytes, 1 KiB: of rows of activations and a STEP of their depth (`planes`),
or of a STEP of the depth, in pairs, and 16 output features (`blocks`). Both lie in memory as they
are loaded.
"""

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from muxrt.kernels.jit import inlined
from muxrt.kernels.panel import LANES, Elements, loop

TILE_ROWS = 16
STEP = 32  # of the depth: of one tile
TILE = TILE_ROWS * STEP  # elements
COLUMNS = 4  # tiles side by side: a panel of 64 features
TURNS = COLUMNS * TILE_ROWS  # in which a step of a panel is split
PARTS = 3  # of a float32
ALIGNMENT = 64  # bytes: a row of a tile that lies in two cache lines takes two loads

# (part of the activations, part of the weights), so that few tiles are loaded in between.
_PRODUCTS = {
    PARTS: ((0, 0), (0, 2), (0, 1), (1, 1), (1, 0), (2, 0)),
    1: ((0, 0), (1, 0), (2, 0)),
}
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # of Linux on x86-64

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_VOID, _BYTES = ir.VoidType(), _I8.as_pointer()
_INTS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(_I16, 2 * LANES)
_UPPER_BITS = ir.Constant(_INTS, [0xFFFF0000] * LANES)
_SIXTEEN = ir.Constant(_INTS, [16] * LANES)
_UPPER_WORDS = ir.Constant(ir.VectorType(_I32, 2 * LANES), [*range(1, 4 * LANES, 2)])


@cache
def is_usable() -> bool:
    """Whether the cores have AMX and the system lets this process use it: asks for it once."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return False  # numba was told to compile for some other machine
    features = llvm.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512bw")):
        return False
    # Tiles are 8 KiB more to save per thread, so Linux wants to be asked by each process.
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0)


def num_parts(array: Any) -> int:
    """In kernels: bfloat16 parts of an element of the array."""
    raise NotImplementedError


@overload(num_parts, strict=False)  # type: ignore[untyped-decorator]
def _num_parts(array: Any) -> Any:
    parts = _parts_of(array.dtype)
    return lambda array: parts


def _parts_of(kind: Any) -> int:
    return PARTS if isinstance(kind, types.Float) else 1


@intrinsic  # type: ignore[untyped-decorator]
def load_shapes(_typing: Any, shapes: Any) -> Any:
    """In kernels: give the tile registers of this thread the shapes in 64 bytes; clears them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shapes = Elements.of(context, builder, signature, args, 0)
        _call(builder, "ldtilecfg", builder.bitcast(shapes.at(_I64(0)), _BYTES))
        return context.get_dummy_value()

    return types.void(shapes), generate


@inlined
def open_tiles() -> None:
    """Shape the tile registers of this thread."""
    shapes = np.zeros(64, np.uint8)  # as `ldtilecfg` reads it
    shapes[0] = 1  # the only palette there is
    for register in range(8):
        shapes[16 + 2 * register] = 2 * STEP  # bytes of a row
        shapes[48 + register] = TILE_ROWS
    load_shapes(shapes)


@intrinsic  # type: ignore[untyped-decorator]
def close_tiles(_typing: Any) -> Any:
    """In kernels: forget the tiles; a thread without any is cheaper to switch."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def split_row(_typing: Any, x: Any, at: Any, planes: Any, to: Any) -> Any:
    """In kernels: x[at : at + STEP] as a row of PARTS tiles that begin at `to`, TILE apart."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, planes = (Elements.of(context, builder, signature, args, i) for i in (0, 2))
        halves = [x.vector(builder.add(args[1], _I64(i))) for i in (0, LANES)]
        for part, words in enumerate(_split_row(builder, halves)):
            _store(builder, words, planes, builder.add(args[3], _I64(part * TILE)))
        return context.get_dummy_value()

    return types.void(x, types.int64, planes, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def split_step(
    _typing: Any, source: Any, at: Any, blocks: Any, to: Any, weights: Any, ahead: Any
) -> Any:
    """In kernels: STEP rows of 64 weights of `source`, from `at` on, as tiles from `to` on.

    For each 16 columns there are as many tiles as a weight has parts. Asks for the first half
    (float32) or all (bfloat16) of as many `weights` from `ahead` on; int8 comes soon enough alone.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = (0, 2, 4)
        source, blocks, weights = (
            Elements.of(context, builder, signature, args, i) for i in places
        )
        lines, parts = min(1, _step_lines(weights) // TURNS), _parts_of(source.kind)
        width = COLUMNS * LANES

        def split_pair(turn: Any, _: list[Any]) -> list[Any]:
            """16 columns of two rows of the weights: a row of each of their tiles."""
            _ask(builder, weights, args[5], builder.mul(turn, _I64(lines)), lines)
            column = builder.lshr(turn, _I64(4))
            pair = builder.and_(turn, _I64(TILE_ROWS - 1))
            row = builder.mul(pair, _I64(2 * width))
            first = builder.add(builder.add(args[1], row), builder.mul(column, _I64(LANES)))
            rows = [source.vector(builder.add(first, _I64(i))) for i in (0, width)]
            target = builder.add(
                builder.mul(column, _I64(parts * TILE)), builder.mul(pair, _I64(STEP))
            )
            for part, pairs in enumerate(_split_pairs(builder, rows, parts)):
                place = builder.add(builder.add(args[3], target), _I64(part * TILE))
                _store(builder, pairs, blocks, place)
            return []

        loop(builder, _I64(TURNS), 1, [], split_pair)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(source, integer, blocks, integer, weights, integer), generate


def make_multiply(asks: bool) -> Any:
    """A function of kernels that multiplies 32 rows with 32 features, for some steps of the depth.

    It takes (sums, at, fresh, planes, a, next, blocks, b, steps, weights, ahead): two tiles of rows
    (from `a` on, `next` elements apart) times two tiles of columns (from `b` on) are added to
    sums [32 of rows, 32 of 64 features] from `at` on, or stored there if `fresh`. With `asks` it
    asks at every step for a quarter of a step of `weights`, from `ahead` on.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(
        _typing: Any,
        sums: Any,
        at: Any,
        fresh: Any,
        planes: Any,
        a: Any,
        following: Any,
        blocks: Any,
        b: Any,
        steps: Any,
        weights: Any,
        ahead: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            places = (0, 3, 6, 9)
            sums, planes, blocks, weights = (
                Elements.of(context, builder, signature, args, i) for i in places
            )
            parts, lines = _parts_of(weights.kind), _later_lines(weights) // 2 if asks else 0
            a_tiles = [args[4], builder.add(args[4], args[5])]
            b_tiles = [builder.add(args[7], _I64(column * parts * TILE)) for column in range(2)]
            _begin_sums(builder, args[2], sums, args[1])

            def add_products(step: Any, _: list[Any]) -> list[Any]:
                begin = builder.mul(step, _I64(PARTS * TILE))
                rows = [builder.add(tile, begin) for tile in a_tiles]
                begin = builder.mul(step, _I64(COLUMNS * parts * TILE))
                columns = [builder.add(tile, begin) for tile in b_tiles]
                start = builder.add(
                    args[10], builder.mul(step, _I64(_step_lines(weights) * weights.per_line))
                )
                _add_products(builder, planes, rows, blocks, columns, parts)
                _ask(builder, weights, start, _I64(0), lines)
                return []

            loop(builder, args[8], 1, [], add_products)
            _transfer(builder, "tilestored64", sums, args[1])
            return context.get_dummy_value()

        integer = types.int64
        signature = types.void(
            sums, integer, types.boolean, planes, integer, integer, blocks, integer, integer,
            weights, integer,
        )  # fmt: skip
        return signature, generate

    return multiply


def _begin_sums(builder: Any, fresh: Any, sums: Elements, at: Any) -> None:
    """Registers 0 to 3 = 0 if `fresh`, else what is at `at`."""
    with builder.if_else(fresh) as (cleared, loaded):
        with cleared:
            for register in range(4):
                _call(builder, "tilezero", _I8(register))
        with loaded:
            _transfer(builder, "tileloadd64", sums, at)


def _transfer(builder: Any, name: str, sums: Elements, at: Any) -> None:
    """Tile registers 0 to 3 from or to sums [.., 64]."""
    width = COLUMNS * LANES
    for register in range(4):
        row, column = divmod(register, 2)
        place = builder.add(at, _I64(row * TILE_ROWS * width + column * LANES))
        address = builder.bitcast(sums.at(place), _BYTES)
        _call(builder, name, _I8(register), address, _I64(width * 4))


def _add_products(
    builder: Any,
    planes: Elements,
    rows: list[Any],
    blocks: Elements,
    columns: list[Any],
    parts: int,
) -> None:
    """Registers 0 to 3 += two tiles of rows (in 4 and 5) times two of columns (in 6 and 7)."""
    held: dict[int, int] = {}  # register: part
    for row_part, column_part in _PRODUCTS[parts]:
        for register, tiles, place, part in (
            (4, planes, rows[0], row_part),
            (5, planes, rows[1], row_part),
            (6, blocks, columns[0], column_part),
            (7, blocks, columns[1], column_part),
        ):
            if held.get(register) != part:
                _load(builder, register, tiles, place, part)
                held[register] = part
        for i in range(4):
            row, column = divmod(i, 2)
            _call(builder, "tdpbf16ps", _I8(i), _I8(4 + row), _I8(6 + column))


def _split_row(builder: Any, vectors: list[Any]) -> list[Any]:
    """The parts of two vectors of floats, one vector after the other."""
    parts = []
    for _ in range(PARTS):
        first, second = (builder.bitcast(vector, _WORDS) for vector in vectors)
        parts.append(builder.shuffle_vector(first, second, _UPPER_WORDS))
        vectors = [_rest(builder, vector, _upper(builder, vector)) for vector in vectors]
    return parts


def _split_pairs(builder: Any, vectors: list[Any], parts: int) -> list[Any]:
    """The parts of two vectors of floats, element beside element."""
    result = []
    for _ in range(parts):
        uppers = [_upper(builder, vector) for vector in vectors]
        lower = builder.lshr(builder.bitcast(vectors[0], _INTS), _SIXTEEN)
        result.append(builder.or_(lower, uppers[1]))
        pairs = zip(vectors, uppers, strict=True)
        vectors = [_rest(builder, vector, upper) for vector, upper in pairs]
    return result


def _upper(builder: Any, vector: Any) -> Any:
    return builder.and_(builder.bitcast(vector, _INTS), _UPPER_BITS)


def _rest(builder: Any, vector: Any, upper: Any) -> Any:
    return builder.fsub(vector, builder.bitcast(upper, _FLOATS))


def _store(builder: Any, vector: Any, target: Elements, place: Any) -> None:
    pointer = builder.bitcast(target.at(place), vector.type.as_pointer())
    builder.store(vector, pointer, align=ALIGNMENT)


def _load(builder: Any, register: int, tiles: Elements, place: Any, part: int) -> None:
    """A tile register from memory."""
    address = tiles.at(builder.add(place, _I64(part * TILE)))
    _call(builder, "tileloadd64", _I8(register), builder.bitcast(address, _BYTES), _I64(ALIGNMENT))


def _step_lines(weights: Elements) -> int:
    """Cache lines of STEP rows of a panel."""
    return STEP * COLUMNS * LANES // weights.per_line


def _later_lines(weights: Elements) -> int:
    """Of these, what `split_step` leaves to ask for."""
    return max(0, _step_lines(weights) - TURNS)


def _ask(builder: Any, weights: Elements, start: Any, first: Any, num: int) -> None:
    for line in range(num):
        offset = builder.mul(builder.add(first, _I64(line)), _I64(weights.per_line))
        weights.prefetch(builder.add(start, offset))


def _call(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(_VOID, [arg.type for arg in args])
    name = f"llvm.x86.{name}"
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)
