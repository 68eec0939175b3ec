"""What the CUDA driver is asked, and its refusals as ours."""

import ctypes
from collections.abc import Callable
from importlib import import_module
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


class DriverError(MuxrtError):
    """The CUDA driver refused a call."""


class Driver:
    """`cuda.bindings.driver`, with errors raised."""

    def __init__(self, api: Any) -> None:
        """`api` is that module. Raises DriverError where it cannot start."""
        self.api = api
        self.call("cuInit", 0)
        self.version: int = self.call("cuDriverGetVersion")  # 1000 * major + 10 * minor

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function returns: nothing, one value, or a tuple. Raises DriverError."""
        code, *values = getattr(self.api, name)(*arguments)
        if code != self.api.CUresult.CUDA_SUCCESS:
            raise DriverError(f"{name}: {getattr(code, 'name', code)}")
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)


def open_driver() -> Driver:
    """Raises DriverError where the `gpu` extra is not installed, or the driver does not start."""
    try:
        api = import_module("cuda.bindings.driver")
    except ImportError:
        raise DriverError("cuda-bindings is not installed: pip install 'muxrt[gpu]'") from None
    return Driver(api)
