"""Reading safetensors into fused, packed weights, checked by name and shape before any copy."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from muxrt.config.model import ModelShape
from muxrt.config.shard import Shard
from muxrt.errors import ConfigError
from muxrt.kernels import Pages, pack_into, packed_elems

Progress = Callable[[int, int], None]  # bytes done, bytes in all
State = dict[str, Tensor]
WHOLE = Shard()  # of one device that holds everything

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One published tensor and its shape; a rank may hold only some of its rows or columns."""

    name: str
    shape: tuple[int, ...]
    rows: range | None = None  # None = all
    columns: range | None = None

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of what is held."""
        cuts = (self.rows, self.columns)[: len(self.shape)]
        sizes = zip(self.shape, cuts, strict=False)
        return tuple(size if cut is None else len(cut) for size, cut in sizes)


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
        """Of what is held."""
        return (sum(part.held[0] for part in self.parts), *self.parts[0].held[1:])


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


def list_weights(shape: ModelShape, shard: Shard = WHOLE) -> Iterator[Weight]:
    """Every weight that a rank holds of a model of this shape, in order of use."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    rows = shard.vocab(shape)
    embedding = (Part("model.embed_tokens.weight", (vocab, hidden), rows),)
    if shape.tied_embeddings:
        yield Weight("head", embedding, Kind.TIED)
    else:
        yield Weight("embedding", embedding, Kind.TABLE)
    for layer in range(shape.num_layers):
        yield from _attention_weights(shape, shard, layer)
        yield from _mlp_weights(shape, shard, layer)
    yield _norm("norm", "model.norm", hidden)
    if not shape.tied_embeddings:
        yield Weight("head", (Part("lm_head.weight", (vocab, hidden), rows),))


def _attention_weights(shape: ModelShape, shard: Shard, layer: int) -> Iterator[Weight]:
    hidden, head_dim = shape.hidden_size, shape.head_dim
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    attention = f"{theirs}.self_attn"
    heads = _features(shard.heads(shape), head_dim)
    kv_heads = _features(shard.kv_heads(shape), head_dim)
    q, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    yield _norm(f"{ours}.input_norm", f"{theirs}.input_layernorm", hidden)
    qkv = {"q_proj": (q, heads), "k_proj": (kv, kv_heads), "v_proj": (kv, kv_heads)}
    cuts = {f"{attention}.{name}": cut for name, cut in qkv.items()}
    yield from _by_outputs(f"{ours}.qkv", cuts, hidden, shape.qkv_bias)
    if shape.qk_norm:
        yield _norm(f"{ours}.q_norm", f"{attention}.q_norm", head_dim)
        yield _norm(f"{ours}.k_norm", f"{attention}.k_norm", head_dim)
    bias = shape.output_bias and not shard.rank
    yield from _by_inputs(f"{ours}.output", f"{attention}.o_proj", hidden, q, heads, bias)


def _mlp_weights(shape: ModelShape, shard: Shard, layer: int) -> Iterator[Weight]:
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    held = shard.intermediate(shape)
    yield _norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", hidden)
    cuts = {f"{theirs}.mlp.{name}": (mlp, held) for name in ("gate_proj", "up_proj")}
    yield from _by_outputs(f"{ours}.gate_up", cuts, hidden, shape.mlp_bias, pieces=2)
    bias = shape.mlp_bias and not shard.rank  # sums over the ranks hold it once
    yield from _by_inputs(f"{ours}.down", f"{theirs}.mlp.down_proj", hidden, mlp, held, bias)


def _norm(name: str, published: str, width: int) -> Weight:
    return Weight(name, (Part(f"{published}.weight", (width,)),), Kind.NORM)


def _by_outputs(
    name: str, cuts: Mapping[str, tuple[int, range]], width: int, bias: bool, pieces: int = 1
) -> Iterator[Weight]:
    """Linear layers side by side, each with its outputs and which of them are held."""
    weights = tuple(Part(f"{part}.weight", (n, width), held) for part, (n, held) in cuts.items())
    yield Weight(name, weights, pieces=pieces)
    if bias:
        biases = tuple(Part(f"{part}.bias", (n,), held) for part, (n, held) in cuts.items())
        yield Weight(f"{name}.bias", biases, Kind.NORM)


def _by_inputs(
    name: str, published: str, features: int, width: int, held: range, bias: bool
) -> Iterator[Weight]:
    """A linear layer of which some inputs are held; its outputs are sums over the ranks."""
    yield Weight(name, (Part(f"{published}.weight", (features, width), columns=held),))
    if bias:
        yield Weight(f"{name}.bias", (Part(f"{published}.bias", (features,)),), Kind.NORM)


def _features(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


class Loaded(NamedTuple):
    """Weights, and how much of the files they were made of."""

    state: State
    bytes_read: int


def load_weights(
    folder: Path,
    shape: ModelShape,
    dtypes: DTypes,
    progress: Progress | None = None,
    shard: Shard = WHOLE,
) -> Loaded:
    """A rank's weights of the model in `folder`, linear ones packed (`muxrt.kernels.Packed`).

    A linear layer is under its name, with its scales under `NAME.scales` if it is int8. Peak
    memory is that of the result and one weight. Raises ConfigError where a file or tensor is
    missing, damaged, or not of the shape that config.json promises.
    """
    weights = list(list_weights(shape, shard))
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
        return Loaded(state, checkpoint.bytes_read)
    raise AssertionError("an exit stack swallows nothing")


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
        self.bytes_read = 0  # of tensors' data

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
        """What is held of the published tensors, one by one.

        Whole ones are views of the file, of which nothing is read yet; of others only what is held
        is copied out of it.
        """
        for part in weight.parts:
            file = self._files[self._path(part.name).name]
            is_whole = part.held == part.shape
            tensor = file.get_tensor(part.name) if is_whole else _slice(file, part)
            self.bytes_read += tensor.nbytes
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
    rows: tuple[Tensor, ...] = stacked.split([part.held[0] for part in weight.parts])
    return rows


def _slice(file: safe_open, part: Part) -> Tensor:
    rows = slice(None) if part.rows is None else slice(part.rows.start, part.rows.stop)
    published: Any = file.get_slice(part.name)  # type: ignore[no-untyped-call]
    if part.columns is None:
        tensor: Tensor = published[rows]
    else:
        tensor = published[rows, part.columns.start : part.columns.stop]
    return tensor


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
