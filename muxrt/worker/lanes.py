"""Lanes: where work runs, one piece after the other.

A lane's results are collected by the unit's loop, woken by a descriptor; nobody waits in between.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Protocol

import torch
from msgspec.structs import replace

from muxrt.core import Result, SlotOpen, Work
from muxrt.errors import ConfigError, MuxrtError
from muxrt.kernels import Team

log = logging.getLogger(__name__)

Run = Callable[[Work], Result]


class LaneDied(MuxrtError):
    """The process of a lane ended; what it computed is lost, and so is its unit."""


class Lane(Protocol):
    """Runs works in the order of `launch`."""

    def wait_started(self) -> None:
        """Return when the lane takes work; raises MuxrtError if it cannot."""

    def launch(self, work: Work) -> None:
        """Queue `work`. Never waits."""

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Another lane opens these slots; later works here may be of them."""

    def fileno(self) -> int:
        """Readable while `collect` has something to give."""

    def collect(self) -> list[Result]:
        """Results since the last call, in launch order. Never waits; raises LaneDied."""

    def close(self) -> None:
        """Finish the work that runs, and give thread or process back."""


def split_cores(cores: Sequence[int], split: Sequence[int] | None) -> tuple[tuple[int, ...], ...]:
    """The cores of each lane, in order; None = one lane with all.

    Raises ConfigError where the lanes need more cores than there are.
    """
    counts = tuple(split) if split else (len(cores),)
    if sum(counts) > len(cores):
        raise ConfigError(
            f"lanes.split: found {list(counts)}, which needs {sum(counts)} cores, expected at most"
            f" the mesh's {len(cores)}: {list(cores)}"
        )
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return tuple(tuple(cores[end - count : end]) for end, count in zip(ends, counts, strict=True))


def occupy(cores: Sequence[int], size: int | None = None) -> Team:
    """Bind the calling thread, and all that torch starts for it, to `cores`; its kernel team.

    `size` threads work on each kernel, as many as cores if None. Must come before the thread's
    first torch operation: OpenMP's threads inherit the binding.
    """
    os.sched_setaffinity(0, cores)
    # The first call makes torch take over whatever count another lane set last; ours must follow.
    torch.get_num_threads()
    torch.set_num_threads(size or len(cores))
    return Team(cores, size)


def attempt(run: Run, work: Work) -> Result:
    """Run `work`; what it raises becomes its result, for nobody else must suffer from it."""
    try:
        return run(work)
    except Exception as error:
        log.exception("event=work_failed work=%d model=%s", work.id, work.model)
        return Result(error=f"{type(error).__name__}: {error}")


class ThreadLane:
    """A thread bound to a set of cores, with a kernel team of its own."""

    def __init__(
        self,
        name: str,
        cores: Sequence[int],
        make: Callable[[Team], Run],
        size: int | None = None,
    ) -> None:
        """`make` is called on the lane's thread; `wait_started` raises what it raised.

        `size`: see `occupy`.
        """
        self._inbox: SimpleQueue[tuple[Work, float] | None] = SimpleQueue()
        self._results: deque[Result] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._started: Future[None] = Future()
        # A daemon: a forced exit does not wait for its batch.
        self._thread = Thread(target=self._live, args=(cores, size, make), name=name, daemon=True)
        self._thread.start()

    def wait_started(self) -> None:
        self._started.result()

    def launch(self, work: Work) -> None:
        self._inbox.put((work, perf_counter()))

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Nothing to do: the threads of a process share what they know of slots."""

    def fileno(self) -> int:
        return self._wake

    def collect(self) -> list[Result]:
        try:
            count = os.eventfd_read(self._wake)
        except BlockingIOError:
            return []
        return [self._results.popleft() for _ in range(count)]

    def close(self) -> None:
        if self._wake < 0:
            return
        self._inbox.put(None)
        self._thread.join()
        os.close(self._wake)
        self._wake = -1

    def _live(self, cores: Sequence[int], size: int | None, make: Callable[[Team], Run]) -> None:
        try:
            with occupy(cores, size) as team:
                run = make(team)
                self._started.set_result(None)
                self._serve(run)
        except Exception as error:
            self._started.set_exception(error)

    def _serve(self, run: Run) -> None:
        """A work takes from its launch, or from the end of the one before if that was later.

        Between two works the unit's loop may have this core: that is time of the lane's, too.
        """
        ended_s = 0.0
        while (order := self._inbox.get()) is not None:
            work, launched_s = order
            result = attempt(run, work)
            begun_s, ended_s = max(launched_s, ended_s), perf_counter()
            self._results.append(replace(result, elapsed_s=ended_s - begun_s))
            os.eventfd_write(self._wake, 1)
