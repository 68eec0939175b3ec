"""Arithmetic that is asked millions of times, compiled by numba.

numba is loaded when something is compiled, not before: who only serves does without.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiled when first called, then kept on disk; dividing by zero gives infinity.

    Sums are rounded as Python rounds them: nothing is reordered, no multiplication is fused with
    an addition.
    """
    from numba import njit

    made: F = njit(cache=True, error_model="numpy")(function)
    return made


def compiled_bare(function: F) -> F:
    """The same without reference counts, for functions that make no arrays: nobody would free them.

    Counting took nine tenths of the time of small loops over arrays in a tuple. Python may call it,
    compiled functions may not.
    """

    @cache
    def made() -> F:
        from numba import njit

        return cast(F, njit(cache=True, error_model="numpy", _nrt=False)(function))

    @wraps(function)
    def call(*args: Any) -> Any:
        return made()(*args)

    return cast(F, call)


def inlined(function: F) -> F:
    """A part of compiled functions: copied to where it is called, as arguments cost time."""
    from numba import njit

    made: F = njit(inline="always", error_model="numpy")(function)
    return made
