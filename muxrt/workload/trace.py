"""Reading traces: Azure's, any CSV that says the same otherwise, and MuxServe's workloads."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from muxrt.config.muxserve import is_muxserve_workload, load_muxserve_workload
from muxrt.errors import ConfigError

# What a column may be called, in any case. Seconds or a date and time; tokens.
HEADERS = {
    "time": ("timestamp", "time", "time_s", "at_s", "arrived_at", "arrival_timestamp"),
    "model": ("model", "model_name"),
    "prompt": ("contexttokens", "prompt", "prompt_tokens", "prompt_size", "num_prefill_tokens"),
    "output": ("generatedtokens", "output", "output_tokens", "token_size", "num_decode_tokens"),
}
OPTIONAL = "model"


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request; `at_s` counts from the first row."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    model: str | None = None  # None: the trace does not say


def read_trace(path: Path) -> list[TraceRow]:
    """The rows in order of time. Raises ConfigError with file and line where one is malformed."""
    if is_muxserve_workload(path):
        found = load_muxserve_workload(path).requests
        return [TraceRow(r.at_s, r.prompt_tokens, r.output_tokens, r.model) for r in found]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = sorted(_rows(path, file), key=lambda row: row.at_s)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such trace") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    if not rows:
        raise ConfigError(f"{path}: the trace has no requests")
    start_s = rows[0].at_s
    return [replace(row, at_s=row.at_s - start_s) for row in rows]


def _rows(path: Path, file: Iterator[str]) -> Iterator[TraceRow]:
    lines = csv.DictReader(line for line in file if not line.startswith("#"))
    names = _columns(path, lines.fieldnames or ())
    model = names.get("model")
    for line in lines:
        try:
            yield TraceRow(
                _seconds(line[names["time"]]),
                int(line[names["prompt"]]),
                int(line[names["output"]]),
                line[model] if model is not None else None,
            )
        except (ValueError, TypeError):
            raise ConfigError(
                f"{path}:{lines.line_num}: found {','.join(str(v) for v in line.values())},"
                " expected a time and two whole numbers"
            ) from None


def _columns(path: Path, found: Sequence[str]) -> dict[str, str]:
    """What the file calls each column that it has."""
    names = {}
    for what, known in HEADERS.items():
        name = next((name for name in found if name.strip().lower() in known), None)
        if name is not None:
            names[what] = name
        elif what != OPTIONAL:
            raise ConfigError(
                f"{path}: no column of the {what}, expected a CSV with a header such as"
                " TIMESTAMP,ContextTokens,GeneratedTokens or time,model,prompt,output"
            )
    return names


def _seconds(text: str) -> float:
    """A point in time: plain seconds, or `2023-11-16 18:15:46.6805900`."""
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
