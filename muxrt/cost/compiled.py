"""Arithmetic that is asked millions of times, compiled by numba."""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiled when first called, then kept on disk; dividing by zero gives infinity.

    Sums are rounded as Python rounds them: nothing is reordered, no multiplication is fused with
    an addition.
    """
    made: F = njit(cache=True, error_model="numpy")(function)
    return made


def compiled_bare(function: F) -> F:
    """The same without reference counts, for functions that make no arrays: nobody would free them.

    Counting took nine tenths of the time of small loops over arrays in a tuple.
    """
    made: F = njit(cache=True, error_model="numpy", _nrt=False)(function)
    return made


def inlined(function: F) -> F:
    """A part of compiled functions: copied to where it is called, as arguments cost time."""
    made: F = njit(inline="always", error_model="numpy")(function)
    return made
