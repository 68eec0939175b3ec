"""The file that says where measured step times come from, and what they were measured on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from muxrt.config.cluster import GpuKind
from muxrt.config.document import Document, KeyedError, read_document
from muxrt.config.load import stated
from muxrt.config.model import ModelShape
from muxrt.config.placement import Count, Index, Name, NotNegative, Positive, Sizes
from muxrt.config.presets import preset, shape_of_sizes
from muxrt.config.schema import convert
from muxrt.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16", "float8", "int8"]


class ProfiledModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model of the table; its shape is exactly one of preset and sizes."""

    name: Name  # as in the table
    preset: Name | None = None
    sizes: Sizes | None = None
    weights: Dtype | None = None  # of the linear layers; None = not stated
    dtype: Dtype | None = None  # of the other weights
    kv_dtype: Dtype | None = None
    prefill_granularity: Count = 1  # kernels compute tiles: a multiple of so many tokens


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the cells came about."""

    device: Name  # for people
    cores: Count  # of the mesh; of a GPU its SMs
    lanes: tuple[Count, ...]  # cores, or SMs, of the lanes that were measured
    date: Name
    muxrt: Name
    commit: Name | None = None  # of a checkout
    versions: Name  # of Python and the libraries that compute
    load_average: NotNegative = 0.0  # of the machine when it began
    seconds: Positive
    bursts: Index  # of each cell, in the median: each a few steps in a row
    statistic: Name
    spread: NotNegative  # of a cell's bursts: interquartile range over the median; its median
    spread_p90: NotNegative  # and 90th percentile over the cells
    is_whole: bool  # false: the budget or Ctrl-C ended it before every cell was measured


class SideBySide(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A prefill on one lane while decodes run on another: times of either alone."""

    prefill: Name
    prefill_tokens: Count
    decode: Name
    batch: Count
    context: Count  # tokens of each sequence
    lanes: tuple[Count, ...]  # cores: of the prefill's lane, of the decodes'
    prefill_slowdown: Positive  # 1.1: takes 10 % longer than alone
    decode_slowdown: Positive


class ProfiledEngine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the engine costs beside its steps, in the words of a plan's `engine:`."""

    interference: NotNegative | None = None  # median slow-down of `side_by_side`, less one
    prefill_interference: NotNegative | None = None  # likewise, of its prefills
    decode_interference: NotNegative | None = None  # and of its decode steps
    control_s: NotNegative | None = None  # of the endpoint, per sequence and decode step
    control_step_s: NotNegative | None = None  # and per step, whatever its size
    request_s: NotNegative | None = None  # from arrival to unit, and first token to client


class ServiceRatio(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Steps of a model among others in service, over those of the table."""

    model: Name
    prefill: Positive = 1.0
    decode: Positive = 1.0


class ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that is not in the table."""

    title: Name
    source: Name
    licence: Name
    gpu: Name  # a kind: a known one, `kind` below, or one that a plan's cluster describes
    table: Name  # CSV; relative to this file
    # What the table holds: cells that were measured, or what other people's planners go by
    # (cost/coefficients.py, cost/knots.py).
    form: Literal["cells", "distserve", "splitwise"] = "cells"
    models: tuple[ProfiledModel, ...]
    kind: GpuKind | None = None
    sm_percent: Name | None = None  # what a share means where there are no SMs, for people
    engine: ProfiledEngine = ProfiledEngine()
    side_by_side: tuple[SideBySide, ...] = ()
    in_service: tuple[ServiceRatio, ...] = ()
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class ReadProfile:
    """A checked profile file with the shapes of its models; `table` is absolute."""

    file: ProfileFile
    document: Document
    shapes: dict[str, ModelShape]
    table: Path


def read_profile(path: Path) -> ReadProfile:
    """The YAML file `path`, but not its table.

    Raises ConfigError (one line: file, line, key, found, expected).
    """
    document = read_document(path)
    file = convert(document, ProfileFile)
    try:
        for problem in _problems(file):
            raise problem
        shapes = {m.name: _shape(index, m) for index, m in enumerate(file.models)}
    except KeyedError as problem:
        raise document.locate(problem) from None
    table = path.absolute().parent / Path(file.table).expanduser()
    return ReadProfile(file, document, shapes, table)


def _problems(file: ProfileFile) -> Iterator[KeyedError]:
    if file.kind is not None and file.kind.name != file.gpu:
        yield KeyedError(
            ("kind", "name"), f"found {file.kind.name!r}, expected the profile's gpu, {file.gpu!r}"
        )
    for index, model in enumerate(file.models):
        if (model.preset is None) == (model.sizes is None):
            found = "neither" if model.preset is None else "both"
            yield KeyedError(
                ("models", index), f"found {found} of preset and sizes, expected exactly one"
            )


def _shape(index: int, model: ProfiledModel) -> ModelShape:
    if model.sizes is not None:
        return shape_of_sizes(model.sizes)
    assert model.preset is not None, "checked before"
    try:
        return preset(model.preset)
    except ConfigError as error:
        raise KeyedError(("models", index, "preset"), error.message) from None


def dump_profile(file: ProfileFile) -> str:
    """YAML that `read_profile` reads back as an equal file; defaults are left out."""
    text: str = yaml.safe_dump(stated(file), sort_keys=False, allow_unicode=True, width=100)
    return text


def sizes_of(shape: ModelShape) -> Sizes:
    """The sizes that `shape_of_sizes` makes a shape of the same arithmetic from."""
    return Sizes(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
        tied_embeddings=shape.tied_embeddings,
    )
