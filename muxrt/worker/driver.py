"""What the CUDA driver is asked, and its refusals as ours."""

import ctypes
from collections.abc import Callable
from typing import Any

from muxrt.errors import MuxrtError

LIBRARY = "libcuda.so.1"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class NoGpu(MuxrtError):
    """This machine has no GPU that this process may use."""


def count_gpus(open_library: Callable[[str], Any] = ctypes.CDLL) -> int:
    """GPUs that the driver shows this process; neither torch nor the `gpu` extra is needed.

    No context is made: no memory of a GPU is taken. Raises NoGpu with what is missing.
    """
    try:
        library = open_library(LIBRARY)
    except OSError:
        raise NoGpu(f"this machine has no NVIDIA driver ({LIBRARY})") from None
    code = library.cuInit(0)
    if code not in (0, NO_DEVICE):
        raise NoGpu(f"its NVIDIA driver does not start (cuInit: error {code})")
    count = ctypes.c_int()
    if code == NO_DEVICE or library.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise NoGpu("its NVIDIA driver shows this process no GPU")
    return count.value
