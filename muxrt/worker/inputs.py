"""What a batch tells the device, in one piece of memory: one copy per batch, whatever it holds."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt.kernels import DeviceMeta, MetaArrays
from muxrt.worker.runner import Layout

INTS = 3  # int32 fields of a draw
WORDS = 5  # its fields of 8 bytes


class Sizes(NamedTuple):
    """The largest batch that fits."""

    sequences: int
    tokens: int
    draws: int  # tokens that are drawn

    @classmethod
    def of(cls, layout: Layout, num_draws: int) -> "Sizes":
        """Of one batch."""
        return cls(len(layout.slots), len(layout.positions), num_draws)


class Draws(NamedTuple):
    """Tokens to be drawn: after which row, for which slot, at which position, and how. Each [N]."""

    rows: Tensor  # int32
    slots: Tensor  # int32
    positions: Tensor  # int32: of the token that is drawn
    temperature: Tensor  # float64
    top_p: Tensor  # float64
    min_p: Tensor  # float64
    top_k: Tensor  # int64
    seeds: Tensor  # int64: the bits of uint64


class Inputs:
    """A batch, its padding and what it draws; a host's twin is filled and copied over as a whole.

    Padding draws for the scratch slot, whatever, at position 0.
    """

    def __init__(self, sizes: Sizes, device: torch.device, is_pinned: bool = False) -> None:
        self.sizes = sizes
        num_meta = DeviceMeta.num_ints(sizes.sequences, sizes.tokens)
        num_ints = num_meta + INTS * sizes.draws
        num_ints += num_ints % 2  # the words behind them begin at a multiple of 8 bytes
        size = 4 * num_ints + 8 * WORDS * sizes.draws
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=is_pinned)
        ints = self._buffer[: 4 * num_ints].view(torch.int32)
        floats = self._buffer[4 * num_ints :].view(torch.float64).view(WORDS, sizes.draws)
        draws = ints[num_meta : num_meta + INTS * sizes.draws].view(INTS, sizes.draws)
        self.meta = DeviceMeta.over(ints, sizes.sequences, sizes.tokens)
        self.draws = Draws(*draws, *floats[:3], *floats[3:].view(torch.int64))

    def fill(
        self,
        layout: Layout,
        asking: npt.NDArray[np.int64],
        params: npt.NDArray[np.void],
        scratch: int,
    ) -> None:
        """Become this batch; in the host's memory.

        asking [draws]: the entries that draw; params [draws]: how, as `Sampling.params` has it;
        scratch: the slot of padding.
        """
        # As arrays: torch's own assignments would take several times as long.
        given = self.meta
        tensors = (given.slots, given.starts, given.query_starts)
        meta = MetaArrays(*(t.numpy() for t in (*tensors, given.positions, given.token_sequence)))
        draws = {name: column.numpy() for name, column in self.draws._asdict().items()}
        # Of padding nothing is read but what it draws for, and its ids must exist.
        self._buffer.numpy().fill(0)
        meta.slots.fill(scratch)
        draws["slots"].fill(scratch)
        meta.query_starts.fill(layout.bounds[-1])
        sequences, tokens = len(layout.slots), len(layout.positions)
        meta.slots[:sequences] = layout.slots
        meta.starts[:sequences] = layout.starts
        meta.query_starts[: sequences + 1] = layout.bounds
        meta.positions[:tokens] = layout.positions
        meta.token_sequence[:tokens] = layout.owners
        rows = layout.bounds[asking + 1] - 1
        columns = {
            "rows": rows,
            "slots": layout.slots[asking],
            "positions": layout.positions[rows] + 1,
            "seeds": params["seed"].view(np.int64),
        } | {name: params[name] for name in ("temperature", "top_p", "min_p", "top_k")}
        for name, values in columns.items():
            draws[name][: len(rows)] = values

    def copy_from(self, host: "Inputs") -> None:
        """Become a batch of the same sizes, behind what the current stream does."""
        self._buffer.copy_(host._buffer, non_blocking=True)


def download(data: Tensor) -> Tensor:
    """A copy in the host's memory, whole when what the current stream does now is over."""
    if data.device.type != "cuda":
        return data.clone()
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    return host.copy_(data, non_blocking=True)
