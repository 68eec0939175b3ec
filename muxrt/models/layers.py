"""The parts of a LLaMA: one layer's weights, and rotary frequencies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muxrt.config.model import ModelShape, RopeScaling
from muxrt.kernels import Packed


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one transformer layer; norms are float32."""

    input_norm: Tensor  # [hidden]
    qkv: Packed  # -> [(heads + 2 * kv_heads) * head_dim]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Packed
    mlp_norm: Tensor  # [hidden]
    gate_up: Packed  # -> [2 * intermediate], gate first, in two parts
    down: Packed

    @classmethod
    def of(cls, state: Mapping[str, Tensor], shape: ModelShape, index: int) -> "Layer":
        """Layer `index` of the weights that `load_weights` made; `shape` as the rank holds it."""
        prefix = f"layers.{index}."
        head_dim = shape.head_dim
        q, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
        hidden, mlp = shape.hidden_size, shape.intermediate_size
        return cls(
            input_norm=state[f"{prefix}input_norm"],
            qkv=packed(state, f"{prefix}qkv", q + 2 * kv, hidden),
            q_norm=state.get(f"{prefix}q_norm"),
            k_norm=state.get(f"{prefix}k_norm"),
            output=packed(state, f"{prefix}output", hidden, q),
            mlp_norm=state[f"{prefix}mlp_norm"],
            gate_up=packed(state, f"{prefix}gate_up", 2 * mlp, hidden, parts=2),
            down=packed(state, f"{prefix}down", hidden, mlp),
        )


def packed(
    state: Mapping[str, Tensor], name: str, features: int, depth: int, parts: int = 1
) -> Packed:
    """A linear layer of the weights that `load_weights` made."""
    scales, bias = state.get(f"{name}.scales"), state.get(f"{name}.bias")
    return Packed(state[name], scales, bias, features, depth, parts)


class Rope:
    """Cosines and sines of rotary embeddings."""

    def __init__(self, shape: ModelShape) -> None:
        exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
        frequencies = 1.0 / shape.rope_theta**exponent  # [head_dim / 2], radians per position
        self._frequencies = frequencies
        self._magnitude = 1.0
        if shape.rope_scaling is not None:
            self._frequencies = _scale(frequencies, shape, shape.rope_scaling)
            self._magnitude = _magnitude(shape.rope_scaling)

    def table(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the first positions, each [num_positions, head_dim / 2] float32."""
        angles = torch.arange(num_positions)[:, None].float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._magnitude != 1.0:
            return cos * self._magnitude, sin * self._magnitude
        return cos, sin


def _scale(frequencies: Tensor, shape: ModelShape, scaling: RopeScaling) -> Tensor:
    slowed = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slowed
    if scaling.kind == "llama3":
        keep = _llama3_share(frequencies, scaling.parameters)
    else:
        keep = _yarn_share(shape, scaling.parameters)
    return frequencies * keep + slowed * (1.0 - keep)


def _llama3_share(frequencies: Tensor, parameters: dict[str, Any]) -> Tensor:
    """How much of each frequency stays: 1 where it turns often within the original context."""
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    share: Tensor = (turns - low) / (high - low)
    return share.clamp(0.0, 1.0)


def _yarn_share(shape: ModelShape, parameters: dict[str, Any]) -> Tensor:
    """How much of each frequency stays: a ramp between two numbers of turns (YaRN, section 3.2)."""
    original = parameters["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """Where a pair makes `turns` turns within the original context."""
        ratio = math.log(original / (turns * 2 * math.pi)) / math.log(shape.rope_theta)
        return shape.head_dim / 2 * ratio

    low = dimension(parameters.get("beta_fast", 32.0))
    high = dimension(parameters.get("beta_slow", 1.0))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.head_dim - 1)
    pairs = torch.arange(shape.head_dim // 2, dtype=torch.float32)
    return 1.0 - ((pairs - low) / max(high - low, 0.001)).clamp(0.0, 1.0)


def _magnitude(scaling: RopeScaling) -> float:
    """YaRN scales queries and keys too, by way of cos and sin; the others do not."""
    parameters = scaling.parameters
    if scaling.kind != "yarn":
        return 1.0
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    if "mscale" in parameters and "mscale_all_dim" in parameters:
        whole = _yarn_magnitude(scaling.factor, parameters["mscale_all_dim"])
        return _yarn_magnitude(scaling.factor, parameters["mscale"]) / whole
    return _yarn_magnitude(scaling.factor, 1.0)


def _yarn_magnitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
