"""A checksum of blocks: it finds damage, not malice, at the speed of memory."""

from typing import Any

import numpy as np
import numpy.typing as npt

from muxrt.kernels.jit import kernel

Array = npt.NDArray[Any]

LANES = 8  # sums side by side, as wide as the widest vectors
PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses no bit (2^64 / golden ratio)


@kernel()
def checksum(words: Array, ids: Array, size: int) -> np.uint64:
    """Of blocks `ids` in order; words of 64 bits, `size` to a block, a multiple of LANES.

    Each lane is a polynomial in PRIME over its words: a changed, lost or moved word changes it.
    """
    sums = np.zeros(LANES, dtype=np.uint64)
    for i in range(len(ids)):
        begin = np.int64(ids[i]) * size
        for at in range(begin, begin + size, LANES):
            for lane in range(LANES):
                sums[lane] = sums[lane] * PRIME + words[at + lane]
    total = np.uint64(len(ids))
    for lane in range(LANES):
        total = total * PRIME + sums[lane]
    return total
