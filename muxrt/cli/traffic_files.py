"""What `muxrt traffic` reads and writes."""

import csv
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from time import time

from muxrt.config.load import load
from muxrt.config.placement import Slo
from muxrt.errors import ConfigError
from muxrt.server.traffic_files import Entry, add_history, newest_s, read_entries
from muxrt.workload.trace import read_trace

HOUR_S = 3600.0
# As `muxrt simulate` reads them; the others are for people.
HEADERS = {"at_s": "time", "prompt_tokens": "prompt", "output_tokens": "output"}


def read(log: Path, hours: float | None) -> Iterator[Entry]:
    """The requests day by day, those of the last `hours` before the newest one.

    Raises ConfigError for what is no log, and for one without requests.
    """
    last_s = newest_s(log)
    if last_s is None:
        raise ConfigError(f"{log}: the log has no requests yet")
    return read_entries(log, -inf if hours is None else last_s - hours * HOUR_S)


def targets(config: Path | None) -> dict[str, Slo | None]:
    """Those of the models that `config` serves."""
    return {} if config is None else {model.name: model.slo for model in load(config).models}


def write_csv(path: Path, entries: Iterable[Entry]) -> None:
    """All columns; what has no value is empty. Raises ConfigError."""
    if path.suffix != ".csv":
        raise ConfigError(
            f"found --export {path}, expected a name that ends in .csv: Parquet is not written,"
            " as nothing here depends on a library for it"
        )
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([HEADERS.get(name, name) for name in Entry._fields])
            count = 0
            for entry in entries:
                writer.writerow(entry)
                count += 1
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    print(f"{count} requests are in {path}")


def take_in(log: Path, trace: Path, model: str | None, ends: str | None) -> None:
    """Add a trace to a log, as requests that were answered. Raises ConfigError."""
    rows = read_trace(trace)
    last_s = time() if ends is None else point_in_time("--ends", ends)
    start_s = last_s - rows[-1].at_s
    entries = []
    for row in rows:
        name = row.model or model
        if name is None:
            raise ConfigError(f"{trace}: names no models, expected --model beside it")
        tokens = row.prompt_tokens, row.output_tokens
        entries.append(Entry(start_s + row.at_s, name, *tokens, None, None, 200, None, None, 1))
    count = add_history(log, entries)
    first, last = (datetime.fromtimestamp(s, UTC) for s in (start_s, last_s))
    print(f"{count} requests from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC are in {log}")


def point_in_time(option: str, text: str) -> float:
    """Seconds since 1970, of a time in UTC unless it says otherwise. Raises ConfigError."""
    try:
        point = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"found {option} {text}, expected a time: 2026-01-31T12:00") from None
    return (point if point.tzinfo else point.replace(tzinfo=UTC)).timestamp()
