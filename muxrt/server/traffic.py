"""The traffic log of a server: requests that ended, on their way to disk beside the event loop."""

import logging
import sqlite3
import threading
from collections import deque
from pathlib import Path
from time import time

from muxrt.config.serve import TrafficFolder
from muxrt.errors import MuxrtError
from muxrt.server.traffic_files import Entry, Writer

log = logging.getLogger(__name__)

# A batch is written so long after its first request: what a `kill -9` may lose, with the write.
FLUSH_S = 0.4
# Requests that wait while nothing can be written (a full disk); more are dropped, and counted.
MAX_WAITING = 100_000


class TrafficLog:
    """`add` from the event loop; a thread writes. `start`, then `stop` once."""

    def __init__(self, folder: TrafficFolder) -> None:
        self._folder = Path(folder.path)
        self._writer = Writer(self._folder, folder.keep_days, folder.max_bytes)
        self._waiting: deque[Entry] = deque()
        self._has_some = threading.Event()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._num_dropped = 0
        self._is_failing = False

    def start(self) -> None:
        """Open today's file. Raises MuxrtError where it cannot be written."""
        try:
            self._writer.write([], time())
        except (sqlite3.Error, OSError) as error:
            raise MuxrtError(f"traffic.path: cannot write to {self._folder}: {error}") from None
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> None:
        """Keep a request; costs the event loop an append."""
        if len(self._waiting) >= MAX_WAITING:
            self._num_dropped += 1
            return
        self._waiting.append(entry)
        if not self._has_some.is_set():
            self._has_some.set()

    def stop(self) -> None:
        """Write what waits and close the file."""
        self._is_over.set()
        self._has_some.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._has_some.wait()
            self._is_over.wait(FLUSH_S)
            # Before the batch is taken: whoever comes later sets it again.
            self._has_some.clear()
            if not self._flush():
                self._has_some.set()
        self._flush()
        self._writer.close()

    def _flush(self) -> bool:
        """Write all that waits; False if it has to be tried again."""
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not batch:
            return True
        try:
            self._writer.write(batch, time())
        except (sqlite3.Error, OSError) as error:
            self._writer.close()
            self._waiting.extendleft(reversed(batch))
            if not self._is_failing:
                log.warning("event=traffic_stuck path=%s error=%r", self._folder, str(error))
            self._is_failing = True
            return False
        if self._is_failing:
            log.warning("event=traffic_written path=%s dropped=%d", self._folder, self._num_dropped)
        self._is_failing, self._num_dropped = False, 0
        return True
