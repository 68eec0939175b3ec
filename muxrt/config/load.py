"""Reading and writing the file of `muxrt serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from muxrt.config.document import Document, Key, KeyedError, read_document
from muxrt.config.placement import Count
from muxrt.config.schema import convert
from muxrt.config.serve import Admin, ServeConfig, check_references

ONE_UNIT = "main"  # the unit that a file without `units` gets


class _Budget(msgspec.Struct):
    """The short form's own key, so that its errors name it."""

    kv_bytes: Count


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A configuration and the text it came from, so that later errors can name the line."""

    config: ServeConfig
    document: Document


def load(path: Path) -> ServeConfig:
    """The configuration in `path`. Raises ConfigError (one line: file, key, found, expected)."""
    return load_file(path).config


def load_file(path: Path) -> ServeFile:
    """`load`, keeping the document."""
    document = with_units(read_document(path))
    config = resolve(convert(document, ServeConfig), path.absolute().parent)
    try:
        check_references(config)
    except KeyedError as problem:
        raise document.locate(problem) from None
    return ServeFile(config, document)


def with_units(document: Document) -> Document:
    """Spell out the short form: top-level `kv_bytes` means one unit with every model."""
    value = document.value
    if not isinstance(value, dict) or ("units" in value and "kv_bytes" not in value):
        return document
    if "units" in value:
        raise document.locate(
            KeyedError(
                ("kv_bytes",), "with units, each has its own: move it to units[i].memory.kv_bytes"
            )
        )
    if "kv_bytes" not in value:
        if "models" not in value:
            return document  # the schema's own error is the better one
        raise document.locate(
            KeyedError(
                (),
                "neither units nor kv_bytes is there, expected units (a list), or kv_bytes such as"
                " 64MiB: the KV memory of one unit with every model on every core",
            )
        )
    return _one_unit(document)


def _one_unit(document: Document) -> Document:
    written = Document(document.name, {"kv_bytes": document.value["kv_bytes"]}, document.lines)
    rest = {key: item for key, item in document.value.items() if key != "kv_bytes"}
    models = rest.get("models")
    names = [
        {"name": model["name"]}
        for model in (models if isinstance(models, list) else [])
        if isinstance(model, dict) and isinstance(model.get("name"), str)
    ]
    memory = {"kv_bytes": convert(written, _Budget).kv_bytes}
    unit: dict[str, Any] = {"name": ONE_UNIT, "models": names, "memory": memory}
    lines = {**document.lines, ("units",): document.lines[("kv_bytes",)]}
    written_as: dict[Key, Key] = {("units", 0, "memory", "kv_bytes"): ("kv_bytes",)}
    return Document(document.name, {**rest, "units": [unit]}, lines, written_as)


def resolve(config: ServeConfig, folder: Path) -> ServeConfig:
    """`config` with every relative path taken from `folder`, `~` included."""
    models = tuple(
        msgspec.structs.replace(model, path=model.path and _resolved(model.path, folder))
        for model in config.models
    )
    endpoint = config.endpoint
    if endpoint.api_keys is not None and endpoint.api_keys.file is not None:
        file = _resolved(endpoint.api_keys.file, folder)
        keys = msgspec.structs.replace(endpoint.api_keys, file=file)
        endpoint = msgspec.structs.replace(endpoint, api_keys=keys)
    traffic = config.traffic
    if traffic is not None:
        traffic = msgspec.structs.replace(traffic, path=_resolved(traffic.path, folder))
    admin = config.admin and _resolved_admin(config.admin, folder)
    replan = config.replan
    if replan is not None:
        replan = msgspec.structs.replace(replan, plan=_resolved(replan.plan, folder))
    return msgspec.structs.replace(
        config, models=models, endpoint=endpoint, traffic=traffic, admin=admin, replan=replan
    )


def _resolved_admin(admin: Admin, folder: Path) -> Admin:
    keys, journal = admin.keys, admin.journal and _resolved(admin.journal, folder)
    if keys.file is not None:
        keys = msgspec.structs.replace(keys, file=_resolved(keys.file, folder))
    return msgspec.structs.replace(admin, keys=keys, journal=journal)


def _resolved(path: str, folder: Path) -> str:
    # Not Path.resolve(): a link to a model folder is the name the user knows it by.
    return str(folder / Path(path).expanduser())


def dump(config: ServeConfig) -> str:
    """YAML that `load` reads back as an equal configuration; defaults are left out."""
    return yaml.safe_dump(stated(config), sort_keys=False, allow_unicode=True)


def stated(value: Any) -> Any:
    """`value` as plain data, without what equals its default."""
    if isinstance(value, msgspec.Struct):
        pairs = [(field, getattr(value, field.name)) for field in msgspec.structs.fields(value)]
        return {field.encode_name: stated(item) for field, item in pairs if item != field.default}
    if isinstance(value, tuple):
        return [stated(item) for item in value]
    return value
