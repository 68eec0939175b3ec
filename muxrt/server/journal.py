"""What became of changes of the placement, on disk before it happens.

One JSON object per line, each synced before its step begins. The units of a server that dies die
with it, so all that has to be found out afterwards is which placement it has to start: the old one
until the line of the switch is there, the new one from then on.
"""

import os
from errno import ENOSPC
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from muxrt.engine.reconcile import Change, Deployment, Step
from muxrt.errors import ConfigError


class Line(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What happened."""

    event: str  # "serving", "begun", "step", "switched", "undone", "done"
    base: str = ""  # serving: the configuration file it started from, as a digest
    deployment: Deployment | None = None  # serving: this; begun: to become this
    step: Step | None = None  # step: it begins
    why: str = ""  # undone


def digest(base: Deployment) -> str:
    """Tells one configuration file from another."""
    return blake2b(msgspec.json.encode(base), digest_size=16).hexdigest()


class Journal:
    """A file that is appended to. All methods raise OSError where the disk does."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, base: Deployment) -> Deployment:
        """The deployment to start, where the configuration file says `base`.

        A change that was made at run time stays made until somebody edits that file. The journal
        begins anew with what it came to. Raises ConfigError for a file that is no journal.
        """
        current = self._read(digest(base)) or base
        line = Line(event="serving", base=digest(base), deployment=current)
        fresh = self._path.with_name(self._path.name + ".new")
        self._write(fresh, line, os.O_TRUNC)
        fresh.replace(self._path)
        _sync_folder(self._path.parent)
        return current

    def _read(self, base: str) -> Deployment | None:
        """What was served last, from that file; None if nothing is known."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        current: Deployment | None = None
        coming: Deployment | None = None
        for number, text in enumerate(data.split(b"\n")[:-1], 1):  # a torn last line never was
            try:
                line = msgspec.json.decode(text, type=Line)
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{self._path}:{number}: no line of a journal: {error}; remove the file to"
                    " start from the configuration"
                ) from None
            if line.event == "serving":
                current = line.deployment if line.base == base else None
                if current is None:
                    return None
            elif line.event == "begun":
                coming = line.deployment
            elif line.event == "switched":
                current = coming
        return current

    def begin(self, change: Change) -> None:
        """A change is decided."""
        self._add(event="begun", deployment=change.after)

    def step(self, step: Step) -> None:
        """A step of it is about to be taken."""
        self._add(event="step", step=step)

    def switched(self) -> None:
        """From now on the new placement is the one that is served."""
        self._add(event="switched")

    def undone(self, why: str) -> None:
        """The change is given up; the old placement is still served."""
        self._add(event="undone", why=why)

    def done(self) -> None:
        """Nothing of the old placement is left."""
        self._add(event="done")

    def _add(self, **line: Any) -> None:
        self._write(self._path, Line(**line), os.O_APPEND)

    def _write(self, path: Path, line: Line, mode: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | mode, 0o600)
        text, before = msgspec.json.encode(line) + b"\n", os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, text) < len(text):
                raise OSError(ENOSPC, os.strerror(ENOSPC), str(path))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)  # half a line would spoil those that come after it
            raise
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """A new name is on disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
