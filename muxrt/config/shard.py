"""What a tensor-parallel rank holds of a model: ranges of heads, of the MLP, of the vocabulary.

As Megatron-LM cuts a transformer (Shoeybi et al. 2019, section 3): queries, keys, values, gate and
up by their outputs, o and down by their inputs, embedding and head by the vocabulary.
"""

from dataclasses import dataclass, replace

from muxrt.config.model import ModelShape
from muxrt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of rank `rank` of `size`; parts of a model differ by one head or row at most."""

    rank: int = 0
    size: int = 1

    def kv_heads(self, shape: ModelShape) -> range:
        """Of all kv heads; where there are fewer than ranks, several ranks hold the same one."""
        kv_heads = shape.num_kv_heads
        if kv_heads >= self.size:
            return part_of(kv_heads, self.rank, self.size)
        head = self.rank // (self.size // kv_heads)
        return range(head, head + 1)

    def heads(self, shape: ModelShape) -> range:
        """Of all heads: those that attend to this rank's kv heads, or a part of them."""
        group, held = shape.num_heads // shape.num_kv_heads, self.kv_heads(shape)
        if shape.num_kv_heads >= self.size:
            return range(held.start * group, held.stop * group)
        copies = self.size // shape.num_kv_heads
        part = part_of(group, self.rank % copies, copies)
        return range(held.start * group + part.start, held.start * group + part.stop)

    def intermediate(self, shape: ModelShape) -> range:
        """Of the MLP's intermediate features."""
        return part_of(shape.intermediate_size, self.rank, self.size)

    def vocab(self, shape: ModelShape) -> range:
        """Of the rows of embedding and head."""
        return part_of(shape.vocab_size, self.rank, self.size)

    def of(self, shape: ModelShape) -> ModelShape:
        """What the rank's layers look like; the vocabulary stays whole."""
        if self.size == 1:
            return shape
        return replace(
            shape,
            num_heads=len(self.heads(shape)),
            num_kv_heads=len(self.kv_heads(shape)),
            intermediate_size=len(self.intermediate(shape)),
        )


def check_split(model: str, shape: ModelShape, size: int) -> None:
    """Raise ConfigError where `size` ranks cannot each hold a part of the model."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    if kv_heads < size and (size % kv_heads or heads // kv_heads < size // kv_heads):
        raise ConfigError(
            f"{model} cannot be cut over {size} ranks: found {heads} heads and {kv_heads} kv heads,"
            f" expected at least {size} kv heads, or a divisor of {size} of them with a head for"
            " every rank"
        )


def part_of(count: int, rank: int, size: int) -> range:
    """One of `size` contiguous parts of [0, count); the larger ones come last.

    The first rank has the sampling to do.
    """
    return range(count * rank // size, count * (rank + 1) // size)
