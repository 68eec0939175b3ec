"""The files of a traffic log: SQLite databases in a folder, one or more for each day (UTC)."""

import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from muxrt.errors import ConfigError

# In the header of every file: whose it is ("muxT"), and the version of its columns.
APPLICATION_ID, VERSION = 0x6D757854, 1
NAME = re.compile(r"(\d{4}-\d\d-\d\d)\.(\d+)\.db")
BESIDE = ("-wal", "-shm")  # what SQLite keeps next to a file that is open, or was when it died
# A file is full at this part of the folder's bytes: that much history goes when room is needed.
PARTS = 4
WAL_PAGES, PAGE_BYTES = 1000, 4096  # SQLite's defaults
LOCK_WAIT_S = 5.0

TABLE = """
CREATE TABLE requests (
  at_s REAL NOT NULL, model TEXT NOT NULL, prompt_tokens INTEGER, output_tokens INTEGER NOT NULL,
  ttft_s REAL, tpot_s REAL, status INTEGER NOT NULL, unit TEXT, key INTEGER,
  sequences INTEGER NOT NULL)
"""
INSERT = "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
SELECT = "SELECT * FROM requests WHERE at_s >= ? AND at_s < ? ORDER BY at_s, rowid"

# What a planner counts: answers, clients that left, and what there was no room or no unit for.
ASKED = "(status = 200 OR status = 429 OR status >= 499)"
COUNT = f"""
SELECT model, CAST((? - at_s) / ? AS INTEGER) AS back, SUM(sequences), COUNT(*),
  MIN(at_s), MAX(at_s)
FROM requests WHERE at_s < ? AND {ASKED} GROUP BY model, back
"""


class Entry(NamedTuple):
    """One HTTP request to generate, as it ended; in the order of the columns."""

    at_s: float  # when it came, seconds since 1970
    model: str
    prompt_tokens: int | None  # each prompt once; None: refused before it was counted
    output_tokens: int  # of all choices
    ttft_s: float | None  # of its first prompt, as are those of `tpot_s`
    tpot_s: float | None
    status: int  # as in /metrics: 499 = the client left
    unit: str | None  # the last that had it; None: none
    key: int | None  # number of the API key in its source; None where anyone may ask
    sequences: int  # prompts x n


@dataclass(frozen=True, slots=True, order=True)
class LogFile:
    """A file of a log, by age."""

    day: date
    part: int
    path: Path

    @property
    def num_bytes(self) -> int:
        """With what lies beside it."""
        return sum(_size(Path(f"{self.path}{end}")) for end in ("", *BESIDE))

    def delete(self) -> None:
        for end in ("", *BESIDE):
            with suppress(FileNotFoundError):
                Path(f"{self.path}{end}").unlink()


def log_files(folder: Path) -> list[LogFile]:
    """The files of a folder, oldest first; others in it are not looked at."""
    found = []
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name)
        with suppress(ValueError):  # 2026-99-99
            if match is not None:
                found.append(LogFile(date.fromisoformat(match[1]), int(match[2]), path))
    return sorted(found)


