"""Device memory that other processes compute with: CUDA's IPC handles.

A handle names a whole allocation of the driver; torch's tensors lie somewhere inside of one.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from muxrt.worker.driver import Driver

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: the only flag there is, and required


class Piece(msgspec.Struct, frozen=True):
    """A range of bytes of another process's device memory."""

    handle: bytes
    offset: int  # bytes, within the allocation
    num_bytes: int


def export(driver: Driver, tensor: Tensor) -> Piece:
    """For the other process; `tensor`, contiguous, must outlive what is made of it there.

    Raises DriverError for memory that cannot be shared, as of expandable segments.
    """
    base, _ = driver.call("cuMemGetAddressRange", tensor.data_ptr())
    handle = driver.call("cuIpcGetMemHandle", base)
    data = ctypes.string_at(handle.getPtr(), HANDLE_BYTES)
    return Piece(data, tensor.data_ptr() - int(base), tensor.nbytes)


class _Bytes:
    """Memory that torch can look at by the CUDA array interface, version 3."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8 over memory that somebody else owns."""
    return torch.as_tensor(_Bytes(address, num_bytes), device=device)


class Imports:
    """What this process has opened of another's memory; a handle is opened once."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._addresses: dict[bytes, Any] = {}

    def address(self, piece: Piece) -> int:
        """Where the piece is in this process. Raises DriverError."""
        if piece.handle not in self._addresses:
            handle = self._driver.api.CUipcMemHandle()
            ctypes.memmove(handle.getPtr(), piece.handle, HANDLE_BYTES)
            base = self._driver.call("cuIpcOpenMemHandle", handle, LAZY_PEER_ACCESS)
            self._addresses[piece.handle] = base
        return int(self._addresses[piece.handle]) + piece.offset

    def memory(
        self, pieces: Mapping[str, Piece], device: torch.device
    ) -> Callable[[str, int], Tensor]:
        """The pieces by name, as `muxrt.worker.device_storage.Allocate`."""

        def allocate(name: str, num_bytes: int) -> Tensor:
            piece = pieces[name]
            assert piece.num_bytes == num_bytes, "both processes lay out the same plan"
            return tensor_at(self.address(piece), num_bytes, device)

        return allocate

    def close(self) -> None:
        """Close all; no tensor over them may be used again."""
        while self._addresses:
            _, base = self._addresses.popitem()
            self._driver.call("cuIpcCloseMemHandle", base)
