"""What every attention kernel is given: a model's view of the arena, and a batch as data."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int32]


class KvArrays(NamedTuple):
    """A `KvCache` in main memory as numba takes it."""

    arena: npt.NDArray[Any]  # float32, or bfloat16 as uint16: numpy has no name for it
    block_table: Ints
    block_tokens: int
    blocks_per_group: int
    planes_per_block: int


class MetaArrays(NamedTuple):
    """An `AttentionMeta` in main memory, its integers of any width."""

    slots: npt.NDArray[Any]
    starts: npt.NDArray[Any]
    query_starts: npt.NDArray[Any]
    positions: npt.NDArray[Any]
    token_sequence: npt.NDArray[Any]


@dataclass(frozen=True)
class KvCache:
    """One model's view of its unit's arena.

    Element offset of K of (layer, kv head, token t of slot s), all in int64:
        group, row = divmod(t, block_tokens)
        block, plane = divmod(layer * num_kv_heads + head, planes_per_block)
        id = block_table[s, group * blocks_per_group + block]
        offset = (id * planes_per_block + plane) * plane_elems + row * head_dim
    V of the same token lies `plane_elems // 2` further.
    """

    arena: torch.Tensor  # [arena elements], the KV dtype; shared by all models of the unit
    block_table: torch.Tensor  # [slots, max_blocks] int32, only appended to while a sequence lives
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    blocks_per_group: int
    planes_per_block: int

    @property
    def plane_elems(self) -> int:
        return 2 * self.block_tokens * self.head_dim

    @cached_property
    def arrays(self) -> KvArrays:
        """Views of the same memory, made once rather than per layer."""
        is_bfloat16 = self.arena.dtype == torch.bfloat16
        arena = self.arena.view(torch.uint16) if is_bfloat16 else self.arena
        return KvArrays(
            arena.numpy(),
            self.block_table.numpy(),
            self.block_tokens,
            self.blocks_per_group,
            self.planes_per_block,
        )


@dataclass(frozen=True)
class AttentionMeta:
    """A batch of S sequences with T new tokens in all, sequence by sequence (varlen)."""

    slots: torch.Tensor  # [S] int32: rows of `KvCache.block_table`
    starts: torch.Tensor  # [S] int32: tokens already in the cache before this batch
    query_starts: torch.Tensor  # [S + 1] int32: prefix sums of new tokens per sequence
    positions: torch.Tensor  # [T] int64: position of each new token in its sequence
    token_sequence: torch.Tensor  # [T] int32: which of the S sequences each token belongs to

    @cached_property
    def arrays(self) -> MetaArrays:
        """Views of the same memory, made once per batch rather than per layer."""
        return MetaArrays(
            self.slots.numpy(),
            self.starts.numpy(),
            self.query_starts.numpy(),
            self.positions.numpy(),
            self.token_sequence.numpy(),
        )


@dataclass(frozen=True)
class DeviceMeta:
    """A batch of up to S sequences and T new tokens on a device; its true size is on the device.

    Shapes never change, so that a captured CUDA graph can be replayed for any batch that fits.
    Sequences that are not there come last and have no tokens (`query_starts` repeats the number of
    new tokens); of them, and of rows from `query_starts[S]` on, nothing else is ever read, nothing
    is stored in the arena, and attention leaves their rows of `out` as they are.
    """

    slots: torch.Tensor  # [S] int32: rows of `KvCache.block_table`
    starts: torch.Tensor  # [S] int32: tokens already in the cache before this batch
    query_starts: torch.Tensor  # [S + 1] int32: prefix sums of new tokens per sequence
    positions: torch.Tensor  # [T] int32: position of each new token in its sequence
    token_sequence: torch.Tensor  # [T] int32: which of the S sequences each token belongs to

    @staticmethod
    def num_ints(num_sequences: int, num_tokens: int) -> int:
        """Length of the buffer that a batch of this size lies in."""
        return 3 * num_sequences + 1 + 2 * num_tokens

    @classmethod
    def over(cls, buffer: torch.Tensor, num_sequences: int, num_tokens: int) -> Self:
        """Views of `buffer` [num_ints] int32: two such buffers are copied as one."""
        sizes = (num_sequences, num_sequences, num_sequences + 1, num_tokens, num_tokens)
        return cls(*buffer[: sum(sizes)].split(sizes))

    def fill(self, meta: AttentionMeta) -> None:
        """Become this batch, padded; both in the host's memory."""
        num_sequences, num_tokens = len(meta.slots), len(meta.positions)
        if num_sequences > len(self.slots) or num_tokens > len(self.positions):
            raise ValueError(
                f"found {num_sequences} sequences with {num_tokens} tokens, expected at most "
                f"{len(self.slots)} with {len(self.positions)}"
            )
        self.slots[:num_sequences] = meta.slots
        self.starts[:num_sequences] = meta.starts
        self.query_starts[: num_sequences + 1] = meta.query_starts
        self.query_starts[num_sequences + 1 :] = num_tokens
        self.positions[:num_tokens] = meta.positions
        self.token_sequence[:num_tokens] = meta.token_sequence
