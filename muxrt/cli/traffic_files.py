"""What `muxrt traffic` reads and writes."""

import csv
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from time import time

import msgspec

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


def log_of(config: Path) -> Path:
    """The log that the server of this file keeps. Raises ConfigError."""
    traffic = load(config).traffic
    if traffic is None:
        raise ConfigError(
            f"{config} keeps no traffic log, expected traffic: {{path: FOLDER}} in it"
        )
    return Path(traffic.path)


def targets(config: Path | None) -> dict[str, Slo | None]:
    """Those of the models that `config` serves."""
    return {} if config is None else {model.name: model.slo for model in load(config).models}


def export(path: Path, entries: Iterable[Entry]) -> None:
    """Write the requests, all columns, as CSV or Parquet by the name. Raises ConfigError."""
    write = _writer(path)
    try:
        count = write(path, entries)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None
    print(f"{count} requests are in {path}")


def _writer(path: Path) -> Callable[[Path, Iterable[Entry]], int]:
    if path.suffix == ".csv":
        return write_csv
    if path.suffix != ".parquet":
        raise ConfigError(f"found --export {path}, expected a name that ends in .csv or .parquet")
    try:
        from muxrt.cli.traffic_parquet import write_parquet
    except ImportError as error:
        if error.name != "pyarrow":
            raise
        raise ConfigError(
            f"found --export {path} and no pyarrow, expected it for Parquet: pip install"
            " 'muxrt[parquet]'; .csv needs nothing"
        ) from None
    return write_parquet


def write_csv(path: Path, entries: Iterable[Entry]) -> int:
    """What has no value is empty; how many rows. Raises OSError."""
    count = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([HEADERS.get(name, name) for name in Entry.__struct_fields__])
        for entry in entries:
            writer.writerow(msgspec.structs.astuple(entry))
            count += 1
    return count


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
