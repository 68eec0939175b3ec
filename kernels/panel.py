"""The inner loops of matrix products, in vector code: a few rows of a product in registers.

Written as LLVM instructions because the sums must stay in registers for the whole loop: plain
loops, which load and store them at every step, ran at a sixth of the speed
(docs/benchmarks/kernels.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16  # floats of one vector; a narrower machine uses several registers for it
ROWS = 4  # rows of the product per call of a panel
NARROW = LANES  # columns of the product: a decode step packs its query heads into one vector
WIDE = 4 * LANES  # and a prefill tile fills all registers
LINE_BYTES = 64  # of a cache line

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES = ir.IntType(8).as_pointer()
_VECTOR, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_SPLAT = ir.Constant(_INTS, [0] * LANES)
_FUSE = ("contract",)


def make_panel(width: int, fresh: bool) -> Any:
    """A function of kernels that multiplies into `ROWS` rows of `width` columns.

    It takes (out, at, a, a0, a1, a2, a3, stride, b, from, num) and computes, for k in [0, num):
        out[at + i * width + c] (+)= sum over k of a[a_i + k * stride] * b[from + k * width + c]
    `fresh` overwrites `out` instead of adding to it. `num` is at least 1. Indices are not checked,
    and are elements in 64 bits.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def panel(
        _typing: Any,
        out: Any,
        at: Any,
        a: Any,
        a0: Any,
        a1: Any,
        a2: Any,
        a3: Any,
        stride: Any,
        b: Any,
        start: Any,
        num: Any,
    ) -> Any:
        signature = types.void(out, at, a, a0, a1, a2, a3, stride, b, start, num)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, a, b = (Elements.of(context, builder, signature, args, i) for i in (0, 2, 8))
            product = _Product(builder, out, a, b, width, fresh)
            product.emit(args[1], args[3 : 3 + ROWS], args[7], args[9], args[10])
            return context.get_dummy_value()

        return signature, generate

    return panel


def make_product(rows: int, columns: int = WIDE, lines: int | None = None) -> Any:
    """A function of kernels that multiplies into `rows` rows of `columns` columns.

    It takes (out, at, out_stride, a, from_a, a_stride, b, from_b, b_stride, num, next, from_next)
    and computes, for k in [0, num), where strides lead from row to row:
        out[at + i * out_stride + c] +=
            sum over k of a[from_a + i * a_stride + k] * b[from_b + k * b_stride + c]
    and on the way asks for `lines` cache lines per k of the array `next`, from `from_next` on (None
    = as many as `columns` of its elements take): what is needed soon comes while this is computed.
    `a` is float32; `b` and `next` are float32, bfloat16 as uint16, or int8. Sums run along k in
    order, so a row comes out the same whatever `rows` is. `num` is at least 1; indices are not
    checked.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def product(
        _typing: Any,
        out: Any,
        at: Any,
        out_stride: Any,
        a: Any,
        from_a: Any,
        a_stride: Any,
        b: Any,
        from_b: Any,
        b_stride: Any,
        num: Any,
        following: Any,
        from_following: Any,
    ) -> Any:
        integers = [types.int64] * 2
        signature = types.void(
            out, *integers, a, *integers, b, *integers, types.int64, following, types.int64
        )

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            places = (0, 3, 6, 10)
            out, a, b, ahead = (Elements.of(context, builder, signature, args, i) for i in places)
            starts = [builder.add(args[4], builder.mul(args[5], _I64(row))) for row in range(rows)]
            product = _Product(builder, out, a, b, columns)
            product.strides(args[2], args[8])
            product.ask(ahead, args[11], lines)
            product.emit(args[1], starts, _I64(1), args[7], args[9])
            return context.get_dummy_value()

        return signature, generate

    return product


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """In kernels: ask for the cache line of an element; any index will do, nothing is read."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Elements.of(context, builder, signature, args, 0).prefetch(args[1])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def dots(
    _typing: Any,
    out: Any,
    at: Any,
    rows: Any,
    from_rows: Any,
    stride: Any,
    num: Any,
    x: Any,
    from_x: Any,
    width: Any,
) -> Any:
    """In kernels: the products of up to LANES rows with one vector, side by side.

    out[at + i] = sum over d < width of rows[from_rows + i * stride + d] * x[from_x + d] for i in
    [0, num); out[at + num] to out[at + LANES - 1] are overwritten with anything. `width` is a
    multiple of LANES.
    """
    integers = [types.int64] * 2
    signature = types.void(out, types.int64, rows, *integers, types.int64, x, *integers)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = (0, 2, 6)
        out, rows, x = (Elements.of(context, builder, signature, args, i) for i in places)
        last = builder.sub(args[5], _I64(1))  # the rows that are not there repeat the last one
        starts = []
        for i in range(LANES):
            row = _I64(i)
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            starts.append(builder.add(args[3], builder.mul(row, args[4])))
        sums = _multiply_rows(builder, rows, starts, x, args[7], args[8])
        builder.store(_sum_each(builder, sums), out.vector_at(args[1]), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def largest(_typing: Any, x: Any, at: Any, num: Any, least: Any) -> Any:
    """In kernels: the largest of x[at : at + num]; the rest of LANES becomes `least`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        elements = Elements.of(context, builder, signature, args, 0)
        lanes = ir.Constant(_INTS, [*range(LANES)])
        num = _splat(builder, builder.trunc(args[2], _I32), _INTS)
        is_there = builder.icmp_signed("<", lanes, num)
        least = _splat(builder, args[3], _VECTOR)
        values = builder.select(is_there, elements.vector(args[1]), least)
        builder.store(values, elements.vector_at(args[1]), align=4)
        return _reduce(builder, "fmax", values)

    return types.float32(x, types.int64, types.int64, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def exp_and_sum(_typing: Any, x: Any, at: Any, top: Any) -> Any:
    """In kernels: x[at : at + LANES] = e**(x - top), none of them above `top`; their sum.

    The polynomial of `cpu_math.exp`, a vector at a time: loops this short become scalar code.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        elements = Elements.of(context, builder, signature, args, 0)
        top = _splat(builder, args[2], _VECTOR)
        values = _exp(builder, builder.fsub(elements.vector(args[1]), top))
        builder.store(values, elements.vector_at(args[1]), align=4)
        return _reduce(builder, "fadd", values)

    return types.float32(x, types.int64, types.float32), generate


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, _SPLAT)


