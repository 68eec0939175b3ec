"""The memory of a unit on a device: arena and slot tables there, host blocks where it can reach.

The same ideas as muxrt.worker.kv_storage on another kind of memory. `torch.device("cpu")` is a
device too: then nothing is pinned, and copies wait.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt.engine.build import UnitPlan
from muxrt.errors import MuxrtError
from muxrt.kernels import KvCache
from muxrt.sched.queues import ServedModel
from muxrt.worker.kv_storage import Segment, block_columns, view_arena

ARENA = ""  # no model is named so

# Memory of a name and a size in bytes, 1-D uint8 on the device.
Allocate = Callable[[str, int], Tensor]


def own_memory(device: torch.device) -> Allocate:
    """Memory that this process owns; the arena as it comes, slot tables zeroed."""

    def allocate(name: str, num_bytes: int) -> Tensor:
        make = torch.empty if name == ARENA else torch.zeros
        return make(num_bytes, dtype=torch.uint8, device=device)

    return allocate


def upload(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """`array` on the device, behind what the current stream does; the host does not wait."""
    host = torch.tensor(array, pin_memory=device.type == "cuda")  # a copy, in either case
    # torch keeps pinned memory until the streams that copy from it are past it.
    return host.to(device, non_blocking=True)


class Blocks(NamedTuple):
    """Whole groups that go into a slot's block table from group `first_group` on."""

    slot: int
    first_group: int
    ids: npt.NDArray[np.int32]


class DeviceSlots:
    """What the device knows of one model's sequences, by slot: their tokens and their blocks.

    Every write goes to the current stream, behind what was launched before.
    """

    def __init__(self, model: ServedModel, memory: Tensor, unscored: npt.NDArray[np.int32]) -> None:
        """memory [num_bytes] uint8 on the device; unscored [slots] in the host's memory."""
        slots, width, columns = model.max_sequences, model.max_model_len + 1, block_columns(model)
        ints = memory.view(torch.int32)
        end = (slots + 1) * width
        # The last row is no sequence's: what the padding of a batch draws goes there.
        self.tokens = ints[:end].view(slots + 1, width)
        self.block_table = ints[end : end + slots * columns].view(slots, columns)
        # The next prompt position whose logprobs were not reported.
        self.unscored = unscored
        self._blocks_per_group = model.layout.blocks_per_group

    @staticmethod
    def num_bytes(model: ServedModel) -> int:
        """Of `memory`."""
        tokens = (model.max_sequences + 1) * (model.max_model_len + 1)
        return 4 * (tokens + model.max_sequences * block_columns(model))

    @property
    def scratch(self) -> int:
        """The slot of padding."""
        return len(self.tokens) - 1

    def open(self, slot: int, tokens: npt.NDArray[np.int32]) -> None:
        """The slot starts a new sequence. tokens [prompt_tokens]."""
        self.tokens[slot, : len(tokens)].copy_(upload(tokens, self.tokens.device))
        self.unscored[slot] = 1  # nothing predicts the first token

    def append(self, new: Iterable[Blocks]) -> None:
        """Put new blocks into the table, all in one copy."""
        parts = [part for part in new if len(part.ids)]
        if not parts:
            return
        columns = self.block_table.shape[1]
        begins = (p.slot * columns + p.first_group * self._blocks_per_group for p in parts)
        places = [begin + np.arange(len(p.ids)) for begin, p in zip(begins, parts, strict=True)]
        ids = np.concatenate([part.ids for part in parts])
        pair = upload(np.stack((np.concatenate(places), ids)), self.tokens.device)
        self.block_table.view(-1).index_copy_(0, pair[0], pair[1].int())


class DeviceStorage:
    """All KV memory of one unit that is on a device."""

    def __init__(
        self,
        plan: UnitPlan,
        device: torch.device,
        allocate: Allocate | None = None,
        unscored: dict[str, Segment] | None = None,
    ) -> None:
        """Reserve what `plan` says.

        A process that computes with another's memory has it from `allocate` and `unscored`; host
        blocks are the owner's only. Raises MuxrtError where there is too little memory.
        """
        self.device = device
        self._plan = plan
        is_owner = allocate is None
        allocate = allocate or own_memory(device)
        block_bytes = plan.arena.block_bytes
        self.arena = allocate(ARENA, plan.num_blocks * block_bytes)
        self.unscored = unscored or {
            name: Segment(4 * model.max_sequences) for name, model in plan.models.items()
        }
        self.memory = {
            name: allocate(name, DeviceSlots.num_bytes(model))
            for name, model in plan.models.items()
        }
        self.slots = {
            name: DeviceSlots(
                model, self.memory[name], self.unscored[name].tensor(torch.int32).numpy()
            )
            for name, model in plan.models.items()
        }
        self._host = Segment(plan.num_host_blocks * block_bytes if is_owner else 0, is_private=True)
        self.host = self._host.tensor()
        if device.type == "cuda" and len(self.host):
            _cuda(torch.cuda.cudart().cudaHostRegister(self.host.data_ptr(), len(self.host), 0))

    def kv_cache(self, model: str) -> KvCache:
        """The model's view of the arena."""
        return view_arena(self._plan, model, self.arena, self.slots[model].block_table)

    def close(self) -> None:
        """Give everything back; nothing may run that uses it."""
        if self.device.type == "cuda" and len(self.host):
            _cuda(torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr()))
        nothing = torch.empty(0, dtype=torch.uint8)
        self.arena = self.host = nothing
        self.memory, self.slots = {}, {}
        self._host.close()
        for segment in self.unscored.values():
            segment.close()


def _cuda(code: Any) -> None:
    if int(code):  # the enumeration itself is always true
        raise MuxrtError(f"host blocks cannot be pinned: CUDA error {int(code)}")
