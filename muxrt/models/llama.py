"""LLaMA and its close relatives (Mistral, Qwen 2 and 3) over a paged KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt import kernels
from muxrt.config.model import ModelShape, load_shape
from muxrt.config.shard import Shard
from muxrt.errors import MuxrtError
from muxrt.kernels import KvCache, MetaArrays, Packed, Program, Team
from muxrt.models.layers import Layer, Rope, packed
from muxrt.models.ranks import Ranks
from muxrt.models.weights import WHOLE, DTypes, Progress, State, load_weights

Tokens = npt.NDArray[np.int32]

DType = Literal["auto", "float32", "bfloat16"]
LinearDType = Literal["auto", "float32", "bfloat16", "int8"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

FIRST_TOKENS, FIRST_POSITIONS = 64, 1024  # what a session is recorded for at first


class UnknownToken(MuxrtError):
    """A token outside the vocabulary; of several ranks, all raise it."""


class Llama:
    """Weights and how to run them; holds no state of any sequence.

    The residual stream, norms, rotary embeddings and attention are float32 whatever the dtype of
    the weights; weights are widened to float32 and multiplied as such.
    """

    def __init__(self, shape: ModelShape, state: State, shard: Shard = WHOLE) -> None:
        """`shape` is the whole model's, `state` what this rank holds of it."""
        self.part = shard, shape  # of the whole model
        self.vocab = shard.vocab(shape)  # the rows of embedding and head that are here
        self.shape = shape = shard.of(shape)
        self.bytes_read = 0  # of the files that it was loaded from
        self._state = state
        self.norm = state["norm"]
        self.head = packed(state, "head", len(self.vocab), shape.hidden_size)
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
        shard: Shard = WHOLE,
    ) -> "Llama":
        """A rank's part of the model in a Hugging Face folder; `progress` as in `load_weights`.

        "auto" is the published dtype, but float32 where that is float16: bfloat16 would lose
        bits of it. `weights` is the dtype of the linear layers, "auto" = `dtype`. Raises
        ConfigError for what is missing, damaged or not supported.
        """
        shape = load_shape(folder)
        table = DTYPES.get(shape.dtype if dtype == "auto" else dtype, torch.float32)
        linear = table if weights == "auto" else DTYPES[weights]
        loaded = load_weights(folder, shape, DTypes(linear, table), progress, shard)
        llama = cls(shape, loaded.state, shard)
        llama.bytes_read = loaded.bytes_read
        return llama

    @classmethod
    def from_state(
        cls, shape: ModelShape, state: Mapping[str, Tensor], shard: Shard = WHOLE
    ) -> Self:
        """A model over weights that are already there: no copy is made."""
        return cls(shape, dict(state), shard)

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


@dataclass(frozen=True)
class _Body:
    """All of a model but the head, recorded for batches up to a size."""

    program: Program
    residual: npt.NDArray[np.float32]  # [max tokens, hidden]
    hidden: npt.NDArray[np.float32]  # [max tokens, hidden]: what it leaves
    sums: tuple[int, ...]  # stages before which `residual` is summed up over the ranks
    layers: tuple[int, ...]  # where each begins among its stages; the last: where all end
    max_positions: int

    def fits(self, num_tokens: int, highest: int) -> bool:
        return num_tokens <= self.program.max_tokens and highest < self.max_positions


@dataclass(frozen=True, slots=True)
class _Pass:
    """A batch on its way through a body."""

    body: _Body
    num_tokens: int
    strangers: npt.NDArray[np.bool_] | None = None  # [T]: tokens whose embedding others hold
    next_layer: int = 0


