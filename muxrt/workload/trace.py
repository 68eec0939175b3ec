"""Reading request traces: Azure's LLM inference traces, and MuxServe's workloads."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from muxrt.config.muxserve import is_muxserve_workload, load_muxserve_workload
from muxrt.errors import ConfigError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


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
    return [TraceRow(row.at_s - start_s, row.prompt_tokens, row.output_tokens) for row in rows]


def _rows(path: Path, file: Iterator[str]) -> Iterator[TraceRow]:
    lines = csv.DictReader(line for line in file if not line.startswith("#"))
    missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
    if missing:
        raise ConfigError(
            f"{path}: no column {missing[0]}, expected a CSV with the header {','.join(COLUMNS)}"
        )
    for line in lines:
        try:
            yield TraceRow(
                _seconds(line["TIMESTAMP"]),
                int(line["ContextTokens"]),
                int(line["GeneratedTokens"]),
            )
        except (ValueError, TypeError):
            raise ConfigError(
                f"{path}:{lines.line_num}: found {','.join(str(v) for v in line.values())},"
                " expected a time and two whole numbers"
            ) from None


def _seconds(text: str) -> float:
    """A point in time: plain seconds, or `2023-11-16 18:15:46.6805900`."""
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
