"""What threads of compiled code need to agree with each other: counters in memory they share."""

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_VOID, _I64 = ir.VoidType(), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
_STAGE = ir.FunctionType(_VOID, [_I64, _I64, _BYTES, _BYTES])

# Gives the core to whoever waits for it; found by name in the C library.
yield_core = types.ExternalFunction("sched_yield", types.int32())


def pointer_to(element: Any) -> Any:
    """numba's type of a pointer to such elements."""
    return types.CPointer(element)  # type: ignore[attr-defined]


def _counter(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(_typing: Any, counters: Any, index: Any, amount: Any) -> Any:
    """Add to `counters[index]` at once for all threads; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = _counter(context, builder, signature, args)
        return builder.atomic_rmw("add", counter, args[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load(_typing: Any, counters: Any, index: Any) -> Any:
    """`counters[index]` with all that was written before it got there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = _counter(context, builder, signature, args)
        return builder.load_atomic(counter, "acquire", 8)

    return types.int64(counters, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pause(_typing: Any) -> Any:
    """Tell the core that this thread only waits."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        if _IS_X86:
            kind = ir.FunctionType(_VOID, [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def call_stage(_typing: Any, function: Any, begin: Any, end: Any, args: Any, data: Any) -> Any:
    """Call a compiled stage by its address: items [begin, end), two more addresses."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        callee = builder.inttoptr(values[0], _STAGE.as_pointer())
        pointers = [builder.inttoptr(value, _BYTES) for value in values[3:]]
        builder.call(callee, [values[1], values[2], *pointers])
        return context.get_dummy_value()

    integers = [types.int64] * 5
    return types.void(*integers), generate


def _make_pointer(element: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(_typing: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            kind = context.get_value_type(pointer_to(element))
            return builder.inttoptr(args[0], kind)

        return pointer_to(element)(types.int64), generate

    return pointer


# The pointer to floats or integers at an address, for `numba.carray`.
_ELEMENTS = (types.float32, types.uint16, types.int32, types.int64)
floats_at, uint16_at, int32_at, int64_at = map(_make_pointer, _ELEMENTS)