class Session:
    """A model recorded for one team over one arena, with its buffers: one batch at a time.

    What it returns are its buffers: they last until the next call of the same method.
    """

    def __init__(self, llama: Llama, kv: KvCache, team: Team, ranks: Ranks | None = None) -> None:
        """`ranks` are those that hold the model together, where it is not here as a whole.

        All of them call the same methods in the same order, with batches of the same sequences.
        """
        self._llama, self._kv, self._team, self._ranks = llama, kv, team, ranks
        self._rope = Rope(llama.shape)
        self._decode = self._record(FIRST_TOKENS, FIRST_POSITIONS, is_prefill=False)
        self._prefill = self._record(FIRST_TOKENS, FIRST_POSITIONS, is_prefill=True)
        self._record_head(FIRST_TOKENS)
        self._pass: _Pass | None = None

    @property
    def vocab_size(self) -> int:
        return self._llama.shape.vocab_size

    def forward(self, tokens: Tokens, meta: MetaArrays) -> Tensor:
        """Final normed hidden states of new tokens; their K and V are written into the arena.

        tokens [T] -> [T, hidden] float32. A row depends on the tokens of its sequence and on
        whether the batch is a decode step (one token each), whatever else is in it. Raises
        UnknownToken for one outside the vocabulary. Of several ranks, the first one's tokens count.
        """
        self.begin(tokens, meta)
        return self.go_on(self._llama.shape.num_layers)

    def begin(self, tokens: Tokens, meta: MetaArrays) -> None:
        """A batch is computed next, in as many calls of `go_on` as it takes; see `forward`."""
        strangers = None
        if self._ranks is not None:
            tokens = self._agree(self._ranks, tokens)
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise UnknownToken(f"found token ids outside the vocabulary of {self.vocab_size}")
        if self._ranks is not None:
            vocab = self._llama.vocab
            strangers = (tokens < vocab.start) | (tokens >= vocab.stop)
            tokens = np.where(strangers, 0, tokens - vocab.start)
        num_tokens, highest = len(tokens), int(meta.positions.max())
        if num_tokens > len(meta.slots):
            body = self._prefill = self._enlarged(self._prefill, num_tokens, highest, True)
        else:
            body = self._decode = self._enlarged(self._decode, num_tokens, highest, False)
        body.program.set_batch(tokens, meta)
        self._pass = _Pass(body, num_tokens, strangers)

    def _agree(self, ranks: Ranks, tokens: Tokens) -> Tokens:
        """The first rank's tokens: it alone knows what was drawn."""
        shared = torch.from_numpy(tokens.astype(np.int32))
        ranks.share(shared)
        agreed: Tokens = shared.numpy()
        return agreed

    @property
    def next_layer(self) -> int:
        """Where the batch that is under way goes on; 0: none is."""
        return self._pass.next_layer if self._pass is not None else 0

    def go_on(self, end_layer: int) -> Tensor:
        """Compute the batch up to layer `end_layer`: there, K and V are final.

        -> [T, hidden] float32, of use after the last layer only.
        """
        begun, num_layers = self._pass, self._llama.shape.num_layers
        assert begun is not None and begun.next_layer < end_layer <= num_layers, "begin, then go on"
        body, self._pass = begun.body, None
        if end_layer == num_layers:  # the last norm too
            self._run(begun, body.program.num_stages)
        else:
            self._run(begun, body.layers[end_layer])
            self._pass = replace(begun, next_layer=end_layer)
        return torch.from_numpy(body.hidden[: begun.num_tokens])

    def _run(self, begun: _Pass, end: int) -> None:
        """All stages up to `end` that were not run yet."""
        program, first = begun.body.program, begun.body.layers[begun.next_layer]
        for stage in begun.body.sums:
            if first < stage <= end:
                program.run(first, stage)
                self._sum(begun, is_embedding=first == 0)
                first = stage
        if first < end:
            program.run(first, end)

    def _sum(self, begun: _Pass, is_embedding: bool) -> None:
        """The residual stream becomes its sum over the ranks."""
        assert self._ranks is not None
        residual = begun.body.residual[: begun.num_tokens]
        if is_embedding:
            residual[begun.strangers] = 0.0
        self._ranks.add(torch.from_numpy(residual))

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[N, hidden] -> [N, vocab] float32; None on ranks other than the first."""
        num_rows = len(hidden)
        if num_rows > self._top.max_tokens:
            self._record_head(_power_of_two(num_rows))
        self._rows[:num_rows] = hidden.numpy()
        self._top.run_rows(num_rows)
        logits = torch.from_numpy(self._logits[:num_rows])
        return logits if self._ranks is None else self._ranks.join(logits, self.vocab_size)

    def _enlarged(self, body: _Body, num_tokens: int, highest: int, is_prefill: bool) -> _Body:
        """The same, recorded anew if the batch does not fit."""
        if body.fits(num_tokens, highest):
            return body
        max_tokens = max(body.program.max_tokens, _power_of_two(num_tokens))
        max_positions = max(body.max_positions, _power_of_two(highest + 1))
        return self._record(max_tokens, max_positions, is_prefill)

    def _record(self, max_tokens: int, max_positions: int, is_prefill: bool) -> _Body:
        llama, shape = self._llama, self._llama.shape
        program = Program(self._team, max_tokens, is_prefill)
        eps, rope = shape.rms_eps, self._rope.table(max_positions)
        residual, x = program.floats(shape.hidden_size), program.floats(shape.hidden_size)
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        qkv = program.floats((heads + 2 * kv_heads) * shape.head_dim)
        attended = program.floats(heads * shape.head_dim)
        gated = program.floats(shape.intermediate_size)
        program.embed(llama.embedding, residual)
        starts, sums = [0], [program.num_stages]
        # The stream is a sum over the ranks: the first one adds to it, the others begin anew.
        is_first = self._ranks is None or self._ranks.rank == 0
        add_linear = program.add_linear if is_first else program.linear
        for index, layer in enumerate(llama.layers):
            program.rms_norm(residual, layer.input_norm, eps, x)
            program.linear(x, layer.qkv, qkv)
            norms = (layer.q_norm, layer.k_norm)
            scale = shape.head_dim**-0.5
            program.attention(
                qkv, self._kv, index, attended, rope=rope, norms=norms, eps=eps, scale=scale
            )
            add_linear(attended, layer.output, residual)
            sums.append(program.num_stages)
            program.rms_norm(residual, layer.mlp_norm, eps, x)
            program.linear_silu_mul(x, layer.gate_up, gated)
            add_linear(gated, layer.down, residual)
            sums.append(program.num_stages)
            starts.append(program.num_stages)
        hidden = program.floats(shape.hidden_size)
        program.rms_norm(residual, llama.norm, eps, hidden)
        cuts = () if self._ranks is None else tuple(sums)
        return _Body(program, residual, hidden, cuts, tuple(starts), max_positions)

    def _record_head(self, max_rows: int) -> None:
        self._top = Program(self._team, max_rows)
        self._rows = self._top.floats(self._llama.shape.hidden_size)
        self._logits = self._top.floats(len(self._llama.vocab))
        self._top.linear(self._rows, self._llama.head, self._logits)


def _power_of_two(number: int) -> int:
    """The least one that is not below `number`."""
    return 1 << (number - 1).bit_length()
