"""Arithmetic that becomes vector code inside the loops of kernels."""

from typing import Any

import numpy as np

from muxrt.kernels.jit import float_of_bits, inlined


@inlined
def exp(x: Any) -> Any:
    """e**x of a float32 <= 88, within 2 units in the last place; below -87 it is e**-87.

    Branch-free, so that loops around it become vector code (libm's is a call per element).
    """
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.0 / 720)
    p = p * r + np.float32(1.0 / 120)
    p = p * r + np.float32(1.0 / 24)
    p = p * r + np.float32(1.0 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * float_of_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
