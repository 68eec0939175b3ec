"""Stands in for the module cuda.bindings.driver where there is no GPU: what it makes, it counts.

As strict as the driver's documentation: SM resources of one context come from one split, green
streams are non-blocking, nothing is destroyed twice.
"""

import ctypes
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from types import SimpleNamespace
from typing import Any


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915


OK = CUresult.CUDA_SUCCESS


@dataclass
class Sms:
    """An SM resource: which ones, and from which split."""

    ids: frozenset[int]
    split: int = 0
    wqConfig: None = None  # noqa: N815

    @property
    def sm(self) -> Any:
        return SimpleNamespace(smCount=len(self.ids))


@dataclass
class Queues:
    """A work queue resource."""

    wqConfig: Any = field(default_factory=lambda: SimpleNamespace(sharingScope=0))  # noqa: N815


@dataclass(eq=False)
class Context:
    sms: Sms
    queues: tuple[Queues, ...]


class Handle:
    """An IPC handle: 64 bytes somewhere."""

    def __init__(self) -> None:
        self._data = ctypes.create_string_buffer(64)

    def getPtr(self) -> int:  # noqa: N802
        return ctypes.addressof(self._data)


class FakeDriver:
    """A device of `num_sms`, handed out in groups of `granule`."""

    CUresult = CUresult
    CUdevResourceType = SimpleNamespace(
        CU_DEV_RESOURCE_TYPE_SM=1, CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG=1000
    )
    CUdevWorkqueueConfigScope = SimpleNamespace(CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUipcMemHandle = Handle

    def __init__(self, num_sms: int = 132, granule: int = 8, version: int = 13000) -> None:
        self.version = version
        self._whole = Sms(frozenset(range(num_sms)))
        self._granule = granule
        self._ids = count(1)
        self.contexts: set[Context] = set()
        self.streams: dict[int, tuple[Context, int]] = {}  # context and priority, by handle
        self.num_splits = 0
        self.opened: list[bytes] = []  # IPC handles that are open
        self.fail: dict[str, int] = {}  # by function: which call of it fails
        self.calls: dict[str, int] = {}

    def _note(self, name: str) -> bool:
        """True if this call is to fail."""
        self.calls[name] = self.calls.get(name, 0) + 1
        return self.fail.get(name) == self.calls[name]

    def cuInit(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return (OK,)

    def cuDriverGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.version

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, ordinal

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._whole if kind == 1 else Queues()

    def cuDevSmResourceSplitByCount(  # noqa: N802
        self, groups: int, resource: Sms, flags: int, least: int
    ) -> tuple[Any, ...]:
        self.num_splits += 1
        size = -(-max(least, 1) // self._granule) * self._granule
        ids = sorted(resource.ids)
        found = min(groups, len(ids) // size)
        parts = [
            Sms(frozenset(ids[i * size : (i + 1) * size]), self.num_splits) for i in range(found)
        ]
        return OK, parts, found, Sms(frozenset(ids[found * size :]), self.num_splits)

    def cuDevResourceGenerateDesc(  # noqa: N802
        self, resources: list[Any], number: int
    ) -> tuple[Any, ...]:
        sms = [resource for resource in resources if isinstance(resource, Sms)]
        queues = tuple(resource for resource in resources if isinstance(resource, Queues))
        ids = frozenset().union(*(part.ids for part in sms))
        if number != len(resources) or len({part.split for part in sms}) != 1 or not ids:
            return CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, None
        return OK, Context(Sms(ids), queues)

    def cuGreenCtxCreate(  # noqa: N802
        self, descriptor: Context, device: int, flags: int
    ) -> tuple[Any, ...]:
        if self._note("cuGreenCtxCreate"):
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        assert flags == 1
        self.contexts.add(descriptor)
        return OK, descriptor

    def cuGreenCtxDestroy(self, context: Context) -> tuple[Any, ...]:  # noqa: N802
        assert not any(owner is context for owner, _ in self.streams.values()), "streams leak"
        self.contexts.remove(context)
        return (OK,)

    def cuGreenCtxStreamCreate(  # noqa: N802
        self, context: Context, flags: int, priority: int
    ) -> tuple[Any, ...]:
        if self._note("cuGreenCtxStreamCreate"):
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        if flags != 1 or context not in self.contexts:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        handle = next(self._ids)
        self.streams[handle] = (context, priority)
        return OK, handle

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        del self.streams[stream]
        return (OK,)

    def cuGreenCtxGetDevResource(  # noqa: N802
        self, context: Context, kind: int
    ) -> tuple[Any, ...]:
        return OK, context.sms

    def cuMemGetAddressRange(self, pointer: int) -> tuple[Any, ...]:  # noqa: N802
        """Allocations of a mebibyte."""
        return OK, pointer >> 20 << 20, 1 << 20

    def cuIpcGetMemHandle(self, base: int) -> tuple[Any, ...]:  # noqa: N802
        handle = Handle()
        ctypes.memmove(handle.getPtr(), base.to_bytes(64, "little"), 64)
        return OK, handle

    def cuIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[Any, ...]:  # noqa: N802
        data = ctypes.string_at(handle.getPtr(), 64)
        if flags != 1 or data in self.opened:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        self.opened.append(data)
        return OK, int.from_bytes(data, "little")

    def cuIpcCloseMemHandle(self, base: int) -> tuple[Any, ...]:  # noqa: N802
        self.opened.remove(base.to_bytes(64, "little"))
        return (OK,)