class Writer:
    """Adds to a folder and keeps it within bounds. One thread at a time."""

    def __init__(self, folder: Path, keep_days: int, max_bytes: int) -> None:
        self._folder = folder
        self._keep_days, self._max_bytes = keep_days, max_bytes
        self._file: LogFile | None = None
        self._database: sqlite3.Connection | None = None

    def write(self, entries: Sequence[Entry], now_s: float) -> None:
        """Add entries to the file of `now_s`'s day, all or none.

        When this returns, they survive the process, not a power cut. Raises sqlite3.Error, OSError.
        """
        today = datetime.fromtimestamp(now_s, UTC).date()
        database = self._database
        if database is None or self._file is None or not self._has_room(self._file, today):
            database = self._open(today)
        with database:
            database.executemany(INSERT, entries)
        self._trim(today)

    def close(self) -> None:
        """Give the file back; the next entries open it again."""
        if self._database is not None:
            self._database.close()
        self._database = self._file = None

    def _has_room(self, file: LogFile, today: date) -> bool:
        # One that somebody deleted would swallow what is written to it.
        is_there = file.path.exists()
        return is_there and file.day == today and file.num_bytes * PARTS < self._max_bytes

    def _open(self, today: date) -> sqlite3.Connection:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = [file for file in log_files(self._folder) if file.day == today]
        part = 0
        if mine:
            part = mine[-1].part + (not self._has_room(mine[-1], today))
        path = self._folder / f"{today}.{part}.db"
        pages = max(1, min(WAL_PAGES, self._max_bytes // (PARTS * PARTS * PAGE_BYTES)))
        self._database = _open_to_write(path, pages)
        self._file = LogFile(today, part, path)
        return self._database

    def _trim(self, today: date) -> None:
        """Delete what is too old, and then the oldest until all fits."""
        oldest = today - timedelta(days=self._keep_days - 1)
        files = log_files(self._folder)
        total = sum(file.num_bytes for file in files)
        for file in files:
            if file == self._file or (file.day >= oldest and total <= self._max_bytes):
                break
            total -= file.num_bytes
            file.delete()


def add_history(folder: Path, entries: Iterable[Entry]) -> int:
    """Add requests of the past, each to its own day; how many. Raises ConfigError."""
    by_day: dict[date, list[Entry]] = {}
    for entry in entries:
        by_day.setdefault(datetime.fromtimestamp(entry.at_s, UTC).date(), []).append(entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for day, found in by_day.items():
            with closing(_open_to_write(folder / f"{day}.0.db", WAL_PAGES)) as database, database:
                database.executemany(INSERT, found)
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(f"{folder}: cannot be written: {error}") from None
    return sum(map(len, by_day.values()))


def read_entries(
    source: Path, since_s: float = float("-inf"), until_s: float = float("inf")
) -> Iterator[Entry]:
    """The requests that came in [since_s, until_s), file by file, in each by time.

    `source` is the folder of a log or one file of it. Raises ConfigError for what is neither.
    """
    for path in _sources(source):
        try:
            with closing(_open_to_read(path)) as database:
                yield from (Entry(*row) for row in database.execute(SELECT, (since_s, until_s)))
        except sqlite3.Error as error:
            raise _unreadable(path, error) from None


def newest_s(source: Path) -> float | None:
    """When the newest request of a log came; None where there is none. Raises ConfigError."""
    found = []
    for path in _sources(source):
        try:
            with closing(_open_to_read(path)) as database:
                found.append(database.execute("SELECT MAX(at_s) FROM requests").fetchone()[0])
        except sqlite3.Error as error:
            raise _unreadable(path, error) from None
    return max((at_s for at_s in found if at_s is not None), default=None)


@dataclass(frozen=True, slots=True)
class Counted:
    """What was asked of each model, over time."""

    sequences: dict[tuple[str, int], int]  # by model and bin, counted back: 0 is the last one
    first_s: float  # when the first request of the log came
    last_s: float
    requests: int


def count_asked(source: Path, until_s: float, bin_s: float) -> Counted | None:
    """Sequences per model and bin of time before `until_s`; None where no request came by then.

    What was refused for lack of room was asked for, too; what was malformed was not. Raises
    ConfigError.
    """
    sequences: dict[tuple[str, int], int] = {}
    first_s, last_s, requests = float("inf"), float("-inf"), 0
    for path in _sources(source):
        try:
            with closing(_open_to_read(path)) as database:
                for model, back, count, rows, first, last in database.execute(
                    COUNT, (until_s, bin_s, until_s)
                ):
                    sequences[model, back] = sequences.get((model, back), 0) + count
                    first_s, last_s = min(first_s, first), max(last_s, last)
                    requests += rows
        except sqlite3.Error as error:
            raise _unreadable(path, error) from None
    return Counted(sequences, first_s, last_s, requests) if requests else None


def _unreadable(path: Path, error: sqlite3.Error) -> ConfigError:
    return ConfigError(f"{path}: cannot be read as a traffic log: {error}")


def _sources(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ConfigError(f"{source}: no such traffic log, expected the folder of traffic.path")
    files = log_files(source)
    if not files:
        raise ConfigError(f"{source}: found no traffic log in it, such as 2026-01-31.0.db")
    return [file.path for file in files]


def _open_to_write(path: Path, wal_pages: int) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=LOCK_WAIT_S, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(f"PRAGMA wal_autocheckpoint = {wal_pages}")
        database.execute(f"PRAGMA journal_size_limit = {wal_pages * PAGE_BYTES}")
        with database:
            database.execute("BEGIN IMMEDIATE")  # two that create it come one after the other
            if _pragma(database, "user_version") == 0:
                database.execute(TABLE)
                database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                database.execute(f"PRAGMA user_version = {VERSION}")
        _check(database)
    except BaseException:
        database.close()
        raise
    return database


def _open_to_read(path: Path) -> sqlite3.Connection:
    # Not immutable: a server may be writing to it.
    uri = f"{path.absolute().as_uri()}?mode=ro"
    database = sqlite3.connect(uri, uri=True, timeout=LOCK_WAIT_S)
    try:
        _check(database)
    except BaseException:
        database.close()
        raise
    return database


def _check(database: sqlite3.Connection) -> None:
    found = _pragma(database, "application_id"), _pragma(database, "user_version")
    if found[0] != APPLICATION_ID:
        raise sqlite3.DatabaseError("it is another program's database")
    if found[1] != VERSION:
        raise sqlite3.DatabaseError(f"found version {found[1]}, expected {VERSION}")


def _pragma(database: sqlite3.Connection, name: str) -> int:
    (value,) = database.execute(f"PRAGMA {name}").fetchone()
    return int(value)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
