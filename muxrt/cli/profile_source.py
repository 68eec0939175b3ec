"""What `muxrt profile` is told to measure."""

from dataclasses import dataclass
from pathlib import Path

from muxrt.cli.check import check_file
from muxrt.config.model import ModelShape, load_shape
from muxrt.config.placement import ModelSpec
from muxrt.config.schema import parse_bytes
from muxrt.cost.model import arithmetic
from muxrt.engine.build import kv_dtype, linear_dtype, weight_dtype
from muxrt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Subject:
    """Models that differ in what their steps cost; others of the same shape and dtypes are as they.

    `alike` maps the name of each that was left out to the one that stands for it.
    """

    source: Path
    specs: tuple[ModelSpec, ...]
    shapes: dict[str, ModelShape]
    alike: dict[str, str]


def load_source(path: Path, device: str = "cpu") -> Subject:
    """The models of a file of `muxrt serve`, or of one Hugging Face folder. Raises ConfigError."""
    if path.is_dir():
        spec = ModelSpec(name=path.absolute().name, path=str(path.absolute()))
        return Subject(path, (spec,), {spec.name: load_shape(path)}, {})
    if not path.exists():
        raise ConfigError(f"{path}: found nothing, expected a YAML file or a model folder")
    checked = check_file(path)
    first: dict[object, ModelSpec] = {}
    alike = {}
    for spec in checked.config.models:
        shape = checked.shapes[spec.name]
        dtypes = tuple(of(spec, shape, device) for of in (linear_dtype, weight_dtype, kv_dtype))
        kept = first.setdefault((arithmetic(shape), dtypes), spec)
        if kept is not spec:
            alike[spec.name] = kept.name
    specs = tuple(first.values())
    return Subject(path, specs, {spec.name: checked.shapes[spec.name] for spec in specs}, alike)


def parse_size(option: str, text: str) -> int:
    """A size in bytes, above 0. Raises ConfigError."""
    found = int(text) if text.isdecimal() else parse_bytes(text)
    if not found:
        raise ConfigError(f"{option}: found {text!r}, expected a size such as 64MiB or 1.5GiB")
    return found
