"""Ranks watch each other: each writes the time again and again, and looks at what others wrote.

A process that is stopped or hangs as a whole is found whether it was computing, idle or loading:
ranks beat before they import anything that takes long, so nothing here needs torch. An exchange
between ranks has a timeout of its own, for a lane that hangs alone.
"""

import mmap
from collections.abc import Callable, Collection
from threading import Event, Thread
from time import monotonic_ns

from muxrt.config.placement import Mesh

BEATS = 20  # in a timeout
MOST_S = 0.25  # between two
BEATS_BYTES = 4096  # two numbers for each of 8 ranks at most

OnSilent = Callable[[int, float], None]


class Beats:
    """When each rank last moved and how long it may stand still, in memory that all have mapped.

    Nanoseconds, of the machine's monotonic clock; 0 of a rank that has not begun.
    """

    def __init__(self, fd: int, size: int) -> None:
        """`fd` is of BEATS_BYTES or more, zeros at first; `size` ranks."""
        self._values = memoryview(mmap.mmap(fd, BEATS_BYTES)).cast("q")
        self._size = size

    def beat(self, rank: int, now_ns: int) -> None:
        self._values[rank] = now_ns

    def last_ns(self, rank: int) -> int:
        """When the rank moved."""
        return self._values[rank]

    def allow(self, rank: int, silence_ns: int) -> None:
        self._values[self._size + rank] = silence_ns

    def allowed_ns(self, rank: int) -> int:
        """How long the rank may stand still, as it says itself."""
        return self._values[self._size + rank]


class Watch:
    """This rank's beats, and its eye on some of the others'."""

    def __init__(
        self,
        beats: Beats,
        rank: int,
        watched: Collection[int],
        mesh: Mesh,
        on_silent: OnSilent,
    ) -> None:
        """This rank loads until `loaded` is called.

        `on_silent(rank, seconds)` is called once, on a thread, of a rank that was silent for
        `mesh.timeout_s`; while it loads, for `mesh.load_timeout_s`.
        """
        self._beats, self._rank, self._watched = beats, rank, set(watched)
        self._timeout_ns = round(mesh.timeout_s * 1e9)
        # Imports hold Python's lock for seconds on a busy machine, and so may reading a file.
        self._load_ns = max(self._timeout_ns, round(mesh.load_timeout_s * 1e9))
        self._period_s = min(mesh.timeout_s / BEATS, MOST_S)
        self._on_silent = on_silent
        self._is_closed = Event()
        self._thread = Thread(target=self._live, name="watch", daemon=True)
        self._move_on(self._load_ns)
        self._thread.start()

    def loaded(self) -> None:
        """What holds Python's lock for long is behind this rank."""
        self._move_on(self._timeout_ns)

    def close(self) -> None:
        """Look no more."""
        self._is_closed.set()
        self._thread.join()

    def _move_on(self, silence_ns: int) -> None:
        self._beats.beat(self._rank, monotonic_ns())
        self._beats.allow(self._rank, silence_ns)

    def _live(self) -> None:
        since_ns = last_ns = monotonic_ns()
        while not self._is_closed.wait(self._period_s):
            now_ns = monotonic_ns()
            # Who slept itself, as when the whole machine did, cannot tell who else did.
            if now_ns - last_ns > self._timeout_ns // 2:
                since_ns = now_ns
            last_ns = now_ns
            self._beats.beat(self._rank, now_ns)
            self._look(now_ns, since_ns)

    def _look(self, now_ns: int, since_ns: int) -> None:
        for rank in sorted(self._watched):
            silent_ns = now_ns - max(self._beats.last_ns(rank), since_ns)
            if silent_ns > (self._beats.allowed_ns(rank) or self._load_ns):
                self._watched.remove(rank)
                self._on_silent(rank, silent_ns / 1e9)
