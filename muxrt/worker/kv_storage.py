"""The memory of a unit: arena, host blocks, slot tables, weights; other processes can map it.

What lane processes share is a memfd: pages without a name, inherited by descriptor, that vanish
with their last holder, however that ends. An arena that one process keeps to itself lies in huge
pages where the system has them: blocks are read in any order, and finding small pages takes a
seventh of the time. Sizes come from the plan; nothing is probed.
"""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from weakref import finalize

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt.engine.build import UnitPlan
from muxrt.kernels import HUGE_BYTES, KvCache, map_pages
from muxrt.kvcache.layout import ModelLayout
from muxrt.models.weights import TensorPlace
from muxrt.sched.queues import ServedModel
from muxrt.worker.pages import address, move_pages

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}
ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


class Segment:
    """A range of zeroed memory that processes can share; pages are taken when touched."""

    def __init__(self, num_bytes: int, fd: int | None = None, is_private: bool = False) -> None:
        """Reserve `num_bytes`, or map what another process's `fd` holds (and close `fd`).

        A private segment has no descriptor; its pages are huge where the system has such.
        """
        self.num_bytes = num_bytes
        self._is_owner = fd is None
        self._fd = -1
        self._map: mmap.mmap | None
        if is_private:
            self._map = map_pages(num_bytes)
            return
        self._fd = os.memfd_create("muxrt") if fd is None else fd
        if self._is_owner:
            self._close_fd = finalize(self, os.close, self._fd)  # though nobody calls `close`
            os.ftruncate(self._fd, max(num_bytes, 1))
        self._map = mmap.mmap(self._fd, max(num_bytes, 1))
        if not self._is_owner:
            os.close(self._fd)

    @property
    def is_private(self) -> bool:
        """No other process can map it."""
        return self._fd < 0

    @property
    def fd(self) -> int:
        """To hand to a child process; of the owner only, and not of a private segment."""
        assert self._is_owner and self._map is not None and self._fd >= 0
        return self._fd

    def tensor(self, dtype: torch.dtype = torch.uint8, offset: int = 0, count: int = -1) -> Tensor:
        """`count` elements from byte `offset` on (-1 = as many as fit), 1-D, without a copy."""
        assert self._map is not None, "the segment is closed"
        if count < 0:
            count = (self.num_bytes - offset) // dtype.itemsize
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, offset=offset, count=count)

    def view(self) -> memoryview:
        """All of it, as bytes, without a copy."""
        assert self._map is not None, "the segment is closed"
        return memoryview(self._map)[: self.num_bytes]

    def read(self, source: int, begin: int, end: int) -> int:
        """Read bytes of a file to the same place; how many, 0 behind its end. Raises OSError."""
        if self.is_private:
            with self.view() as home:
                return os.preadv(source, [home[begin:end]], begin)
        # Pages that are written through a descriptor are not zeroed before, nor found one by one.
        target = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.lseek(target, begin, os.SEEK_SET)
            return os.sendfile(target, source, begin, end - begin)
        finally:
            os.close(target)

    def discard(self, begin: int = 0, end: int | None = None) -> None:
        """Give whole pages between two bytes back (None: to the end); they read zeros, and are
        taken again when written.
        """
        assert self._map is not None, "the segment is closed"
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = len(self._map) if end is None else end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            advice = mmap.MADV_DONTNEED if self.is_private else mmap.MADV_REMOVE
            self._map.madvise(advice, begin, end - begin)

    def offer(self) -> None:
        """The system may have the pages as soon as it needs some; until then they stay.

        They hold what they held, or zeros. Pages that are shared are given back at once.
        """
        assert self._map is not None, "the segment is closed"
        if self.is_private:
            self._map.madvise(mmap.MADV_FREE)
        else:
            self.discard()

    def take_pages(
        self, begin: int, other: "Segment", other_begin: int = 0, other_end: int | None = None
    ) -> int:
        """Make pages of another private segment ours, from byte `begin` on; how many bytes.

        Those that lie between two bytes of it (None: to its end). What they hold comes with them;
        there they are gone. 0 where pages cannot change hands.
        """
        assert self._map is not None and other._map is not None, "a segment is closed"
        other_end = len(other._map) if other_end is None else other_end
        other_begin = -(-other_begin // HUGE_BYTES) * HUGE_BYTES
        num_bytes = min(len(self._map) - begin, other_end - other_begin) // HUGE_BYTES * HUGE_BYTES
        if not (self.is_private and other.is_private) or num_bytes <= 0:
            return 0
        return move_pages(address(other._map) + other_begin, address(self._map) + begin, num_bytes)

    def close(self) -> None:
        """Give all pages back now; tensors that still look at them read zeros."""
        if self._map is None:
            return
        # Unmapping must wait for the last tensor, but the pages need not.
        if self._fd < 0:
            self._map.madvise(mmap.MADV_DONTNEED)
        elif self._is_owner:
            self._map.madvise(mmap.MADV_REMOVE)
            self._close_fd()
        self._map = None


class SlotTable:
    """What a device knows of one model's sequences, by slot: their tokens and their blocks."""

    def __init__(self, model: ServedModel, segment: Segment) -> None:
        self._segment = segment
        slots, columns = model.max_sequences, block_columns(model)
        width = model.max_model_len + 1
        ints = segment.tensor(torch.int32)
        ends = np.cumsum([slots * width, slots * columns, slots]).tolist()
        self.tokens: npt.NDArray[np.int32] = ints[: ends[0]].view(slots, width).numpy()
        self.block_table = ints[ends[0] : ends[1]].view(slots, columns)
        # The next prompt position whose logprobs were not reported: a prompt that is computed
        # again after a preemption, on whatever lane, reports none twice.
        self.unscored: npt.NDArray[np.int32] = ints[ends[1] : ends[2]].numpy()
        self._blocks: npt.NDArray[np.int32] = self.block_table.numpy()
        self._blocks_per_group = model.layout.blocks_per_group

    @staticmethod
    def num_bytes(model: ServedModel) -> int:
        """Address space of a table; what no sequence uses takes no pages."""
        return 4 * model.max_sequences * (model.max_model_len + 2 + block_columns(model))

    def open(self, slot: int, tokens: npt.NDArray[np.int32]) -> None:
        """The slot starts a new sequence. tokens [prompt_tokens]."""
        self.tokens[slot, : len(tokens)] = tokens
        self.unscored[slot] = 1  # nothing predicts the first token

    def append(self, slot: int, first_group: int, blocks: npt.NDArray[np.int32]) -> None:
        """Put whole groups into the slot's block table from group `first_group` on."""
        begin = first_group * self._blocks_per_group
        self._blocks[slot, begin : begin + len(blocks)] = blocks

    def close(self) -> None:
        self._segment.close()


def block_columns(model: ServedModel) -> int:
    """Width of the model's block table: blocks of a sequence of maximum length."""
    return model.layout.num_blocks(model.max_model_len)


class StorageFds(msgspec.Struct, frozen=True):
    """The descriptors that a child process inherits to map the same memory."""

    arena: int
    slots: dict[str, int]  # by model


class Storage:
    """All KV memory of one unit."""

    def __init__(self, plan: UnitPlan, fds: StorageFds | None = None) -> None:
        """Reserve what `plan` says; with `fds`, map what another process reserved."""
        self._plan = plan
        block_bytes = plan.arena.block_bytes
        is_private = plan.spec.lanes.kind == "cores" and not plan.spec.has_roles
        arena_fd = fds.arena if fds else None
        num_blocks = plan.num_blocks + plan.num_spare_blocks
        self.arena = Segment(num_blocks * block_bytes, arena_fd, is_private)
        # Only the owner copies between the two.
        self.host = Segment(0 if fds else plan.num_host_blocks * block_bytes)
        self._tables = {
            name: Segment(SlotTable.num_bytes(model), fds.slots[name] if fds else None)
            for name, model in plan.models.items()
        }
        self.slots = {
            name: SlotTable(model, self._tables[name]) for name, model in plan.models.items()
        }

    @property
    def fds(self) -> StorageFds:
        return StorageFds(self.arena.fd, {name: s.fd for name, s in self._tables.items()})

    def kv_cache(self, model: str) -> KvCache:
        """The model's view of the arena."""
        return view_arena(self._plan, model, self.arena.tensor(), self.slots[model].block_table)

    def close(self) -> None:
        """Give every page back."""
        self.arena.close()
        self.host.close()
        for table in self.slots.values():
            table.close()


def view_arena(plan: UnitPlan, model: str, arena: Tensor, block_table: Tensor) -> KvCache:
    """A model's view of its unit's arena. arena [bytes] uint8, block_table [slots, columns]."""
    layout: ModelLayout = plan.models[model].layout
    shape = layout.shape
    dtype = KV_DTYPES[plan.kv_dtypes[model]]
    return KvCache(
        arena=arena[: arena.numel() // dtype.itemsize * dtype.itemsize].view(dtype),
        block_table=block_table,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_tokens=layout.block_tokens,
        blocks_per_group=layout.blocks_per_group,
        planes_per_block=plan.arena.planes_per_block,
    )


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """One copy of a model's weights that several processes compute with."""

    segment: Segment
    places: Mapping[str, TensorPlace]

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, without a copy."""
        return {name: self._tensor(place) for name, place in self.places.items()}

    def _tensor(self, place: TensorPlace) -> Tensor:
        dtype: torch.dtype = getattr(torch, place.dtype)
        flat = self.segment.tensor(dtype, place.offset, prod(place.shape))
        return flat.view(place.shape)


def share_weights(state: dict[str, Tensor], is_private: bool = False) -> SharedWeights:
    """Move tensors into one segment, one by one; `state` is emptied on the way.

    A private one is this process's alone.
    """
    places = _lay_out(state)
    num_bytes = sum(_aligned(tensor.nbytes) for tensor in state.values())
    shared = SharedWeights(Segment(num_bytes, is_private=is_private), places)
    for name, home in shared.state().items():
        home.copy_(state.pop(name))
    return shared


def _lay_out(state: Mapping[str, Tensor]) -> dict[str, TensorPlace]:
    places, offset = {}, 0
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        places[name] = TensorPlace(dtype, tuple(tensor.shape), offset)
        offset += _aligned(tensor.nbytes)
    return places


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
