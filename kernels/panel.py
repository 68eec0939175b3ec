"""The inner loop of attention, in vector code: a few rows of a product in registers.

Written as LLVM instructions because the sums must stay in registers for the whole loop: plain
loops, which load and store them at every step, ran at a sixth of the speed
(docs/benchmarks/kernels.md).
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LANES = 16  # floats of one vector; a narrower machine uses several registers for it
ROWS = 4  # rows of the product per call
NARROW = LANES  # columns of the product: a decode step packs its query heads into one vector
WIDE = 4 * LANES  # and a prefill tile fills all registers

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_SPLAT = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)


def _columns_at_once(width: int) -> int:
    """Columns whose sums fit into registers: 32 of 16 floats with AVX-512, else a quarter."""
    return width if llvm.get_host_cpu_features().get("avx512f") else LANES


def make_panel(width: int, fresh: bool) -> Any:
    """A function of kernels that multiplies into `ROWS` rows of `width` columns.

    It takes (out, at, a, a0, a1, a2, a3, stride, b, from, num) and computes, for k in [0, num):
        out[at + i * width + c] (+)= sum over k of a[a_i + k * stride] * b[from + k * width + c]
    `fresh` overwrites `out` instead of adding to it. `a` is float32, or bfloat16 as uint16; `num`
    is at least 1. Indices are not checked, and are elements in 64 bits.
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
            for column in range(0, width, _columns_at_once(width)):
                _Product(context, builder, signature, args, width, column, fresh).emit()
            return context.get_dummy_value()

        return signature, generate

    return panel


class _Product:
    """Emits the loop for one set of columns."""

    def __init__(
        self,
        context: Any,
        builder: Any,
        signature: Any,
        args: Any,
        width: int,
        column: int,
        fresh: bool,
    ) -> None:
        def data(index: int) -> Any:
            return context.make_array(signature.args[index])(context, builder, args[index]).data

        self._builder = builder
        self._width, self._column, self._fresh = width, column, fresh
        self._out, self._a, self._b = data(0), data(2), data(8)
        self._at, self._stride, self._start, self._num = args[1], args[7], args[9], args[10]
        self._rows = args[3 : 3 + ROWS]
        self._is_bfloat16 = isinstance(signature.args[2].dtype, types.Integer)
        self._vectors = range(column, column + _columns_at_once(width), LANES)

    def emit(self) -> None:
        builder = self._builder
        targets = [self._row_of_out(row) for row in range(ROWS)]
        before = [[self._initial(pointer) for pointer in row] for row in targets]
        entry = builder.block
        loop, end = builder.append_basic_block("panel"), builder.append_basic_block("panel.end")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_I64)
        sums = [[builder.phi(_VECTOR) for _ in self._vectors] for _ in targets]
        after = self._step(k, sums)
        following = builder.add(k, _I64(1))
        for value, first, last in zip(_flat(sums), _flat(before), _flat(after), strict=True):
            value.add_incoming(first, entry)
            value.add_incoming(last, loop)
        k.add_incoming(_I64(0), entry)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, self._num), loop, end)
        builder.position_at_end(end)
        for pointer, value in zip(_flat(targets), _flat(after), strict=True):
            builder.store(value, pointer, align=4)

    def _step(self, k: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """The sums after one more k."""
        builder = self._builder
        row = builder.add(self._start, builder.mul(k, _I64(self._width)))
        b = [builder.load(self._vector(self._b, row, c), align=4) for c in self._vectors]
        along = builder.mul(k, self._stride)
        after = []
        for row_sums, offset in zip(sums, self._rows, strict=True):
            a = self._broadcast(builder.load(builder.gep(self._a, [builder.add(offset, along)])))
            products = [builder.fmul(a, value, flags=("contract",)) for value in b]
            after.append(
                [
                    builder.fadd(total, product, flags=("contract",))
                    for total, product in zip(row_sums, products, strict=True)
                ]
            )
        return after

    def _row_of_out(self, row: int) -> list[Any]:
        base = self._builder.add(self._at, _I64(row * self._width))
        return [self._vector(self._out, base, column) for column in self._vectors]

    def _initial(self, pointer: Any) -> Any:
        if self._fresh:
            return ir.Constant(_VECTOR, [0.0] * LANES)
        return self._builder.load(pointer, align=4)

    def _vector(self, base: Any, offset: Any, column: int) -> Any:
        """Pointer to the vector at `base[offset + column]`."""
        index = self._builder.add(offset, _I64(column))
        return self._builder.bitcast(self._builder.gep(base, [index]), _VECTOR.as_pointer())

    def _broadcast(self, value: Any) -> Any:
        builder = self._builder
        if self._is_bfloat16:
            wide = builder.shl(builder.zext(value, _I32), _I32(16))
            value = builder.bitcast(wide, _F32)
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(undefined, value, _I32(0))
        return builder.shuffle_vector(first, undefined, _SPLAT)


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]
