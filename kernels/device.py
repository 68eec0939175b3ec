"""What a GPU has, and the sizes that kernels take from it: pure functions of a chip's figures."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from muxrt.kernels.types import KvCache


@dataclass(frozen=True, slots=True)
class Chip:
    """The figures of a GPU that sizes depend on."""

    sm_count: int
    shared_bytes: int  # the most a program may have
    shared_bytes_per_sm: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How an attention kernel is cut and run."""

    rows: int  # of queries, heads of a group included, that a program takes
    tokens: int  # of K and V per iteration
    stages: int  # iterations whose loads are under way at a time
    warps: int

    def shared_bytes(self, head_dim: int, dtype_bytes: int, kv_bytes: int) -> int:
        """Of a program: its queries, and K and V of the iterations under way."""
        per_dim = self.rows * dtype_bytes + 2 * self.tokens * self.stages * kv_bytes
        return _power_of_two(head_dim) * per_dim


INTERPRETED = Chip(
    sm_count=1, shared_bytes=96 << 10, shared_bytes_per_sm=96 << 10, capability=(9, 0)
)
MOST_SPLITS = 64  # the second stage reads them all at once


@cache
def chip_of(device: torch.device) -> Chip:
    """The figures of a CUDA device; of a CPU, where Triton interprets, a small chip's."""
    if device.type != "cuda":
        return INTERPRETED
    properties: Any = torch.cuda.get_device_properties(device)
    return Chip(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        (properties.major, properties.minor),
    )


def check_kv_dtype(chip: Chip, dtype: torch.dtype) -> None:
    """Raises ValueError where the chip cannot convert the arena's numbers: float8 came with Ada."""
    if dtype == torch.float8_e4m3fn and chip.capability < (8, 9):
        major, minor = chip.capability
        raise ValueError(
            f"found float8 KV on a GPU of capability {major}.{minor}, expected 8.9 or newer"
        )


def decode_tiling(chip: Chip, head_dim: int, group: int, kv_bytes: int) -> Tiling:
    """For one new token per sequence; `group` q heads per kv head, `kv_bytes` an element of K.

    Two programs or more find room on an SM, so that one loads while another computes.
    """
    rows = 1 if group == 1 else max(16, _power_of_two(group))  # 16: the least that tl.dot takes
    tokens = 64
    pair = 2 * tokens * _power_of_two(head_dim) * kv_bytes
    stages = max(1, min(4, chip.shared_bytes_per_sm // 2 // pair))
    return Tiling(rows, tokens, stages, warps=4)


def prefill_tiling(
    chip: Chip, head_dim: int, group: int, dtype_bytes: int, kv_bytes: int
) -> Tiling:
    """For any number of new tokens: as large as shared memory lets q, K and V be together.

    float32 is multiplied in parts (tl.dot's tf32x3), which lie there too.
    """
    parts = 2 if dtype_bytes == 4 else 1
    for rows, tokens, stages, warps in (
        (128, 128, 3, 8),
        (128, 64, 3, 8),
        (128, 64, 2, 8),
        (64, 64, 2, 4),
        (64, 32, 2, 4),
    ):
        tiling = Tiling(rows, tokens, stages, warps)
        needed = tiling.shared_bytes(head_dim, dtype_bytes, kv_bytes)
        if needed * parts <= chip.shared_bytes and rows >= _power_of_two(group):
            return tiling
    return Tiling(max(16, _power_of_two(group)), 32, 1, 4)


def decode_splits(
    sm_count: int, programs_per_sm: int, num_sequences: int, num_kv_heads: int, max_tiles: int
) -> int:
    """Parts that a sequence's K and V are cut into so that a lane of `sm_count` SMs is full.

    Flash-Decoding (Dao, Haziza, Massa, Sizov 2023). `max_tiles`: iterations of the longest one.
    """
    programs = num_sequences * num_kv_heads
    wanted = -(-sm_count * programs_per_sm // programs)
    return max(1, min(wanted, max_tiles, MOST_SPLITS))


def programs_per_sm(chip: Chip, tiling: Tiling, head_dim: int, kv_bytes: int) -> int:
    """Programs of `decode_attention` that run on an SM at a time, by their shared memory."""
    needed = tiling.shared_bytes(head_dim, 0, kv_bytes)  # its few queries lie in registers
    return max(1, min(8, chip.shared_bytes_per_sm // needed))


def _power_of_two(number: int) -> int:
    """The least one that is not below `number`."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch memory of `decode_attention` for a largest batch, and how its work is cut."""

    splits: int  # parts per sequence
    tiling: Tiling
    parts: Tensor  # [sequences, heads, splits, head_dim] float32: results of parts, normalised
    weights: Tensor  # [sequences, heads, splits] float32: log2 of their sums of exponents


def decode_workspace(
    kv: KvCache, num_heads: int, num_sequences: int, max_tokens: int, sm_count: int
) -> DecodeWorkspace:
    """For batches of `num_sequences` (padding included) that hold at most `max_tokens` tokens each.

    `sm_count`: of the lane. Layers share it, and so may models that decode one after the other on
    one stream.
    """
    chip = chip_of(kv.arena.device)
    kv_bytes = kv.arena.itemsize
    tiling = decode_tiling(chip, kv.head_dim, num_heads // kv.num_kv_heads, kv_bytes)
    splits = decode_splits(
        sm_count,
        programs_per_sm(chip, tiling, kv.head_dim, kv_bytes),
        num_sequences,
        kv.num_kv_heads,
        -(-max_tokens // tiling.tokens),
    )
    stored = 0 if splits == 1 else num_sequences
    shape = (stored, num_heads, splits)
    parts = torch.empty(*shape, kv.head_dim, dtype=torch.float32, device=kv.arena.device)
    return DecodeWorkspace(splits, tiling, parts, parts.new_empty(shape))
