"""Ranks watch each other: each writes the time again and again, and looks at what others wrote.

A process that is stopped or hangs as a whole is found whether it was computing or idle. An exchange
between ranks has a timeout of its own, for a lane that hangs alone.
"""

from collections.abc import Callable, Collection
from threading import Event, Thread
from time import monotonic_ns

import numpy as np
import numpy.typing as npt

BEATS = 20  # in a timeout
MOST_S = 0.25  # between two
NOT_YET = 0  # of a rank that is still loading

OnSilent = Callable[[int, float], None]


class Watch:
    """This rank's beats, and its eye on some of the others'."""

    def __init__(
        self,
        beats: npt.NDArray[np.int64],
        rank: int,
        watched: Collection[int],
        timeout_s: float,
        on_silent: OnSilent,
    ) -> None:
        """beats [ranks], shared by all: nanoseconds of the machine's monotonic clock.

        `on_silent(rank, seconds)` is called, on a thread, of a rank that had begun to beat and was
        silent for `timeout_s`.
        """
        self._beats, self._rank, self._watched = beats, rank, tuple(watched)
        self._timeout_ns = round(timeout_s * 1e9)
        self._period_s = min(timeout_s / BEATS, MOST_S)
        self._on_silent = on_silent
        self._is_closed = Event()
        self._thread = Thread(target=self._live, name="watch", daemon=True)
        beats[rank] = monotonic_ns()
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._is_closed.set()
        self._thread.join()

    def _live(self) -> None:
        since_ns = last_ns = monotonic_ns()
        while not self._is_closed.wait(self._period_s):
            now_ns = monotonic_ns()
            # Who slept itself, as when the whole machine did, cannot tell who else did.
            if now_ns - last_ns > self._timeout_ns // 2:
                since_ns = now_ns
            self._beats[self._rank] = last_ns = now_ns
            self._look(now_ns, since_ns)

    def _look(self, now_ns: int, since_ns: int) -> None:
        for rank in self._watched:
            beat_ns = int(self._beats[rank])
            silent_ns = now_ns - max(beat_ns, since_ns)
            if beat_ns != NOT_YET and silent_ns > self._timeout_ns:
                self._on_silent(rank, silent_ns / 1e9)
