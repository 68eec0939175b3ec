"""LLaMA and its close relatives (Mistral, Qwen 2 and 3) over a paged KV cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt import kernels
from muxrt.config.model import ModelShape, load_shape
from muxrt.kernels import KvCache, MetaArrays, Packed, Program, Team
from muxrt.models.layers import Layer, Rope, packed
from muxrt.models.weights import DTypes, Progress, State, load_weights

Tokens = npt.NDArray[np.int32]

DType = Literal["auto", "float32", "bfloat16"]
LinearDType = Literal["auto", "float32", "bfloat16", "int8"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

FIRST_TOKENS, FIRST_POSITIONS = 64, 1024  # what a session is recorded for at first


class Llama:
    """Weights and how to run them; holds no state of any sequence.

    The residual stream, norms, rotary embeddings and attention are float32 whatever the dtype of
    the weights; weights are widened to float32 and multiplied as such.
    """

    def __init__(self, shape: ModelShape, state: State) -> None:
        self.shape = shape
        self._state = state
        self.norm = state["norm"]
        self.head = packed(state, "head", shape.vocab_size, shape.hidden_size)
        self.embedding: Tensor | Packed = state.get("embedding", self.head)
        self.layers = [Layer.of(state, shape, index) for index in range(shape.num_layers)]
        kernels.warm_up()

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: DType,
        progress: Progress | None = None,
        weights: LinearDType = "auto",
    ) -> "Llama":
        """The model in a Hugging Face folder; `progress(bytes done, bytes in all)` as it loads.

        "auto" is the published dtype, but float32 where that is float16: bfloat16 would lose
        bits of it. `weights` is the dtype of the linear layers, "auto" = `dtype`. Raises
        ConfigError for what is missing, damaged or not supported.
        """
        shape = load_shape(folder)
        table = DTYPES.get(shape.dtype if dtype == "auto" else dtype, torch.float32)
        linear = table if weights == "auto" else DTYPES[weights]
        return cls(shape, load_weights(folder, shape, DTypes(linear, table), progress))

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
        return self.head.data.dtype

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._state.values())


class Session:
    """A model recorded for one team over one arena: a program and its buffers, one batch at a time.

    What it returns are its buffers: they last until the next call of the same method.
    """

    def __init__(self, llama: Llama, kv: KvCache, team: Team) -> None:
        self._llama, self._kv, self._team = llama, kv, team
        self._rope = Rope(llama.shape)
        self._max_positions = FIRST_POSITIONS
        self._record(FIRST_TOKENS)
        self._record_head(FIRST_TOKENS)

    @property
    def vocab_size(self) -> int:
        return self._llama.shape.vocab_size

    def forward(self, tokens: Tokens, meta: MetaArrays) -> Tensor:
        """Final normed hidden states of new tokens; their K and V are written into the arena.

        tokens [T] -> [T, hidden] float32. A row depends on the tokens of its sequence alone,
        whatever else is in the batch. Raises ValueError for a token outside the vocabulary.
        """
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"found token ids outside the vocabulary of {self.vocab_size}")
        highest = int(meta.positions.max())
        if len(tokens) > self._body.max_tokens or highest >= self._max_positions:
            self._max_positions = max(self._max_positions, _power_of_two(highest + 1))
            self._record(max(self._body.max_tokens, _power_of_two(len(tokens))))
        self._body.run_batch(tokens, meta)
        return torch.from_numpy(self._hidden[: len(tokens)])

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab] float32."""
        num_rows = len(hidden)
        if num_rows > self._top.max_tokens:
            self._record_head(_power_of_two(num_rows))
        self._rows[:num_rows] = hidden.numpy()
        self._top.run_rows(num_rows)
        return torch.from_numpy(self._logits[:num_rows])

    def _record(self, max_tokens: int) -> None:
        llama, shape = self._llama, self._llama.shape
        program = self._body = Program(self._team, max_tokens)
        eps, rope = shape.rms_eps, self._rope.table(self._max_positions)
        residual, x = program.floats(shape.hidden_size), program.floats(shape.hidden_size)
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        qkv = program.floats((heads + 2 * kv_heads) * shape.head_dim)
        attended = program.floats(heads * shape.head_dim)
        gated = program.floats(shape.intermediate_size)
        program.embed(llama.embedding, residual)
        for index, layer in enumerate(llama.layers):
            program.rms_norm(residual, layer.input_norm, eps, x)
            program.linear(x, layer.qkv, qkv)
            norms = (layer.q_norm, layer.k_norm)
            scale = shape.head_dim**-0.5
            program.attention(
                qkv, self._kv, index, attended, rope=rope, norms=norms, eps=eps, scale=scale
            )
            program.add_linear(attended, layer.output, residual)
            program.rms_norm(residual, layer.mlp_norm, eps, x)
            program.linear_silu_mul(x, layer.gate_up, gated)
            program.add_linear(gated, layer.down, residual)
        self._hidden = program.floats(shape.hidden_size)
        program.rms_norm(residual, llama.norm, eps, self._hidden)

    def _record_head(self, max_rows: int) -> None:
        self._top = Program(self._team, max_rows)
        self._rows = self._top.floats(self._llama.shape.hidden_size)
        self._logits = self._top.floats(self._llama.shape.vocab_size)
        self._top.linear(self._rows, self._llama.head, self._logits)


def _power_of_two(number: int) -> int:
    """The least one that is not below `number`."""
    return 1 << (number - 1).bit_length()