def _floats(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _reduce(builder: Any, kind: str, values: Any) -> Any:
    """The lanes' sum or largest, in any order."""
    name = f"llvm.vector.reduce.{kind}.v{LANES}f32"
    if kind == "fadd":
        function = ir.FunctionType(_F32, [_F32, _VECTOR])
        callee = cgutils.get_or_insert_function(builder.module, function, name)
        return builder.call(callee, [_F32(0.0), values], fastmath=("reassoc",))
    callee = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_F32, [_VECTOR]), name)
    return builder.call(callee, [values])


def _exp(builder: Any, x: Any) -> Any:
    low = _floats(-87.0)
    x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    scaled = builder.fadd(builder.fmul(x, _floats(1.44269504)), _floats(0.5))
    name = f"llvm.floor.v{LANES}f32"
    callee = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), name
    )
    n = builder.call(callee, [scaled])
    r = builder.fsub(x, builder.fmul(n, _floats(0.693359375), flags=_FUSE), flags=_FUSE)
    r = builder.fadd(r, builder.fmul(n, _floats(2.12194440e-4), flags=_FUSE), flags=_FUSE)
    p = _floats(1.0 / 720)
    for factor in (1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        p = builder.fadd(builder.fmul(p, r, flags=_FUSE), _floats(factor), flags=_FUSE)
    exponent = builder.add(builder.fptosi(n, _INTS), ir.Constant(_INTS, [127] * LANES))
    power = builder.shl(exponent, ir.Constant(_INTS, [23] * LANES))
    return builder.fmul(p, builder.bitcast(power, _VECTOR))


def loop(
    builder: Any,
    end: Any,
    step: int,
    before: list[Any],
    body: Callable[[Any, list[Any]], list[Any]],
) -> list[Any]:
    """Vectors that stay in registers while `body(i, vectors)` makes new ones of them.

    i = 0, step, ... below `end`, at least once; what the last time made.
    """
    entry = builder.block
    inside, after = builder.append_basic_block("loop"), builder.append_basic_block("loop.end")
    builder.branch(inside)
    builder.position_at_end(inside)
    i, held = builder.phi(_I64), [builder.phi(_VECTOR) for _ in before]
    made = body(i, held)
    following = builder.add(i, _I64(step))
    for value, first, last in zip(held, before, made, strict=True):
        value.add_incoming(first, entry)
        value.add_incoming(last, inside)
    i.add_incoming(_I64(0), entry)
    i.add_incoming(following, inside)
    builder.cbranch(builder.icmp_signed("<", following, end), inside, after)
    builder.position_at_end(after)
    return made


def _multiply_rows(
    builder: Any, rows: "Elements", starts: list[Any], x: "Elements", from_x: Any, width: Any
) -> list[Any]:
    """A vector per row, whose sum is the row's product with x."""

    def add_products(d: Any, sums: list[Any]) -> list[Any]:
        part = x.vector(builder.add(from_x, d))
        vectors = [rows.vector(builder.add(start, d)) for start in starts]
        return [_fused(builder, row, part, total) for row, total in zip(vectors, sums, strict=True)]

    return loop(builder, width, LANES, [_floats(0.0)] * len(starts), add_products)


def _fused(builder: Any, a: Any, b: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(a, b, flags=_FUSE), flags=_FUSE)


def _sum_each(builder: Any, vectors: list[Any]) -> Any:
    """One vector with the sum of each of LANES vectors: neighbours are added until one is left."""
    even = ir.Constant(_INTS, [*range(0, 2 * LANES, 2)])
    odd = ir.Constant(_INTS, [*range(1, 2 * LANES, 2)])
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))
            for a, b in pairs
        ]
    return vectors[0]


