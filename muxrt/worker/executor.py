"""Work goes to lanes, results come back through one descriptor that the unit's loop polls."""

import select
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Self

from muxrt.core import Batch, Result, Transfer, Work
from muxrt.engine.executor import Done
from muxrt.worker.lanes import Lane
from muxrt.worker.transfer import Reached


class LaneExecutor:
    """The `Executor` of real hardware: lanes by number, the copy lane last."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        resources: ExitStack,
        exchange: Reached | None = None,
        weight_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """`resources` closes the lanes, and then what they computed with.

        `exchange` is what the copy lane fetches from other units with, `weight_bytes` what the
        weights of models that may sleep take, on all ranks together.
        """
        self.exchange = exchange
        self.weight_bytes = weight_bytes or {}
        self._lanes = lanes
        self._resources = resources
        self._flights: list[deque[tuple[Work, Done]]] = [deque() for _ in lanes]
        self._epoll = select.epoll()
        self._numbers = {lane.fileno(): number for number, lane in enumerate(lanes)}
        for descriptor in self._numbers:
            self._epoll.register(descriptor, select.EPOLLIN)

    def launch(self, work: Work, done: Done) -> None:
        """Queue `work` on its lane; `done` is called by a later `drain`."""
        self._flights[work.lane].append((work, done))
        if isinstance(work, Batch | Transfer) and work.opened:
            for number, lane in enumerate(self._lanes):
                if number != work.lane:
                    lane.learn(work.model, work.opened)
        self._lanes[work.lane].launch(work)

    def fileno(self) -> int:
        """Readable while `drain` has something to do."""
        return self._epoll.fileno()

    def drain(self, timeout_s: float = 0.0) -> None:
        """Call `done` for every work that is over; waits up to `timeout_s` for the first.

        Raises LaneDied where a lane's process has ended.
        """
        for descriptor, _ in self._epoll.poll(timeout_s):
            number = self._numbers[descriptor]
            for result in self._lanes[number].collect():
                work, done = self._flights[number].popleft()
                done(work, result)

    def run(self, works: Sequence[Work], timeout_s: float = 600.0) -> list[Result]:
        """Launch `works` and wait for all: for warming up, before there is a loop."""
        results: dict[int, Result] = {}
        for work in works:
            self.launch(work, lambda work, result: results.__setitem__(work.id, result))
        while len(results) < len(works):
            before = len(results)
            self.drain(timeout_s)
            if len(results) == before:
                raise TimeoutError(f"no work was done within {timeout_s} s")
        return [results[work.id] for work in works]

    def close(self) -> None:
        """End all lanes, after the work that runs, and give their memory back."""
        self._epoll.close()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
