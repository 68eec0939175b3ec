"""What a model is: the shape read from a Hugging Face `config.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings; `kind` is Hugging Face's `rope_type`."""

    kind: Literal["linear", "llama3", "yarn", "dynamic"]
    factor: float
    parameters: dict[str, Any]  # the rest of the published dict, checked at load


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only LLaMA-like transformer, from facts (never from its name)."""

    family: Family
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str  # of the published weights: "float32", "bfloat16", "float16"
    eos_token_ids: tuple[int, ...]  # config.json and generation_config.json together
    bos_token_id: int | None
