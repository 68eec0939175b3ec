"""Plane, block and group arithmetic: pure numbers, no memory.

A plane is K and V of ONE kv head of ONE layer for `block_tokens` tokens: [2, block_tokens,
head_dim], K first. All planes of a unit have the same bytes, a block is `planes_per_block`
consecutive planes of a sequence in layer-major order (plane index = layer * kv_heads + head), so
any free block serves any model of the unit (MuxServe's head-wise cache; 1 plane per block is the
paper's granularity).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from muxrt.errors import ConfigError

MAX_PLANES_PER_BLOCK = 16
MAX_WASTE = 0.01


@dataclass(frozen=True, slots=True)
class KvShape:
    """What the KV cache needs to know of a model."""

    model: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int

    @property
    def num_planes(self) -> int:
        """Planes a block group must hold."""
        return self.num_layers * self.num_kv_heads

    @property
    def token_plane_bytes(self) -> int:
        """Bytes of K and V of one token in one plane."""
        return 2 * self.head_dim * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """How one model uses the unit's blocks."""

    shape: KvShape
    block_tokens: int
    blocks_per_group: int

    def num_groups(self, num_tokens: int) -> int:
        """Groups that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_tokens)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return self.num_groups(num_tokens) * self.blocks_per_group


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """The geometry of one unit's arena."""

    plane_bytes: int
    planes_per_block: int
    models: dict[str, ModelLayout]

    @property
    def block_bytes(self) -> int:
        return self.plane_bytes * self.planes_per_block

    def locate(self, model: str, layer: int, head: int) -> tuple[int, int]:
        """(index of the block within a group, index of the plane within that block)."""
        plane = layer * self.models[model].shape.num_kv_heads + head
        return divmod(plane, self.planes_per_block)


def plan_arena(
    shapes: Sequence[KvShape], plane_tokens: int, planes_per_block: int | None = None
) -> ArenaLayout:
    """Choose the unit's plane and block size.

    `plane_tokens` is how many tokens a plane holds for the model with the widest token row;
    narrower rows hold more. Raises ConfigError where a row does not divide the plane.
    """
    if not shapes:
        raise ConfigError("a unit needs at least one model")
    widest = max(shapes, key=lambda shape: shape.token_plane_bytes)
    plane_bytes = widest.token_plane_bytes * plane_tokens
    chosen = planes_per_block or _widest_block(shapes)
    layouts = {shape.model: _model_layout(shape, widest, plane_bytes, chosen) for shape in shapes}
    return ArenaLayout(plane_bytes, chosen, layouts)


def _model_layout(
    shape: KvShape, widest: KvShape, plane_bytes: int, planes_per_block: int
) -> ModelLayout:
    tokens, rest = divmod(plane_bytes, shape.token_plane_bytes)
    if rest:
        raise ConfigError(
            f"{shape.model} and {widest.model} cannot share an arena: a plane of {plane_bytes}"
            f" bytes ({widest.model}) is not a whole number of rows of {shape.token_plane_bytes}"
            f" bytes (2 x head_dim {shape.head_dim} x {shape.dtype_bytes} bytes)"
        )
    return ModelLayout(shape, tokens, -(-shape.num_planes // planes_per_block))


def _widest_block(shapes: Sequence[KvShape]) -> int:
    """The largest power of two <= 16 that wastes <= 1 % of every model's group."""
    size = MAX_PLANES_PER_BLOCK
    while size > 1 and any(_waste(shape, size) > MAX_WASTE for shape in shapes):
        size //= 2
    return size


def _waste(shape: KvShape, planes_per_block: int) -> float:
    held = -(-shape.num_planes // planes_per_block) * planes_per_block
    return 1 - shape.num_planes / held
