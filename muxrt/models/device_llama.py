"""The same LLaMA on a device: torch's matrix products, our kernels for everything between them.

Activations have the weights' dtype; what a norm, a rotation or a softmax sums up is float32.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from muxrt.config.model import ModelShape, load_shape
from muxrt.config.shard import Shard
from muxrt.kernels import DeviceMeta, KvCache, gpu
from muxrt.kernels.gpu import DecodeWorkspace
from muxrt.models.device_weights import DeviceWeights, load_device_weights, random_device_weights
from muxrt.models.layers import Rope
from muxrt.models.ranks import Ranks
from muxrt.models.weights import WHOLE, Progress, State


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight.T + bias."""

    weight: Tensor  # [features, depth]
    bias: Tensor | None  # [features]

    @classmethod
    def of(cls, state: State, name: str) -> "Linear":
        return cls(state[name], state.get(f"{name}.bias"))

    def __call__(self, x: Tensor) -> Tensor:
        """[T, depth] -> [T, features]"""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """The weights of one transformer layer."""

    input_norm: Tensor  # [hidden] float32, like all norms
    qkv: Linear
    norms: tuple[Tensor | None, Tensor | None]  # of q's and k's heads: [head_dim]
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear  # gate first
    down: Linear

    @classmethod
    def of(cls, state: State, index: int) -> "DeviceLayer":
        prefix = f"layers.{index}."
        return cls(
            input_norm=state[f"{prefix}input_norm"],
            qkv=Linear.of(state, f"{prefix}qkv"),
            norms=(state.get(f"{prefix}q_norm"), state.get(f"{prefix}k_norm")),
            output=Linear.of(state, f"{prefix}output"),
            mlp_norm=state[f"{prefix}mlp_norm"],
            gate_up=Linear.of(state, f"{prefix}gate_up"),
            down=Linear.of(state, f"{prefix}down"),
        )


class DeviceLlama:
    """Weights on a device and how to run them; holds no state of any sequence."""

    def __init__(self, shape: ModelShape, weights: DeviceWeights, shard: Shard = WHOLE) -> None:
        """`shape` is the whole model's, `weights` what this rank holds of it."""
        self.vocab = shard.vocab(shape)  # the rows of embedding and head that are here
        self.shape = shape = shard.of(shape)
        self.weights = weights
        state = weights.state()
        self.norm = state["norm"]
        self.head = Linear.of(state, "head")
        self.embedding = state.get("embedding", self.head.weight)  # [rows that are here, hidden]
        self.layers = [DeviceLayer.of(state, index) for index in range(shape.num_layers)]

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        shard: Shard = WHOLE,
    ) -> "DeviceLlama":
        """A rank's part of the model in a Hugging Face folder; `progress` as in `load_weights`.

        Raises ConfigError for what is missing, damaged or not supported.
        """
        shape = load_shape(folder)
        weights = load_device_weights(folder, shape, dtype, device, progress, shard)
        return cls(shape, weights, shard)

    @classmethod
    def random(cls, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> "DeviceLlama":
        """A model that says nothing, as fast as one that does: for benchmarks."""
        return cls(shape, random_device_weights(shape, dtype, device))

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device


class DeviceSession:
    """A model over one arena on one lane's share of the device.

    Whatever it is called with stays on the device; it reads nothing back, so all of it may be
    captured in a CUDA graph.
    """

    def __init__(
        self,
        llama: DeviceLlama,
        kv: KvCache,
        rope: tuple[Tensor, Tensor],
        sm_count: int,
        ranks: Ranks | None = None,
    ) -> None:
        """`rope`: see `rope_table`; `sm_count`: SMs of the lane.

        `ranks` are those that hold the model together, where it is not here as a whole: all of them
        call the same methods in the same order, with batches of the same sizes.
        """
        self.llama = llama
        self._ranks = ranks
        self.sm_count = sm_count
        self._kv = kv
        self._rope = rope

    def workspace(self, num_sequences: int, max_tokens: int) -> DecodeWorkspace:
        """Scratch memory for decode steps of that many sequences of at most `max_tokens`."""
        heads = self.llama.shape.num_heads
        return gpu.decode_workspace(self._kv, heads, num_sequences, max_tokens, self.sm_count)

    def forward(
        self, tokens: Tensor, meta: DeviceMeta, workspace: DecodeWorkspace | None = None
    ) -> Tensor:
        """Final normed hidden states of new tokens; their K and V are written into the arena.

        tokens [T] -> [T, hidden]. With a `workspace` it is a decode step: every sequence has one
        token at most. Of several ranks the first one's tokens count, and become those of all.
        """
        llama, shape, kv = self.llama, self.llama.shape, self._kv
        residual = self._embed(tokens)
        x, delta = torch.empty_like(residual), None
        # Rows of padding are not written: zeros, lest what the memory held makes them NaN.
        attended = self._empty(len(tokens), shape.num_heads * shape.head_dim).zero_()
        gated = self._empty(len(tokens), shape.intermediate_size)
        scale = shape.head_dim**-0.5
        for index, layer in enumerate(llama.layers):
            gpu.rms_norm(residual, layer.input_norm, shape.rms_eps, x, delta)
            qkv = layer.qkv(x)
            gpu.rope_and_store(qkv, kv, meta, index, self._rope, layer.norms, shape.rms_eps)
            if workspace is None:
                gpu.prefill_attention(qkv, kv, meta, index, attended, scale)
            else:
                gpu.decode_attention(qkv, kv, meta, index, attended, scale, workspace)
            delta = self._sum(layer.output(attended))
            gpu.rms_norm(residual, layer.mlp_norm, shape.rms_eps, x, delta)
            gpu.silu_mul(layer.gate_up(x), gated)
            delta = self._sum(layer.down(gated))
        gpu.rms_norm(residual, llama.norm, shape.rms_eps, x, delta)
        return x

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[N, hidden] -> [N, vocab] float32; None on ranks other than the first."""
        logits = self.llama.head(hidden)
        if self._ranks is None:
            return logits.float()
        joined = self._ranks.join(logits, self.llama.shape.vocab_size)
        return None if joined is None else joined.float()

    def _embed(self, tokens: Tensor) -> Tensor:
        """The residual stream before the first layer. tokens [T] -> [T, hidden]"""
        llama = self.llama
        residual = self._empty(len(tokens), llama.shape.hidden_size)
        if self._ranks is not None:
            self._ranks.share(tokens)  # it alone knows what was drawn
            tokens = tokens - llama.vocab.start  # of rows that others hold `embed` makes zeros
        gpu.embed(tokens, llama.embedding, residual)
        return self._sum(residual)

    def _sum(self, part: Tensor) -> Tensor:
        """`part`, which becomes its sum over the ranks."""
        if self._ranks is not None:
            self._ranks.add(part)
        return part

    def _empty(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=self.llama.dtype, device=self.llama.device)


def rope_table(
    shape: ModelShape, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the first positions, each [num_positions, head_dim / 2] float32."""
    cos, sin = Rope(shape).table(num_positions)
    return cos.to(device), sin.to(device)
