"""LLaMA and its close relatives (Mistral, Qwen 2 and 3) over a paged KV cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from muxrt import kernels
from muxrt.config.model import ModelShape, load_shape
from muxrt.kernels import AttentionMeta, KvCache, Team
from muxrt.models.layers import Layer, Linear, Rope
from muxrt.models.weights import Progress, State, load_weights

DType = Literal["auto", "float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Llama:
    """Weights and how to run them; holds no state of any sequence.

    The residual stream, norms, rotary embeddings and attention are float32 whatever the dtype of
    the weights.
    """

    def __init__(self, shape: ModelShape, state: State) -> None:
        self.shape = shape
        self._rope = Rope(shape)
        self._scale = shape.head_dim**-0.5
        self._bind(state)
        kernels.warm_up()

    @classmethod
    def load(
        cls, folder: Path, dtype: DType, team: Team, progress: Progress | None = None
    ) -> "Llama":
        """The model in a Hugging Face folder; `progress(bytes done, bytes in all)` as it loads.

        "auto" is the published dtype, but float32 where that is float16: bfloat16 would lose
        bits of it. Raises ConfigError for what is missing, damaged or not supported.
        """
        shape = load_shape(folder)
        chosen = shape.dtype if dtype == "auto" else dtype
        return cls(shape, load_weights(folder, shape, DTYPES.get(chosen, torch.float32), progress))

    @classmethod
    def from_state(cls, shape: ModelShape, state: Mapping[str, Tensor]) -> Self:
        """A model over weights that are already there: no copy is made."""
        return cls(shape, dict(state))

    def state(self) -> State:
        """Our fused weights by name, for `from_state` in a process that maps the same memory."""
        return dict(self._state)

    @property
    def dtype(self) -> torch.dtype:
        """Of the linear layers."""
        return self._state["embedding"].dtype

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._state.values())

    def forward(self, tokens: Tensor, meta: AttentionMeta, kv: KvCache, team: Team) -> Tensor:
        """Final normed hidden states of new tokens; their K and V are written into the arena.

        tokens [T] int64 -> [T, hidden] float32. Depends on the batch only in last bits (`Linear`).
        """
        eps = self.shape.rms_eps
        cos, sin = self._rope.table(meta.positions)
        residual = F.embedding(tokens, self._embedding).float()  # [T, hidden]
        delta = None
        for index, layer in enumerate(self._layers):
            x = kernels.rms_norm(residual, layer.input_norm, eps, team, delta)
            q, k, v = self._project(layer, x, team)
            kernels.rope(q, k, cos, sin, team)
            x = kernels.attention(q, k, v, meta, kv, index, self._scale, team)
            delta = layer.output(x.flatten(1))
            x = kernels.rms_norm(residual, layer.mlp_norm, eps, team, delta)
            delta = layer.down(kernels.silu_mul(layer.gate_up(x), team))
        return kernels.rms_norm(residual, self._norm, eps, team, delta)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab] float32."""
        return self._head(hidden)

    def _project(self, layer: Layer, x: Tensor, team: Team) -> tuple[Tensor, Tensor, Tensor]:
        """Views q [T, heads, head_dim], k and v [T, kv_heads, head_dim] of one fused product."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        qkv = layer.qkv(x).view(x.shape[0], heads + 2 * kv_heads, self.shape.head_dim)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            kernels.rms_norm_heads(q, layer.q_norm, self.shape.rms_eps, team)
            kernels.rms_norm_heads(k, layer.k_norm, self.shape.rms_eps, team)
        return q, k, v

    def _bind(self, state: State) -> None:
        self._state = state
        self._embedding = state["embedding"]
        self._norm = state["norm"]
        self._head = Linear(state.get("head", self._embedding), None)
        self._layers = [_layer(state, index) for index in range(self.shape.num_layers)]


def _layer(state: State, index: int) -> Layer:
    own = {
        name.removeprefix(f"layers.{index}."): tensor
        for name, tensor in state.items()
        if name.startswith(f"layers.{index}.")
    }

    def linear(name: str) -> Linear:
        return Linear(own[f"{name}.weight"], own.get(f"{name}.bias"))

    return Layer(
        input_norm=own["input_norm"],
        qkv=linear("qkv"),
        q_norm=own.get("q_norm"),
        k_norm=own.get("k_norm"),
        output=linear("output"),
        mlp_norm=own["mlp_norm"],
        gate_up=linear("gate_up"),
        down=linear("down"),
    )
