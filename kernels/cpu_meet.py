"""Processes that wait for each other in memory that they share: a barrier of counters."""

from typing import Any

from muxrt.kernels.atomics import fetch_add, load, pause, yield_core
from muxrt.kernels.jit import kernel

Array = Any  # numba's view: a numpy array

SPACING = 8  # counters per cache line: processes must not fight for the same one
PATIENCE = 200  # looks before the core is offered to others: those waited for may need it


@kernel()
def meet(counters: Array, member: int, size: int, turn: int, looks: int) -> bool:
    """Whether all of `size` have come to `turn`; counters [size * SPACING] are 0 at first.

    `member` comes with the first call for a turn, which is one higher than the last; more calls
    wait on. What anybody wrote before coming is seen by all who met.
    """
    if load(counters, member * SPACING) < turn:
        fetch_add(counters, member * SPACING, 1)
    for look in range(looks):
        missing = 0
        for other in range(size):
            if load(counters, other * SPACING) < turn:
                missing += 1
        if missing == 0:
            return True
        pause()
        if look % PATIENCE == PATIENCE - 1:
            yield_core()
    return False
