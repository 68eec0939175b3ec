"""Reading safetensors into fused, packed weights, checked by name and shape before any copy."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from muxrt.config.model import ModelShape
from muxrt.errors import ConfigError
from muxrt.kernels import Pages, pack_into, packed_elems

Progress = Callable[[int, int], None]  # bytes done, bytes in all
State = dict[str, Tensor]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One published tensor and its shape."""

    name: str
    shape: tuple[int, ...]


class Kind(Enum):
    """What a weight is for, which decides how it is kept."""

    NORM = "norm"  # norms and biases: float32 whatever the dtype of the rest
    TABLE = "table"  # the embedding: rows in the model's dtype
    LINEAR = "linear"  # packed, in the linear layers' dtype
    TIED = "tied"  # embedding and head in one: packed, in the embedding's dtype

    @property
    def is_packed(self) -> bool:
        return self in (Kind.LINEAR, Kind.TIED)


@dataclass(frozen=True, slots=True)
class Weight:
    """One of our tensors: published ones, stacked along the first dimension."""

    name: str
    parts: tuple[Part, ...]
    kind: Kind = Kind.LINEAR
    pieces: int = 1  # equal ones, packed each for itself

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


class TensorPlace(msgspec.Struct, frozen=True):
    """Where a tensor lies in a piece of memory."""

    dtype: str  # a name in torch: "float32", "bfloat16"
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def num_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return prod(self.shape) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class DTypes:
    """Of what is kept: linear layers, which may be int8, and the embedding."""

    linear: torch.dtype
    table: torch.dtype

    def of(self, weight: Weight) -> torch.dtype:
        """In memory."""
        if weight.kind is Kind.NORM:
            return torch.float32
        return self.linear if weight.kind is Kind.LINEAR else self.table


def list_weights(shape: ModelShape) -> Iterator[Weight]:
    """Every weight a model of this shape has, in order of use."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    embedding = (Part("model.embed_tokens.weight", (vocab, hidden)),)
    if shape.tied_embeddings:
        yield Weight("head", embedding, Kind.TIED)
    else:
        yield Weight("embedding", embedding, Kind.TABLE)
    for layer in range(shape.num_layers):
        yield from _layer_weights(shape, layer)
    yield Weight("norm", (Part("model.norm.weight", (hidden,)),), Kind.NORM)
    if not shape.tied_embeddings:
        yield Weight("head", (Part("lm_head.weight", (vocab, hidden)),))


def _layer_weights(shape: ModelShape, layer: int) -> Iterator[Weight]:
    hidden, head_dim, mlp = shape.hidden_size, shape.head_dim, shape.intermediate_size
    q, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    attention = f"{theirs}.self_attn"

    def norm(name: str, published: str, width: int) -> Weight:
        return Weight(f"{ours}.{name}", (Part(f"{published}.weight", (width,)),), Kind.NORM)

    def linear(
        name: str, rows: dict[str, int], width: int, bias: bool, pieces: int = 1
    ) -> Iterator[Weight]:
        weights = tuple(Part(f"{part}.weight", (size, width)) for part, size in rows.items())
        yield Weight(f"{ours}.{name}", weights, pieces=pieces)
        if bias:
            biases = tuple(Part(f"{part}.bias", (size,)) for part, size in rows.items())
            yield Weight(f"{ours}.{name}.bias", biases, Kind.NORM)

    yield norm("input_norm", f"{theirs}.input_layernorm", hidden)
    qkv = {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
    yield from linear("qkv", qkv, hidden, shape.qkv_bias)
    if shape.qk_norm:
        yield norm("q_norm", f"{attention}.q_norm", head_dim)
        yield norm("k_norm", f"{attention}.k_norm", head_dim)
    yield from linear("output", {f"{attention}.o_proj": hidden}, q, shape.output_bias)
    yield norm("mlp_norm", f"{theirs}.post_attention_layernorm", hidden)
    gate_up = {f"{theirs}.mlp.gate_proj": mlp, f"{theirs}.mlp.up_proj": mlp}
    yield from linear("gate_up", gate_up, hidden, shape.mlp_bias, pieces=2)
    yield from linear("down", {f"{theirs}.mlp.down_proj": hidden}, mlp, shape.mlp_bias)


def load_weights(
    folder: Path, shape: ModelShape, dtypes: DTypes, progress: Progress | None = None
) -> State:
    """All weights of the model in `folder`, fused, linear ones packed (`muxrt.kernels.Packed`).

    A linear layer is under its name, with its scales under `NAME.scales` if it is int8. Peak
    memory is that of the result and one weight. Raises ConfigError where a file or tensor is
    missing, damaged, or not of the shape that config.json promises.
    """
    weights = list(list_weights(shape))
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        for weight in weights:
            checkpoint.check(weight)
        sizes = [Pages.rounded(num_bytes(weight, dtypes)) for weight in weights]
        pages, done = Pages(sum(sizes)), 0
        state: State = {}
        for weight, size in zip(weights, sizes, strict=True):
            tensor = pages.tensor(_kept_shape(weight), dtypes.of(weight))
            if weight.kind.is_packed:
                # int8 is made from what was published, not from a rounded copy of it.
                scales = pack_into(tensor, checkpoint.read(weight), weight.pieces)
                if scales is not None:
                    state[f"{weight.name}.scales"] = scales
            else:
                tensor.copy_(checkpoint.read(weight))
            state[weight.name] = tensor
            done += size
            if progress is not None:
                progress(done, sum(sizes))
    return state


def num_bytes(weight: Weight, dtypes: DTypes) -> int:
    """Bytes of `weight` in memory, without scales."""
    return torch.Size(_kept_shape(weight)).numel() * dtypes.of(weight).itemsize


def _kept_shape(weight: Weight) -> tuple[int, ...]:
    if weight.kind.is_packed:
        features, depth = weight.shape
        return (packed_elems(features, depth, weight.pieces),)
    return weight.shape


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

    def read(self, weight: Weight) -> Tensor:
        """The parts, stacked, float32. Shape `weight.shape`."""
        out = torch.empty(weight.shape)
        for rows, tensor in zip(part_rows(weight, out), self.parts(weight), strict=True):
            rows.copy_(tensor)
        return out

    def parts(self, weight: Weight) -> Iterator[Tensor]:
        """The published tensors, one by one: views of the file, of which nothing is read yet."""
        for part in weight.parts:
            tensor = self._files[self._path(part.name).name].get_tensor(part.name)
            if not tensor.is_floating_point():
                raise ConfigError(
                    f"{self._path(part.name)}: tensor {part.name}: found {tensor.dtype},"
                    " expected floating point: quantised weights are not supported"
                )
            yield tensor

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


def part_rows(weight: Weight, stacked: Tensor) -> tuple[Tensor, ...]:
    """Where each part lies in `stacked`, a tensor of `weight.shape`."""
    rows: tuple[Tensor, ...] = stacked.split([part.shape[0] for part in weight.parts])
    return rows


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