@dataclass(frozen=True)
class Elements:
    """An array that an intrinsic was given, read as floats whatever it holds."""

    builder: Any
    data: Any
    kind: Any  # numba's type of an element

    @classmethod
    def of(cls, context: Any, builder: Any, signature: Any, args: Any, index: int) -> "Elements":
        array = signature.args[index]
        data = context.make_array(array)(context, builder, args[index]).data
        return cls(builder, data, array.dtype)

    @property
    def per_line(self) -> int:
        """Elements in a cache line."""
        return LINE_BYTES * 8 // int(self.kind.bitwidth)

    def at(self, index: Any) -> Any:
        return self.builder.gep(self.data, [index])

    def vector_at(self, index: Any) -> Any:
        """Pointer to the vector that begins there."""
        kind = ir.VectorType(self.data.type.pointee, LANES)
        return self.builder.bitcast(self.at(index), kind.as_pointer())

    def splat(self, index: Any) -> Any:
        """One element in every lane."""
        value = self._as_float(self.builder.load(self.at(index)), _I32, _F32, _I32(16))
        return _splat(self.builder, value, _VECTOR)

    def vector(self, index: Any) -> Any:
        raw = self.builder.load(self.vector_at(index), align=1)
        return self._as_float(raw, _INTS, _VECTOR, ir.Constant(_INTS, [16] * LANES))

    def prefetch(self, index: Any) -> None:
        """Ask for the cache line of an element; any index will do."""
        builder = self.builder
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(self.at(index), _BYTES)
        # To read, into the second cache, as data.
        builder.call(function, [address, _I32(0), _I32(2), _I32(1)])

    def _as_float(self, raw: Any, ints: Any, floats: Any, half: Any) -> Any:
        if isinstance(self.kind, types.Float):
            return raw
        if self.kind.bitwidth == 8:
            return self.builder.sitofp(self.builder.sext(raw, ints), floats)
        wide = self.builder.shl(self.builder.zext(raw, ints), half)
        return self.builder.bitcast(wide, floats)


class _Product:
    """Emits out (+)= a b: one loop over k for each set of columns that fits into registers."""

    def __init__(
        self,
        builder: Any,
        out: Elements,
        a: Elements,
        b: Elements,
        width: int,
        fresh: bool = False,
    ) -> None:
        self._builder, self._out, self._a, self._b = builder, out, a, b
        self._width, self._fresh = width, fresh
        self._out_stride = self._b_stride = _I64(width)
        self._ahead: tuple[Elements, Any, int] | None = None

    def strides(self, out: Any, b: Any) -> None:
        """From a row to the next one; `width` elements where this is not called."""
        self._out_stride, self._b_stride = out, b

    def ask(self, ahead: Elements, start: Any, lines: int | None) -> None:
        """Prefetch `lines` cache lines of `ahead` at every k, one after the other."""
        self._ahead = (ahead, start, lines or max(1, self._width // ahead.per_line))

    def emit(self, at: Any, rows: Sequence[Any], stride: Any, start: Any, num: Any) -> None:
        """`rows`: where the rows of a begin; `stride` from one of their elements to the next."""
        count = _columns_at_once(self._width)
        for column in range(0, self._width, count):
            columns = range(column, column + count, LANES)
            self._emit_loop(columns, at, rows, stride, start, num)

    def _emit_loop(
        self, columns: range, at: Any, rows: Sequence[Any], stride: Any, start: Any, num: Any
    ) -> None:
        builder, out = self._builder, self._out
        places = [
            builder.add(builder.add(at, builder.mul(self._out_stride, _I64(row))), _I64(column))
            for row in range(len(rows))
            for column in columns
        ]
        before = [_floats(0.0) if self._fresh else out.vector(place) for place in places]

        def add_products(k: Any, sums: list[Any]) -> list[Any]:
            along = builder.mul(k, stride)
            line = builder.add(start, builder.mul(k, self._b_stride))
            if self._ahead is not None:
                self._prefetch(k, *self._ahead)
            a_places = [builder.add(row, along) for row in rows]
            return self._add_products(sums, a_places, line, columns)

        after = loop(builder, num, 1, before, add_products)
        for place, value in zip(places, after, strict=True):
            builder.store(value, out.vector_at(place), align=4)

    def _add_products(
        self, sums: list[Any], a_places: list[Any], line: Any, columns: range
    ) -> list[Any]:
        """The sums after one more k."""
        builder = self._builder
        b = [self._b.vector(builder.add(line, _I64(column))) for column in columns]
        totals, after = iter(sums), []
        for place in a_places:
            value = self._a.splat(place)
            for vector in b:
                after.append(_fused(builder, value, vector, next(totals)))
        return after

    def _prefetch(self, k: Any, ahead: Elements, start: Any, lines: int) -> None:
        builder = self._builder
        first = builder.add(start, builder.mul(k, _I64(lines * ahead.per_line)))
        for line in range(lines):
            ahead.prefetch(builder.add(first, _I64(line * ahead.per_line)))


def _columns_at_once(width: int) -> int:
    """Columns whose sums fit into registers: all with AVX-512, else one vector of them."""
    return width if llvm.get_host_cpu_features().get("avx512f") else LANES
