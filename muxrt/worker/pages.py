"""Memory changes hands without going back to the system, which would zero it for the next owner.

mremap(2) with MREMAP_DONTUNMAP (Linux 5.7) moves the pages of a private range to another range:
both stay mapped, and the first one is empty. Where page tables can move whole (ranges that begin on
2 MiB, on huge pages) that takes a microsecond or so per huge page; zeroing one takes a hundred.
"""

import ctypes
import mmap

HUGE_BYTES = 2 << 20
_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4  # flags of mremap, linux/mman.h
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
)


def address(pages: mmap.mmap) -> int:
    """Where they begin."""
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


def move_pages(source: int, target: int, num_bytes: int) -> bool:
    """Give the pages at one address to another; what was there goes. False: not on this system."""
    flags = _MAYMOVE | _FIXED | _DONTUNMAP
    moved = _libc.mremap(source, num_bytes, num_bytes, flags, target)
    return bool(moved != _FAILED)
