"""Weights in one piece of shared memory."""

import os

import torch

from muxrt.errors import ConfigError
from muxrt.models.weights import State

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
SHARED_MEMORY = "/dev/shm"


def share(state: State) -> None:
    """Move every tensor into one shared segment, in place: who holds it sees it moved.

    One segment, because each costs a process a file descriptor; tensor by tensor, so that no more
    than one is held twice. Raises ConfigError where shared memory is too small for all.
    """
    if all(tensor.is_shared() for tensor in state.values()):
        return
    total = sum(_aligned(tensor.nbytes) for tensor in state.values())
    _check_room(total)
    # The public ways make a private copy first; torch's own data loader relies on this one.
    storage = torch.UntypedStorage._new_shared(total, device="cpu")
    offset = 0
    for tensor in state.values():
        place = (storage, offset // tensor.itemsize, tensor.shape, tensor.stride())
        torch.empty(0, dtype=tensor.dtype).set_(*place).copy_(tensor)
        offset += _aligned(tensor.nbytes)
        tensor.set_(*place)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _check_room(needed: int) -> None:
    """Writing past the end of a small /dev/shm would kill the process with SIGBUS."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    stats = os.statvfs(SHARED_MEMORY)
    free = stats.f_bavail * stats.f_frsize
    if free < needed:
        raise ConfigError(
            f"{SHARED_MEMORY}: found {free} bytes free, expected {needed} for shared weights;"
            " a container gets more with --shm-size"
        )
