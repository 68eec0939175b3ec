"""Waits for a descriptor of any number: `select` ends at 1,023, and a whole run has more open."""

import select


def is_readable(descriptor: int, timeout_s: float) -> bool:
    """Whether something can be read, or the other end is closed, before the time is up."""
    waits = select.poll()
    waits.register(descriptor, select.POLLIN)
    return bool(waits.poll(1000 * timeout_s))
