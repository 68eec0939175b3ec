"""A YAML file as plain values that remember the lines they came from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from muxrt.errors import ConfigError

Key = tuple[str | int, ...]

# Deeper than any schema of ours; an alias that contains itself would nest without end.
MAX_DEPTH = 32


def dotted(key: Key) -> str:
    """`("units", 0, "memory")` as people write it: `units[0].memory`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class KeyedError(ConfigError):
    """A wrong value, by its key; `Document.locate` adds the file and the line."""

    def __init__(self, key: Key, text: str) -> None:
        super().__init__(f"{dotted(key)}: {text}" if key else text)
        self.key = key
        self.text = text


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    `lines` maps a key to the line (from 1) where it is written; `written_as` maps a key that a
    short form stands for to what the file says instead.
    """

    name: str
    value: Any
    lines: dict[Key, int] = field(default_factory=dict)
    written_as: dict[Key, Key] = field(default_factory=dict)

    def locate(self, problem: KeyedError) -> ConfigError:
        """The same error with `file:line` in front: the line of the key or of what encloses it."""
        key = self.written_as.get(problem.key, problem.key)
        message = KeyedError(key, problem.text).message
        while key and key not in self.lines:
            key = key[:-1]
        return ConfigError(f"{self.name}:{self.lines.get(key, 1)}: {message}")


def read_document(path: Path) -> Document:
    """Read a YAML file. Raises ConfigError where it is missing, unreadable or not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """Parse YAML text; `name` stands for the file in errors."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        document = Document(name, None)
        if root is None:
            return document
        reader = _Reader(loader, document)
        return Document(name, reader.value(root, ()), document.lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {error}") from None
    finally:
        loader.dispose()


class _Reader:
    """Turns nodes into values and notes where each key begins."""

    def __init__(self, loader: yaml.SafeLoader, document: Document) -> None:
        self._loader = loader
        self._document = document

    def value(self, node: yaml.Node, key: Key) -> Any:
        self._document.lines.setdefault(key, node.start_mark.line + 1)
        if len(key) > MAX_DEPTH:
            raise self._error(key, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, yaml.MappingNode):
            return dict(self._items(node, key))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        return self._scalar(node, key)

    def _scalar(self, node: yaml.Node, key: Key) -> Any:
        try:
            return self._loader.construct_object(node)
        except ValueError as error:  # 2024-13-45 looks like a date to YAML
            raise self._error(key, f"not a value that YAML knows: {error}") from None

    def _items(self, node: yaml.MappingNode, key: Key) -> Iterator[tuple[str, Any]]:
        self._refuse_twins(node, key)
        self._loader.flatten_mapping(node)  # `<<: *defaults`; the file's own keys come last
        for name_node, value_node in node.value:
            name = str(name_node.value)
            self._document.lines[(*key, name)] = name_node.start_mark.line + 1
            yield name, self.value(value_node, (*key, name))

    def _refuse_twins(self, node: yaml.MappingNode, key: Key) -> None:
        seen: dict[str, int] = {}
        for name_node, _ in node.value:
            name, line = str(name_node.value), name_node.start_mark.line + 1
            if name in seen:
                self._document.lines[(*key, name)] = line
                raise self._error((*key, name), f"written twice, first on line {seen[name]}")
            seen[name] = line

    def _error(self, key: Key, text: str) -> ConfigError:
        return self._document.locate(KeyedError(key, text))
