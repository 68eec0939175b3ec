"""Processes that wait for each other in memory that they share: a barrier of counters.

Member i comes at counter i, and says at counter `size + i` that it is about to sleep.
"""

from typing import Any

from muxrt.kernels.atomics import fetch_add, load, pause, yield_core
from muxrt.kernels.jit import kernel

Array = Any  # numba's view: a numpy array

SPACING = 8  # counters per cache line: processes must not fight for the same one
PATIENCE = 200  # looks before the core is offered to others: those waited for may need it
LATE, MET, AWAITED = range(3)


@kernel()
def meet(counters: Array, member: int, size: int, turn: int, looks: int) -> int:
    """Wait until all of `size` have come to `turn`; counters [2 * size * SPACING] are 0 at first.

    `member` comes with the first call for a turn, which is one higher than the last; more calls
    wait on. -> MET: what anybody wrote before coming can be read. LATE: somebody is missing after
    so many looks. AWAITED: somebody sleeps and is to be woken, as `member` came just now.
    """
    if load(counters, member * SPACING) < turn:
        fetch_add(counters, member * SPACING, 1)
        for other in range(size):
            if load(counters, (size + other) * SPACING) > 0:
                return AWAITED
    for look in range(looks):
        missing = 0
        for other in range(size):
            if load(counters, other * SPACING) < turn:
                missing += 1
        if missing == 0:
            return MET
        pause()
        if look % PATIENCE == PATIENCE - 1:
            yield_core()
    return LATE


@kernel()
def doze(counters: Array, member: int, size: int, amount: int) -> None:
    """1: `member` looks once more, and then sleeps until somebody comes; -1: it is awake."""
    fetch_add(counters, (size + member) * SPACING, amount)
