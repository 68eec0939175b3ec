"""What a program can do on CPU cores: each method appends the stages of one operation."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt.kernels import (
    amx,
    cpu_attention,
    cpu_checksum,
    cpu_linear,
    cpu_linear_amx,
    cpu_meet,
    cpu_rows,
    cpu_sampling,
)
from muxrt.kernels.jit import STAGES, compile_for
from muxrt.kernels.packing import Packed
from muxrt.kernels.panel import ROWS, WIDE
from muxrt.kernels.program import TILES, TOKENS, Program, run_stages
from muxrt.kernels.team import Team
from muxrt.kernels.types import KvCache, MetaArrays

Array = npt.NDArray[Any]

# Below this a second thread costs more than it saves: a hand-off takes as long as going over these
# many floats (scripts/bench_kernels.py).
SHARED_FLOATS = 64 * 1024
FEW_ROWS = 4  # rows that a thread takes at least: a row of a norm takes as long as asking for it
_NOTHING = np.zeros(1, dtype=np.uint8)  # the data of stages that have none

_SIGNATURES: dict[Callable[..., Any], list[str]] = {
    run_stages: ["(int64, int64, int64[:, ::1], int64[::1], int64[::1], int64)"],
    cpu_attention.num_tiles: ["(int32[::1], int64, int64)"],
    cpu_sampling.draw: [
        "(int64, int64, float32[:, ::1], float64[::1], int64[::1], float64[::1], float64[::1],"
        " float64[::1], int64[::1])"
    ],
    cpu_checksum.checksum: ["(uint64[::1], int32[::1], int64)"],
    cpu_meet.meet: ["(int64[::1], int64, int64, int64, int64)"],
    cpu_rows.copy_blocks: ["(int64, int64, uint8[::1], uint8[::1], int32[::1], int32[::1], int64)"],
}


@cache
def warm_up() -> None:
    """Compile every kernel for every type it is called with, or read it from disk.

    Takes half a minute once per machine and version, then about half a second per process.
    Afterwards no call compiles anything.
    """
    for function, signatures in _SIGNATURES.items():
        compile_for(function, signatures)
    unusable = () if amx.is_usable() else cpu_linear_amx.STAGES
    for stage in STAGES:
        if stage not in unusable:
            stage.compile()


class CpuProgram(Program):
    """A program for batches of at most `max_tokens` new tokens, in any number of sequences.

    Linear layers of a prefill are multiplied by the cores' AMX unit where there is one: faster from
    some 40 rows on (float32) or 10 (narrower weights), and the same but for rounding.
    """

    def __init__(self, team: Team, max_tokens: int, is_prefill: bool = False) -> None:
        warm_up()
        super().__init__(team)
        self.max_tokens = max_tokens
        self._ids, self._positions = np.zeros((2, max_tokens), dtype=np.int64)
        self._slots, self._starts, self._owners = np.zeros((3, max_tokens), dtype=np.int32)
        self._query_starts = np.zeros(max_tokens + 1, dtype=np.int32)
        self._tile_queries = 1
        self._uses_amx = is_prefill and amx.is_usable()
        self._planes: dict[int, Array] = {}  # by depth

    # -- recording ---------------------------------------------------------------------------

    def floats(self, width: int) -> Array:
        """A buffer [max_tokens, width] float32 that operations read and write."""
        return torch.empty((self.max_tokens, width)).numpy()

    def embed(self, table: Tensor | Packed, out: Array) -> None:
        """out = the rows of the batch's token ids; table [vocab, width], or a packed head."""
        packed = isinstance(table, Packed)
        data = _array(table.data if isinstance(table, Packed) else table)
        args = {"ids": self._ids, "width": out.shape[1], "in_panels": int(packed), "out": out}
        self.add(cpu_rows.embed, args, data, 1, TOKENS, FEW_ROWS)

    def rms_norm(self, x: Array, weight: Tensor, eps: float, out: Array) -> None:
        """out = x / rms(x) * weight, row by row; x, out [tokens, width], weight [width]."""
        args = {"x": x, "weight": weight.numpy(), "width": x.shape[1], "eps": eps, "out": out}
        self.add(cpu_rows.rms_norm, args, _NOTHING, 1, TOKENS, FEW_ROWS)

    def linear(self, x: Array, layer: Packed, out: Array) -> None:
        """out [tokens, features] = x W + bias."""
        self._linear(x, layer, out, cpu_linear.STORE)

    def add_linear(self, x: Array, layer: Packed, out: Array) -> None:
        """out += x W + bias: the residual stream."""
        self._linear(x, layer, out, cpu_linear.ADD)

    def linear_silu_mul(self, x: Array, layer: Packed, out: Array) -> None:
        """out [tokens, features / 2] = silu(gate) * up of gate, up = x W + bias, gate first."""
        self._linear(x, layer, out, cpu_linear.SILU_MUL)

    def attention(
        self,
        qkv: Array,
        kv: KvCache,
        layer: int,
        out: Array,
        *,
        rope: tuple[Tensor, Tensor],
        norms: tuple[Tensor | None, Tensor | None] = (None, None),
        eps: float = 0.0,
        scale: float,
    ) -> None:
        """Norm heads (if given), rotate q and k, store k and v, attend causally to all tokens.

        qkv [tokens, (heads + 2 * kv_heads) * head_dim], q and k change in place; out [tokens,
        heads * head_dim]; rope: cos, sin [positions, head_dim / 2]. Raises ValueError for a
        shape that has no kernel.
        """
        heads = out.shape[1] // kv.head_dim
        if heads > WIDE * kv.num_kv_heads or kv.head_dim % ROWS:
            raise ValueError(f"no kernel for {heads}/{kv.num_kv_heads} heads of {kv.head_dim}")
        arena, table, block_tokens, blocks_per_group, planes_per_block = kv.arrays
        self._tile_queries = max(1, WIDE * kv.num_kv_heads // heads)
        q_norm, k_norm = (norm if norm is None else norm.numpy() for norm in norms)
        cos, sin = (angles.numpy() for angles in rope)
        args = {
            "qkv": qkv,
            "out": out,
            "heads": heads,
            "kv_heads": kv.num_kv_heads,
            "head_dim": kv.head_dim,
            "block_tokens": block_tokens,
            "blocks_per_group": blocks_per_group,
            "planes_per_block": planes_per_block,
            "layer": layer,
            "scale": scale,
            "table": table,
            "columns": table.shape[1],
            "slots": self._slots,
            "starts": self._starts,
            "query_starts": self._query_starts,
            "positions": self._positions,
            "owners": self._owners,
            "cos": cos,
            "sin": sin,
            "q_norm": q_norm,
            "k_norm": k_norm,
            "eps": eps,
            "tile_queries": self._tile_queries,
        }
        self.add(cpu_attention.rotate_and_store, args, arena, 1, TOKENS, FEW_ROWS)
        self.add(cpu_attention.attend, args, arena, kv.num_kv_heads, TILES)

    def _linear(self, x: Array, layer: Packed, out: Array, mode: int) -> None:
        width = layer.features // layer.parts
        assert x.shape[1] == layer.depth and out.shape[1] == width, "shapes do not fit"
        stage, block_rows = cpu_linear.linear, cpu_linear.ROWS
        if self._uses_amx:
            stage, block_rows = cpu_linear_amx.linear_amx, cpu_linear_amx.rows_at_once(layer.depth)
            x = self._split(x)
        args = {
            "rows": self.counts[TOKENS:],
            "block_rows": block_rows,
            "x": x,
            "depth": layer.depth,
            "out": out,
            "width": width,
            "scales": None if layer.scales is None else layer.scales.numpy(),
            "bias": None if layer.bias is None else layer.bias.numpy(),
            "mode": mode,
            "panels": layer.panels,
        }
        self.add(stage, args, _array(layer.data), layer.panels, TOKENS, per=block_rows)

    def _split(self, x: Array) -> Array:
        """The parts of x for the linear layer that follows; layers of equal depth share memory."""
        depth = x.shape[1]
        if depth not in self._planes:
            elems = cpu_linear_amx.plane_elems(self.max_tokens, depth)
            self._planes[depth] = torch.zeros(elems, dtype=torch.uint16).numpy()
        planes = self._planes[depth]
        args = {"rows": self.counts[TOKENS:], "x": x, "depth": depth, "planes": planes}
        self.add(cpu_linear_amx.split_rows, args, _NOTHING, 1, TOKENS, per=amx.TILE_ROWS)
        return planes

    # -- running -----------------------------------------------------------------------------

    def run_rows(self, num_rows: int) -> None:
        """Run over the first rows of the buffers: no tokens, no cache."""
        self.counts[TOKENS] = num_rows
        self.run()

    def set_batch(self, tokens: Array, meta: MetaArrays) -> None:
        """The next run is of tokens [T] of the sequences that `meta` describes, T <= max_tokens."""
        slots, starts, query_starts, positions, owners = meta
        num_tokens, num_sequences = len(tokens), len(slots)
        self._ids[:num_tokens] = tokens
        self._positions[:num_tokens] = positions
        self._owners[:num_tokens] = owners
        self._slots[:num_sequences] = slots
        self._starts[:num_sequences] = starts
        self._query_starts[: num_sequences + 1] = query_starts
        self.counts[TOKENS] = num_tokens
        self.counts[TILES] = cpu_attention.num_tiles(
            self._query_starts, num_sequences, self._tile_queries
        )

    def run_batch(self, tokens: Array, meta: MetaArrays) -> None:
        """Run over all of a batch; see `set_batch`."""
        self.set_batch(tokens, meta)
        self.run()


def copy_blocks(
    src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor, block_bytes: int
) -> None:
    """Block `src_ids[i]` of one arena becomes block `dst_ids[i]` of another, byte by byte.

    src, dst 1-D of any dtype; ids [N] int32, each dst id at most once.
    """
    arenas = (src.view(torch.uint8).numpy(), dst.view(torch.uint8).numpy())
    ids = (src_ids.numpy(), dst_ids.numpy())
    cpu_rows.copy_blocks(0, len(src_ids), *arenas, *ids, block_bytes)


def checksum(arena: Tensor, ids: Tensor, block_bytes: int) -> int:
    """Of the blocks `ids` [N] int32 of an arena, one after the other, below 2^63.

    Raises ValueError where blocks are no multiple of 64 bytes.
    """
    if block_bytes % (8 * cpu_checksum.LANES):
        raise ValueError(f"found blocks of {block_bytes} bytes, expected a multiple of 64")
    data = arena.view(torch.uint8)
    words = data[: data.numel() // 8 * 8].numpy().view(np.uint64)
    return int(cpu_checksum.checksum(words, ids.numpy(), block_bytes // 8)) >> 1


def sample(
    logits: Tensor,
    temperatures: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    numbers: Array,
    team: Team,
) -> Array:
    """A token per row: the best at temperature 0, else drawn by the row's number in [0, 1).

    logits [N, vocab] float32; the others [N]: temperature, top-k (0 = off), top-p, min-p. Filters
    apply in that order, ties with the last token that stays stay too, and the token is the first
    whose cumulated probability IN ORDER OF TOKEN ID exceeds number x mass. -> [N] int64, -1 where
    the logits are not finite.
    """
    tokens = np.empty(len(logits), dtype=np.int64)
    params = (temperatures, top_k, top_p, min_p, numbers)
    columns = [np.ascontiguousarray(column) for column in params]
    draw: Callable[..., Any] = cpu_sampling.draw
    if logits.numel() < SHARED_FLOATS:
        draw(0, len(logits), logits.numpy(), *columns, tokens)
    else:
        team.run(draw, len(logits), logits.numpy(), *columns, tokens)
    return tokens


def _array(tensor: Tensor) -> Array:
    """The same memory; bfloat16 as uint16, for which numpy has no name."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
