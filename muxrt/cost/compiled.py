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
