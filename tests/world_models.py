"""Tiny random models as transformers publishes them, and a paged batch of sequences to run them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muxrt.config.model import ModelShape
from muxrt.kernels import AttentionMeta, KvCache, Team
from muxrt.models.llama import Llama, Session

Chunk = tuple[int, list[int]]  # slot, its new tokens

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 211,
    "max_position_embeddings": 512,
}


def publish(folder: Path, family: str, *, max_shard_size: str = "5GB", **settings: Any) -> Any:
    """Save a random model of `family` in `folder`; the transformers model, float32, in eval."""
    import transformers

    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config_class = getattr(transformers, f"{classes[family]}Config")
    model_class = getattr(transformers, f"{classes[family]}ForCausalLM")
    torch.manual_seed(7)
    config = config_class(**(BASE | {"attn_implementation": "eager"} | settings))
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms start at 1 and biases at 0: a model that dropped them would pass.
            spread = 0.3 if parameter.ndim == 1 else 0.15
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def make_kv(
    shape: ModelShape,
    *,
    slots: int = 4,
    max_tokens: int = 512,
    block_tokens: int = 16,
    planes_per_block: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> KvCache:
    """An arena full of NaN, its blocks dealt to the slots in random order."""
    planes = shape.num_layers * shape.num_kv_heads
    blocks_per_group = -(-planes // planes_per_block)
    columns = -(-max_tokens // block_tokens) * blocks_per_group
    order = torch.randperm(slots * columns, generator=torch.Generator().manual_seed(seed))
    block_elems = planes_per_block * 2 * block_tokens * shape.head_dim
    return KvCache(
        arena=torch.full((slots * columns * block_elems,), float("nan"), dtype=dtype),
        block_table=order.to(torch.int32).view(slots, columns),
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_tokens=block_tokens,
        blocks_per_group=blocks_per_group,
        planes_per_block=planes_per_block,
    )


def make_meta(slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> AttentionMeta:
    """A batch: per sequence its slot, its cached tokens and its new tokens."""
    lengths = torch.tensor(counts)
    positions = [torch.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
    return AttentionMeta(
        slots=torch.tensor(slots, dtype=torch.int32),
        starts=torch.tensor(starts, dtype=torch.int32),
        query_starts=torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32),
        positions=torch.cat(positions),
        token_sequence=torch.repeat_interleave(torch.arange(len(counts)), lengths).to(torch.int32),
    )


@dataclass
class PagedRunner:
    """Feeds chunks of sequences to a model and keeps where each slot stands."""

    model: Llama
    kv: KvCache
    team: Team = field(default_factory=Team)
    lengths: dict[int, int] = field(default_factory=dict)

    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Logits of every new token, sequence by sequence: [tokens, vocab] each."""
        counts = [len(tokens) for _, tokens in chunks]
        starts = [self.lengths.get(slot, 0) for slot, _ in chunks]
        meta = make_meta([slot for slot, _ in chunks], starts, counts)
        tokens = np.array([token for _, new in chunks for token in new], dtype=np.int32)
        hidden = self.session.forward(tokens, meta.arrays)
        for slot, new in chunks:
            self.lengths[slot] = self.lengths.get(slot, 0) + len(new)
        return list(self.session.logits(hidden).clone().split(counts))

    @cached_property
    def session(self) -> Session:
        return Session(self.model, self.kv, self.team)
