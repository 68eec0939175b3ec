"""The parts of a LLaMA: linear maps, rotary frequencies, and one layer's weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muxrt.config.model import ModelShape, RopeScaling


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight.T + bias: the one seam where pre-packed weights can come in.

    A row of the result may differ in its last bits with the number of rows: the library picks
    its matrix kernel, and so its order of summation, by the batch.
    """

    weight: Tensor  # [out, in], float32 or bfloat16
    bias: Tensor | None  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] float32 -> [T, out] float32, multiplied in the weights' dtype."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one transformer layer; norms are float32."""

    input_norm: Tensor  # [hidden]
    qkv: Linear  # -> [(heads + 2 * kv_heads) * head_dim]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Linear
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # -> [2 * intermediate], gate first
    down: Linear


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

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions [T] int64, each [T, head_dim / 2] float32."""
        angles = positions[:, None].float() * self._frequencies
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
