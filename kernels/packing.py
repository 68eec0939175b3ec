"""Weights of a linear layer as the kernels read them: panels of 64 output features, depth first."""

import mmap
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

PANEL = 64  # output features of a panel
HUGE_BYTES = 2 << 20  # of a huge page of x86 and of ARM with small pages of 4 KiB
LARGEST = 127  # of int8 weights: symmetric, so that -w has the same error as w


@dataclass(frozen=True, slots=True)
class Packed:
    """x @ weight.T + bias, packed; `parts` equal pieces of the weight, each with its own panels."""

    data: Tensor  # [parts * panels of a part * depth * 64] float32, bfloat16 or int8
    scales: Tensor | None  # [features] float32: what int8 weights are multiplied by
    bias: Tensor | None  # [features] float32
    features: int
    depth: int
    parts: int = 1

    @property
    def panels(self) -> int:
        """Of one part."""
        return num_panels(self.features // self.parts)


def num_panels(features: int) -> int:
    return -(-features // PANEL)


def packed_elems(features: int, depth: int, parts: int = 1) -> int:
    """Elements of `Packed.data`, the padding of each part's last panel included."""
    return parts * num_panels(features // parts) * PANEL * depth


def pack_into(data: Tensor, weight: Tensor, parts: int = 1) -> Tensor | None:
    """Fill `data` with a weight [features, depth]; the scales if `data` is int8, else None.

    int8 is weight-only and symmetric with one scale per output feature: the largest weight of a
    feature is 127 steps, so an error is at most half a step.
    """
    scales = None
    if data.dtype == torch.int8:
        weight = weight.float()
        scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        weight = (weight / scales[:, None]).round()
    features, depth = weight.shape
    size = features // parts
    panels = data.view(parts, num_panels(size), depth, PANEL)
    for part in range(parts):
        rows = weight[part * size : (part + 1) * size]
        whole = size // PANEL
        panels[part, :whole] = rows[: whole * PANEL].view(whole, PANEL, depth).transpose(1, 2)
        if whole < len(panels[part]):
            panels[part, whole].zero_()
            panels[part, whole, :, : size - whole * PANEL] = rows[whole * PANEL :].T
    return scales


def unpack(packed: Packed) -> Tensor:
    """The weight [features, depth] float32, as the kernels see it."""
    panels = packed.data.view(packed.parts, packed.panels, packed.depth, PANEL).float()
    rows = panels.transpose(2, 3).reshape(packed.parts, packed.panels * PANEL, packed.depth)
    weight = rows[:, : packed.features // packed.parts].reshape(packed.features, packed.depth)
    return weight if packed.scales is None else weight * packed.scales[:, None]


def map_pages(num_bytes: int) -> mmap.mmap:
    """Zeroed memory of this process, in huge pages where the system has them.

    Whole ones: Linux (6.7 and later) begins those of no other size where a huge page may begin.
    """
    if num_bytes > HUGE_BYTES:
        num_bytes = -(-num_bytes // HUGE_BYTES) * HUGE_BYTES
    pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class Pages:
    """A range of zeroed memory that tensors are carved from."""

    ALIGNMENT = 64  # bytes: a cache line, and the widest vector load

    def __init__(self, num_bytes: int) -> None:
        self._map = map_pages(num_bytes)
        self._used = 0

    @classmethod
    def rounded(cls, num_bytes: int) -> int:
        """What a tensor of this size takes."""
        return -(-num_bytes // cls.ALIGNMENT) * cls.ALIGNMENT

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next piece of the memory, which lives as long as its last tensor."""
        count = prod(shape)
        begin = self._used
        self._used += self.rounded(count * dtype.itemsize)
        return torch.frombuffer(self._map, dtype=dtype, offset=begin, count=count).view(shape)
