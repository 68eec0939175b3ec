"""How numba kernels are made: typed beforehand, kept on disk, fit for several threads at a time.

No kernel is `parallel=True`: numba's own thread pool aborts the process when two lanes enter it.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

from muxrt.kernels.atomics import pointer_to

F = TypeVar("F", bound=Callable[..., Any])

_I32, _BYTES = ir.IntType(32), ir.IntType(8).as_pointer()

EVERYWHERE = 1 << 48  # the length of an array of which only the address is known

# Sums may be reordered and fused; NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


def kernel(**options: Any) -> Callable[[F], F]:
    """Decorate a kernel: no GIL, kept on disk; `compile_for` compiles it."""

    def decorate(function: F) -> F:
        with _kept_on_disk():
            made: F = numba.njit(nogil=True, cache=True, fastmath=FASTMATH, **options)(function)
        return made

    return decorate


class Stage:
    """A kernel that programs call by its address, for one or more types of the data it reads.

    It is `function(begin, end, args, data)`: items [begin, end) of its work, a pointer to a record
    of what it needs to know, a pointer to data. It must not raise: nobody would hear.
    """

    def __init__(self, function: Callable[..., None], record: Any, kinds: tuple[Any, ...]) -> None:
        self.record = record
        self._function = function
        self._kinds = kinds
        self._compiled: dict[str, Any] = {}

    def compile(self) -> None:
        """For every type, or read it from disk."""
        record = pointer_to(numba.from_dtype(self.record))
        with _kept_on_disk():
            for kind in self._kinds:
                if str(kind) not in self._compiled:
                    signature = types.void(types.int64, types.int64, record, pointer_to(kind))
                    make = numba.cfunc(
                        signature, cache=True, fastmath=FASTMATH, error_model="numpy"
                    )
                    self._compiled[str(kind)] = make(self._function)

    def address(self, kind: str) -> int:
        """Where the code for data of this type begins. KeyError where there is none."""
        return int(self._compiled[kind].address)


STAGES: list[Stage] = []


def stage(record: Any, kinds: tuple[Any, ...]) -> Callable[[Callable[..., None]], Stage]:
    """Decorate a kernel of programs: `record` is numpy's type of its arguments."""

    def decorate(function: Callable[..., None]) -> Stage:
        STAGES.append(Stage(function, record, kinds))
        return STAGES[-1]

    return decorate


@contextmanager
def _kept_on_disk() -> Iterator[None]:
    """What is decorated inside is kept in our folder; other users of numba keep their setting."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def inlined(function: F) -> F:
    """Decorate a part of kernels: compiled into each of them."""
    made: F = numba.njit(nogil=True, fastmath=FASTMATH)(function)
    return made


def compile_for(function: Callable[..., Any], signatures: list[str]) -> None:
    """Compile a kernel for exactly these argument types, or read it from disk."""
    dispatcher: Any = function
    if dispatcher.signatures:
        return
    for signature in signatures:
        dispatcher.compile(signature)
    dispatcher.disable_compile()  # a type nobody thought of is an error, not a slow request


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: a folder of its own for each version of their sources.

    numba looks at the file of a kernel only, and would miss a change in a part from another file.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    version = hashlib.blake2b(b"\0".join(path.read_bytes() for path in sources), digest_size=8)
    return _writable_root() / f"kernels-{version.hexdigest()}"


def _writable_root() -> Path:
    """NUMBA_CACHE_DIR, the user's cache, or a private folder for this process alone."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    named = os.environ.get("NUMBA_CACHE_DIR")
    for root in [Path(named)] if named else [Path(home) / "muxrt"]:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root, os.W_OK):
            return root
    # Never a guessable name in a folder of all users: what lies there is code that we would run.
    return Path(tempfile.mkdtemp(prefix="muxrt-kernels-"))


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(_typing: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_float(_typing: Any, value: Any) -> Any:
    """The 32 bits of a float32, unsigned."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@inlined
def bfloat16_of_float(value: Any) -> Any:
    """The upper 16 bits of a float32, rounded to nearest even; NaN stays NaN."""
    bits = bits_of_float(value)
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


def as_float(value: Any) -> Any:
    """In kernels: an element of an arena or of weights as float32; uint16 holds a bfloat16."""
    raise NotImplementedError


def as_arena(value: Any, arena: Any) -> Any:
    """In kernels: a float32 as an element of `arena`."""
    raise NotImplementedError


@overload(as_float, strict=False)  # type: ignore[untyped-decorator]
def _as_float(value: Any) -> Any:
    if value == types.int8:
        return lambda value: np.float32(value)
    if isinstance(value, types.Integer):
        return lambda value: float_of_bits(np.uint32(value) << np.uint32(16))
    return lambda value: value


@overload(as_arena, strict=False)  # type: ignore[untyped-decorator]
def _as_arena(value: Any, arena: Any) -> Any:
    if isinstance(arena.dtype, types.Integer):
        return lambda value, arena: bfloat16_of_float(value)
    return lambda value, arena: value
