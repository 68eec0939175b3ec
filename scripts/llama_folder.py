"""LLaMA folders in Hugging Face format: shapes, configs and random weights."""

import json
import math
import zlib
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

VOCAB_SIZE = 2_048  # of the demo tokenizer
WEIGHTS = "model.safetensors"


class ShapeError(ValueError):
    """A shape that no LLaMA can have."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a LLaMA and how it encodes positions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = VOCAB_SIZE
    max_positions: int = 4_096
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    norm_eps: float = 1e-6
    tied: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is int and value < 1:
                raise ShapeError(f"{name} must be at least 1, found {value}")
        if self.heads % self.kv_heads:
            raise ShapeError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise ShapeError(f"head_dim must be even for rotary positions, found {self.head_dim}")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order of the published files."""
        tensors: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden)
        }
        for layer in range(self.layers):
            for name, size in self._layer_tensors().items():
                tensors[f"model.layers.{layer}.{name}.weight"] = size
        tensors["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            tensors["lm_head.weight"] = (self.vocab, self.hidden)
        return tensors

    def _layer_tensors(self) -> dict[str, tuple[int, ...]]:
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q_width, self.hidden),
            "self_attn.k_proj": (kv_width, self.hidden),
            "self_attn.v_proj": (kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, q_width),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }


def classic(hidden: int, layers: int, heads: int, intermediate: int, **rest: Any) -> Shape:
    """Multi-head attention whose heads share the hidden size, as in LLaMA 1."""
    return Shape(hidden, layers, heads, heads, hidden // heads, intermediate, **rest)


PRESETS = {
    "llama-7b": classic(4096, 32, 32, 11_008, vocab=32_000, max_positions=2_048),
    "llama-13b": classic(5120, 40, 40, 13_824, vocab=32_000, max_positions=2_048),
    "llama-30b": classic(6656, 60, 52, 17_920, vocab=32_000, max_positions=2_048),
    "llama-65b": classic(8192, 80, 64, 22_016, vocab=32_000, max_positions=2_048),
    "llama-3-8b": Shape(
        4096, 32, 32, 8, 128, 14_336, 128_256, 8_192, rope_theta=500_000.0, norm_eps=1e-5
    ),
    "tinyllama-1.1b": Shape(2048, 22, 32, 4, 64, 5_632, 32_000, 2_048, norm_eps=1e-5),
    "27m": classic(512, 8, 8, 1_376),
    "27m-gqa": Shape(512, 8, 8, 2, 64, 1_376),
    "88m": classic(768, 12, 12, 2_048),
}


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(self, torch.float16)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_configs(folder: Path, shape: Shape, dtype: Dtype, bos: int, eos: int | list[int]) -> None:
    """config.json and generation_config.json, with the keys that published folders use."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token_id": bos, "eos_token_id": eos}
    write_json(folder / "config.json", model_config(shape, dtype) | ends)
    write_json(folder / "generation_config.json", {"_from_model_config": True} | ends)


def model_config(shape: Shape, dtype: Dtype) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype.value,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    return config | newer_keys(shape)


def newer_keys(shape: Shape) -> dict[str, Any]:
    """What LLaMA 1 folders leave out, because every reader has their values as its default."""
    keys: dict[str, Any] = {}
    if shape.kv_heads != shape.heads or shape.head_dim * shape.heads != shape.hidden:
        keys |= {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    if shape.rope_theta != 10_000.0:
        keys |= {"rope_theta": shape.rope_theta, "rope_scaling": shape.rope_scaling}
    return keys


def plan_shards(sizes_bytes: dict[str, int], limit_bytes: int) -> list[list[str]]:
    """Tensor names per file, in order; only a tensor that is larger by itself exceeds the limit."""
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, size_bytes in sizes_bytes.items():
        if shards[-1] and filled_bytes + size_bytes > limit_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += size_bytes
    return shards


def random_tensor(name: str, size: tuple[int, ...], dtype: Dtype, seed: int) -> Tensor:
    """Weights that keep activations near unit size; the same ones however they are sharded."""
    if len(size) == 1:
        return torch.ones(size, dtype=dtype.torch)
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    weights: Tensor = torch.randn(size, generator=generator) * size[1] ** -0.5
    return weights.to(dtype.torch)


def write_random_weights(
    folder: Path, shape: Shape, dtype: Dtype, limit_bytes: int, seed: int
) -> None:
    """One file, or an index and shards; never more than one shard in memory."""
    tensors = shape.tensors()
    sizes_bytes = {name: math.prod(size) * dtype.torch.itemsize for name, size in tensors.items()}
    shards = plan_shards(sizes_bytes, limit_bytes)
    weight_map: dict[str, str] = {}
    with progress_bar() as bar:
        for number, names in enumerate(bar.track(shards, description=folder.name), start=1):
            file = shard_name(number, len(shards))
            shard = {name: random_tensor(name, tensors[name], dtype, seed) for name in names}
            save_weights(shard, folder / file)
            weight_map |= dict.fromkeys(names, file)
            del shard  # before the next one is made
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes_bytes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})  # readers ask for this mark
    path.chmod(0o644)  # safetensors leaves it readable by its owner only


def shard_name(number: int, count: int) -> str:
    if count == 1:
        return WEIGHTS
    return f"model-{number:05}-of-{count:05}.safetensors"


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
