"""How a lane splits a kernel over its own threads.

No pool is shared: two teams run at the same time without knowing of each other. Kernels release
the GIL, so a helper needs it only to pick its range up and to say that it is done.
"""

import os
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

Kernel = Callable[..., Any]  # kernel(begin, end, *args) works on items [begin, end)
Task = tuple[Kernel, int, int, tuple[Any, ...]]


class Team:
    """The caller's thread and `size - 1` helpers; one caller at a time."""

    def __init__(self, cores: Sequence[int] | None = None, size: int | None = None) -> None:
        """Pin helper i to `cores[i + 1]`; the caller pins itself (`pin`), usually to `cores[0]`.

        `size` defaults to the number of cores given, or to 1. Without cores nothing is pinned.
        Raises ValueError where a core is given twice, is missing or is not ours.
        """
        self.cores = tuple(cores or ())
        self.size = size or len(self.cores) or 1
        self._check()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._inboxes: list[SimpleQueue[Task | None]] = []
        self._threads: list[Thread] = []
        for index in range(1, self.size):
            self._start(index)

    def run(self, kernel: Kernel, work_items: int, *args: Any) -> None:
        """Call `kernel(begin, end, *args)` on contiguous ranges of [0, work_items), one a thread.

        Returns when all are done; raises the first error of any of them.
        """
        parts = min(self.size, work_items)
        if parts <= 1:
            if work_items > 0:
                kernel(0, work_items, *args)
            return
        for part in range(1, parts):
            begin, end = part * work_items // parts, (part + 1) * work_items // parts
            self._inboxes[part - 1].put((kernel, begin, end, args))
        error = _attempt(kernel, 0, work_items // parts, args)
        for _ in range(1, parts):
            error = self._done.get() or error
        if error is not None:
            raise error

    def pin(self) -> None:
        """Bind the calling thread to the team's first core, if cores were given."""
        if self.cores:
            os.sched_setaffinity(0, {self.cores[0]})

    def close(self) -> None:
        """End the helpers. The team runs no kernel afterwards."""
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()
        self._inboxes.clear()
        self._threads.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self) -> None:
        if self.cores and len(set(self.cores)) < self.size:
            raise ValueError(f"a team of {self.size} needs as many cores, got {self.cores}")
        strangers = set(self.cores) - os.sched_getaffinity(0)
        if strangers:
            raise ValueError(f"not this process's cores: {sorted(strangers)}")

    def _start(self, index: int) -> None:
        inbox: SimpleQueue[Task | None] = SimpleQueue()
        core = self.cores[index] if self.cores else None
        thread = Thread(
            target=_help, args=(inbox, self._done, core), name=f"team-{index}", daemon=True
        )
        thread.start()
        self._inboxes.append(inbox)
        self._threads.append(thread)


def _help(
    inbox: "SimpleQueue[Task | None]", done: "SimpleQueue[BaseException | None]", core: int | None
) -> None:
    """A helper's life: take a range, run it, report; None ends it."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    while (task := inbox.get()) is not None:
        done.put(_attempt(*task))


def _attempt(kernel: Kernel, begin: int, end: int, args: tuple[Any, ...]) -> BaseException | None:
    try:
        kernel(begin, end, *args)
    except BaseException as error:  # the caller raises it
        return error
    return None
