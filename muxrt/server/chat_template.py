"""Chat messages to one prompt, by the template that the model was published with."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from muxrt.errors import BadRequest, ConfigError

DEFAULT = "default"


class ChatTemplate:
    """A compiled template. It is other people's code: it runs in jinja's sandbox."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self._special = dict(special)
        self._template = _environment().from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that lets the model answer. Raises BadRequest where the template refuses."""
        try:
            return self._template.render(
                **self._special, messages=messages, add_generation_prompt=True, tools=None
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of the model in `folder`; None where it has none. Raises ConfigError."""
    config = _read_json(folder / "tokenizer_config.json")
    source = _source(folder, config)
    if source is None:
        return None
    special = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
    try:
        return ChatTemplate(source, special)
    except jinja2.TemplateError as error:
        raise ConfigError(f"{folder}: the chat template is not valid jinja: {error}") from None


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own comes before the config's text, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get(DEFAULT)
        if source is None:
            names = ", ".join(str(name) for name in named)
            raise ConfigError(
                f"{folder}/tokenizer_config.json: chat_template: found {names},"
                f" expected one named {DEFAULT}"
            )
    if source is None or isinstance(source, str):
        return source
    raise ConfigError(f"{folder}/tokenizer_config.json: chat_template: expected text or a list")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, written as text or as an object around it."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _environment() -> ImmutableSandboxedEnvironment:
    """What published templates expect to find (the names are transformers')."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, **options: Any) -> str:
    # jinja's own escapes HTML, which a prompt is not.
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
