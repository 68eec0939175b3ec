"""Reading safetensors into fused weights, checked by name and shape before anything is copied."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from muxrt.config.model import ModelShape
from muxrt.errors import ConfigError

Progress = Callable[[int, int], None]  # bytes done, bytes in all
State = dict[str, Tensor]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One published tensor and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """One of our tensors: published ones, stacked along the first dimension."""

    name: str
    parts: tuple[Part, ...]
    is_norm: bool = False  # kept in float32 whatever the dtype of the rest

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.is_norm else dtype


def list_weights(shape: ModelShape) -> Iterator[Weight]:
    """Every weight a model of this shape has, in order of use."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    yield Weight("embedding", (Part("model.embed_tokens.weight", (vocab, hidden)),))
    for layer in range(shape.num_layers):
        yield from _layer_weights(shape, layer)
    yield Weight("norm", (Part("model.norm.weight", (hidden,)),), is_norm=True)
    if not shape.tied_embeddings:
        yield Weight("head", (Part("lm_head.weight", (vocab, hidden)),))


def _layer_weights(shape: ModelShape, layer: int) -> Iterator[Weight]:
    hidden, head_dim, mlp = shape.hidden_size, shape.head_dim, shape.intermediate_size
    q, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    attention = f"{theirs}.self_attn"

    def norm(name: str, published: str, width: int) -> Weight:
        return Weight(f"{ours}.{name}", (Part(f"{published}.weight", (width,)),), is_norm=True)

    def linear(name: str, rows: dict[str, int], width: int, bias: bool) -> Iterator[Weight]:
        weights = tuple(Part(f"{part}.weight", (size, width)) for part, size in rows.items())
        yield Weight(f"{ours}.{name}.weight", weights)
        if bias:
            biases = tuple(Part(f"{part}.bias", (size,)) for part, size in rows.items())
            yield Weight(f"{ours}.{name}.bias", biases)

    yield norm("input_norm", f"{theirs}.input_layernorm", hidden)
    qkv = {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
    yield from linear("qkv", qkv, hidden, shape.qkv_bias)
    if shape.qk_norm:
        yield norm("q_norm", f"{attention}.q_norm", head_dim)
        yield norm("k_norm", f"{attention}.k_norm", head_dim)
    yield from linear("output", {f"{attention}.o_proj": hidden}, q, shape.output_bias)
    yield norm("mlp_norm", f"{theirs}.post_attention_layernorm", hidden)
    gate_up = {f"{theirs}.mlp.gate_proj": mlp, f"{theirs}.mlp.up_proj": mlp}
    yield from linear("gate_up", gate_up, hidden, shape.mlp_bias)
    yield from linear("down", {f"{theirs}.mlp.down_proj": hidden}, mlp, shape.mlp_bias)


def load_weights(
    folder: Path, shape: ModelShape, dtype: torch.dtype, progress: Progress | None = None
) -> State:
    """All weights of the model in `folder`, fused, linear ones in `dtype`.

    Peak memory is that of the result. Raises ConfigError where a file or tensor is missing,
    damaged, or not of the shape that config.json promises.
    """
    weights = list(list_weights(shape))
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        for weight in weights:
            checkpoint.check(weight)
        total = sum(num_bytes(weight, dtype) for weight in weights)
        state: State = {}
        done = 0
        for weight in weights:
            state[weight.name] = checkpoint.read(weight, weight.dtype(dtype))
            done += num_bytes(weight, dtype)
            if progress is not None:
                progress(done, total)
    return state


def num_bytes(weight: Weight, dtype: torch.dtype) -> int:
    """Bytes of `weight` in memory."""
    return torch.Size(weight.shape).numel() * weight.dtype(dtype).itemsize


class Checkpoint:
    """The safetensors files of a folder, open; one name space over all shards."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._index = folder / INDEX if (folder / INDEX).is_file() else None
        names = self._shards() if self._index else None
        files = sorted(set(names.values())) if names else [SINGLE]
        self._files = {file: stack.enter_context(_open(folder / file)) for file in files}
        self._held = {file: frozenset(opened.keys()) for file, opened in self._files.items()}
        self._names = names or dict.fromkeys(self._held[SINGLE], SINGLE)

    def check(self, weight: Weight) -> None:
        """Raise ConfigError unless every part is there in its shape."""
        for part in weight.parts:
            path = self._path(part.name)
            found = tuple(self._files[path.name].get_slice(part.name).get_shape())
            if found != part.shape:
                raise ConfigError(
                    f"{path}: tensor {part.name}: found shape {list(found)},"
                    f" expected {list(part.shape)} (from config.json)"
                )

    def read(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """The parts, stacked and cast. Shape `weight.shape`."""
        out = torch.empty(weight.shape, dtype=dtype)
        row = 0
        for part in weight.parts:
            tensor = self._files[self._path(part.name).name].get_tensor(part.name)
            if not tensor.is_floating_point():
                raise ConfigError(
                    f"{self._path(part.name)}: tensor {part.name}: found {tensor.dtype},"
                    " expected floating point: quantised weights are not supported"
                )
            out[row : row + part.shape[0]].copy_(tensor)
            row += part.shape[0]
        return out

    def _path(self, name: str) -> Path:
        file = self._names.get(name)
        if file is None:
            where = self._index or self._folder / SINGLE
            raise ConfigError(f"{where}: tensor {name}: found nothing, expected by config.json")
        if name not in self._held[file]:
            raise ConfigError(
                f"{self._folder / file}: tensor {name}: found nothing, expected by {INDEX}"
            )
        return self._folder / file

    def _shards(self) -> dict[str, str]:
        """Tensor name -> file name, from the index."""
        path = self._folder / INDEX
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: weight_map: not readable: {error!r}, expected an object of"
                " tensor name to file name"
            ) from None
        if not isinstance(names, dict) or not all(_is_file_name(n) for n in names.values()):
            raise ConfigError(f"{path}: weight_map: expected tensor names to *.safetensors names")
        return names


def _is_file_name(name: object) -> bool:
    """A bare name: an index must not lead out of its folder."""
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ConfigError(_missing(path)) from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path}: damaged: found {path.stat().st_size} bytes that are not whole"
            f" safetensors: {error}"
        ) from None


def _missing(path: Path) -> str:
    pickled = sorted(file.name for file in path.parent.glob("*.bin"))
    if path.name == SINGLE and pickled:
        return (
            f"{path}: no such file; found {pickled[0]}, expected safetensors: pickled weights can"
            " run code and are not read"
        )
    return f"{path}: no such file; expected {SINGLE}, or {INDEX} and its shards"
