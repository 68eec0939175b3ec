"""How fast the cores read memory: the bound of a decode step at batch 1."""

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import numpy.typing as npt

REPEATS = 7


@numba.njit(nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _sum(values: npt.NDArray[np.float32]) -> np.float32:
    total = np.float32(0)
    for index in range(values.size):
        total += values[index]
    return total


def read_bytes_per_s(num_bytes: int, threads: int) -> float:
    """The best of some sums over a buffer of `num_bytes`, each thread on a part of it."""
    values = np.ones(num_bytes // 4, dtype=np.float32)
    parts = np.array_split(values, threads)
    _sum(values[:8])  # compiles
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            begun_s = time.perf_counter()
            list(pool.map(_sum, parts))
            seconds.append(time.perf_counter() - begun_s)
    return values.nbytes / min(seconds)
