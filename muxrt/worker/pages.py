"""Memory changes hands without going back to the system, which would zero it for the next owner.

mremap(2) with MREMAP_DONTUNMAP (Linux 5.7) moves the pages of a private range to another range:
both stay mapped, and the first one is empty. Where page tables can move whole (ranges that begin on
2 MiB, on huge pages) that takes a microsecond or so per huge page; zeroing one takes a hundred.
"""

import ctypes
import mmap

from muxrt.kernels import HUGE_BYTES

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


def move_pages(source: int, target: int, num_bytes: int) -> int:
    """Give the pages at one address to another; what was there goes. How many bytes have moved.

    A huge page at a time, as a range that took pages from several others is several mappings to the
    system, and one call moves from one of them only. Fewer bytes: not on this system.
    """
    flags = _MAYMOVE | _FIXED | _DONTUNMAP
    for begin in range(0, num_bytes, HUGE_BYTES):
        size = min(HUGE_BYTES, num_bytes - begin)
        if _libc.mremap(source + begin, size, size, flags, target + begin) == _FAILED:
            return begin
    return num_bytes
