"""Checks plain values against a `msgspec.Struct`: the first wrong one is named, with what fits."""

import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from muxrt.config.document import Document, Key, KeyedError, dotted

T = TypeVar("T", bound=msgspec.Struct)

SIZE_UNITS = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*")
DURATION_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}
# Patterns of text, for `Meta(pattern=...)`, and what they are called.
DURATION = r"^\d+(\.\d+)?\s*(s|min|h|d)$"
TIME_OF_DAY = r"^([01]?\d|2[0-3]):[0-5]\d$"
_PATTERNS = {
    DURATION: "a duration such as 24h, 90min or 30s",
    TIME_OF_DAY: 'a time of day in quotes, such as "04:00"',
}
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def convert(document: Document, target: type[T]) -> T:
    """The document as a `target`. Raises ConfigError naming file, line, key, found, expected."""
    try:
        value = _check(inspect.type_info(target), document.value, ())
        return msgspec.convert(value, target)
    except KeyedError as problem:
        raise document.locate(problem) from None


def parse_bytes(text: str) -> int | None:
    """`64MiB`, `1.5GiB`, `100MB` in bytes; None where it is no size."""
    match = _SIZE.fullmatch(text)
    units = {name.lower(): factor for name, factor in SIZE_UNITS.items()}
    if match is None or match[2].lower() not in units:
        return None
    return round(float(match[1]) * units[match[2].lower()])


def seconds_of(duration: str) -> float:
    """Of text that fits `DURATION`: `90min` is 5400."""
    number = duration.rstrip("sminhd").rstrip()
    return float(number) * DURATION_UNITS_S[duration[len(number) :].strip()]


def _check(kind: inspect.Type, value: Any, key: Key) -> Any:
    """`value` with sizes turned into numbers, if it fits `kind`."""
    return _CHECKS[type(kind)](kind, value, key)


def _struct(kind: inspect.StructType, value: Any, key: Key) -> dict[str, Any]:
    fields = {field.encode_name: field for field in kind.fields}
    if not isinstance(value, dict):
        raise _wrong(key, value, f"a mapping with {', '.join(fields)}")
    for name in value:
        if name not in fields:
            raise KeyedError((*key, name), _unknown_key(name, list(fields)))
    for name, field in fields.items():
        if field.required and name not in value:
            where = f"in {dotted(key)}" if key else "in this file"
            raise KeyedError(
                key, f"{name} is missing {where}, expected {_describe(field.type, name)}"
            )
    return {name: _check(fields[name].type, item, (*key, name)) for name, item in value.items()}


def _array(kind: inspect.VarTupleType, value: Any, key: Key) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(key, value, _describe(kind, ""))
    return [_check(kind.item_type, item, (*key, index)) for index, item in enumerate(value)]


def _union(kind: inspect.UnionType, value: Any, key: Key) -> Any:
    """`X | None`, the only union of the schema."""
    if value is None:
        return None
    (some,) = (option for option in kind.types if not isinstance(option, inspect.NoneType))
    return _check(some, value, key)


def _integer(kind: inspect.IntType, value: Any, key: Key) -> int:
    if isinstance(value, str) and _is_size(key):
        value = parse_bytes(value) or value
    if isinstance(value, bool) or not isinstance(value, int) or not _in_bounds(kind, value):
        raise _wrong(key, value, _describe(kind, key[-1]))
    return value


def _number(kind: inspect.FloatType, value: Any, key: Key) -> float:
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)  # YAML 1.1 takes 1e-3 for text
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not _in_bounds(kind, value):
        raise _wrong(key, value, _describe(kind, key[-1]))
    return float(value)


def _text(kind: inspect.StrType, value: Any, key: Key) -> str:
    if not isinstance(value, str) or not _is_like(kind, value):
        raise _wrong(key, value, _describe(kind, key[-1]))
    return value


def _flag(kind: inspect.BoolType, value: Any, key: Key) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, _describe(kind, key[-1]))
    return value


def _choice(kind: inspect.LiteralType, value: Any, key: Key) -> Any:
    if value not in kind.values or isinstance(value, bool):
        raise _wrong(key, value, _describe(kind, key[-1]) + _hint(value, kind.values))
    return value


_CHECKS: dict[type, Callable[[Any, Any, Key], Any]] = {
    inspect.StructType: _struct,
    inspect.VarTupleType: _array,
    inspect.UnionType: _union,
    inspect.IntType: _integer,
    inspect.FloatType: _number,
    inspect.StrType: _text,
    inspect.BoolType: _flag,
    inspect.LiteralType: _choice,
}


def _is_like(kind: inspect.StrType, value: str) -> bool:
    is_long = len(value) >= (kind.min_length or 0)
    return is_long and (kind.pattern is None or re.search(kind.pattern, value) is not None)


def _in_bounds(kind: inspect.IntType | inspect.FloatType, value: float) -> bool:
    return (
        (kind.ge is None or value >= kind.ge)
        and (kind.gt is None or value > kind.gt)
        and (kind.le is None or value <= kind.le)
        and (kind.lt is None or value < kind.lt)
    )


def _is_size(key: Key) -> bool:
    return str(key[-1]).endswith("_bytes")


def _describe(kind: inspect.Type, name: str | int) -> str:
    """What fits `kind`, in words; the unit comes from the suffix of the key."""
    match kind:
        case inspect.StructType(fields=fields):
            return f"a mapping with {', '.join(field.encode_name for field in fields)}"
        case inspect.VarTupleType(item_type=item):
            return f"a list, each item {_describe(item, name)}"
        case inspect.UnionType(types=types):
            some = [option for option in types if not isinstance(option, inspect.NoneType)]
            return _describe(some[0], name)
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(str(value) for value in values)}"
        case inspect.IntType() if str(name).endswith("_bytes"):
            return "a size such as 64MiB or 1.5GiB, or a whole number of bytes" + _bounds(kind)
        case inspect.IntType():
            return "a whole number" + _bounds(kind)
        case inspect.FloatType() if str(name).endswith("_s"):
            return "a number of seconds" + _bounds(kind)
        case inspect.FloatType():
            return "a number" + _bounds(kind)
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType(pattern=str(pattern)):
            return _PATTERNS[pattern]
    return "text"


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    low = f" of at least {kind.ge}" if kind.ge is not None else ""
    low = f" above {kind.gt}" if kind.gt is not None else low
    high = f"at most {kind.le}" if kind.le is not None else ""
    return f"{low} and {high}" if low and high else low or (high and f" of {high}")


def _wrong(key: Key, found: Any, expected: str) -> KeyedError:
    return KeyedError(key, f"found {_show(found)}, expected {expected}")


def _show(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return repr(value)
    return str(value)


def _unknown_key(name: str, known: list[str]) -> str:
    return f"unknown key{_hint(name, known)}; allowed here: {', '.join(known)}"


def _hint(found: Any, known: Any) -> str:
    close = get_close_matches(str(found), [str(option) for option in known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
