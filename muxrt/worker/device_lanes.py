"""Lanes of a device: two threads each, one that launches and one that waits for events.

Which SMs a lane's next batch may use is up to `Shares`, whatever made them.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread

import torch

from muxrt.core import Result, SlotOpen, Work
from muxrt.worker.flight import Flight, Launch, Share
from muxrt.worker.lanes import LaneDied

log = logging.getLogger(__name__)


class Shares:
    """What each lane gets of the device: all of it while the others rest, else its own part.

    A batch that is launched keeps what it got. Where lanes are not parts of the device (streams,
    MPS processes), its own part is all of it.
    """

    def __init__(self, whole: Sequence[Share], own: Sequence[Share]) -> None:
        """A share of each kind per lane."""
        self._whole = whole
        self._own = own
        self._in_flight = [0] * len(own)
        self._lock = Lock()

    def launched(self, lane: int) -> None:
        """A work of this lane is on its way."""
        with self._lock:
            self._in_flight[lane] += 1

    def done(self, lane: int) -> None:
        """It has come back."""
        with self._lock:
            self._in_flight[lane] -= 1

    def choose(self, lane: int) -> Share:
        """For the lane's next batch."""
        with self._lock:
            others = sum(self._in_flight) - self._in_flight[lane]
        return self._own[lane] if others else self._whole[lane]

    def own(self, lane: int) -> Share:
        """Its own part, whatever the others do."""
        return self._own[lane]


class DeviceThreads:
    """Launches works in order on one thread, and gives their results from another."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Launch],
        give: Callable[[Result | None], None],
        device: torch.device,
    ) -> None:
        """`make` is called on the launching thread; `wait_started` raises what it raised.

        `give` gets the results, in order; None says that the device is lost, and with it all that
        comes. It is called on the waiting thread.
        """
        self._device = device
        self._give = give
        self._inbox: SimpleQueue[Work | None] = SimpleQueue()
        self._flights: SimpleQueue[Flight | Exception | None] = SimpleQueue()
        self._started: Future[None] = Future()
        # Daemons: a forced exit does not wait for their batches.
        self._threads = (
            Thread(target=self._launch_all, args=(make,), name=name, daemon=True),
            Thread(target=self._wait_all, name=f"{name}-wait", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    def wait_started(self) -> None:
        """Return when works are taken."""
        self._started.result()

    def launch(self, work: Work) -> None:
        """Queue `work`. Never waits."""
        self._inbox.put(work)

    def close(self) -> None:
        """Finish what was launched, and end both threads."""
        self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _launch_all(self, make: Callable[[], Launch]) -> None:
        torch.get_device_module(self._device).set_device(self._device)
        try:
            launch = make()
        except Exception as error:
            self._started.set_exception(error)
            self._flights.put(None)
            return
        self._started.set_result(None)
        while (work := self._inbox.get()) is not None:
            try:
                self._flights.put(launch(work))
            except Exception as error:
                self._flights.put(error)
        self._flights.put(None)

    def _wait_all(self) -> None:
        torch.get_device_module(self._device).set_device(self._device)
        while (flight := self._flights.get()) is not None:
            self._give(_land(flight))


def _land(flight: Flight | Exception) -> Result | None:
    """What a work gave, or why it gave nothing; None if the device will give nothing any more."""
    try:
        if isinstance(flight, Exception):
            raise flight
        return flight.wait()
    except torch.AcceleratorError:
        log.exception("event=device_lost")
        return None
    except Exception as error:
        log.exception("event=work_failed")
        return Result(error=f"{type(error).__name__}: {error}")


class DeviceLane:
    """A lane of this process."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Launch],
        device: torch.device,
        shares: Shares | None = None,
        number: int = 0,
    ) -> None:
        """`shares` is told what lane `number` has in flight; see `DeviceThreads` for the rest."""
        self.name = name
        self._shares = shares
        self._number = number
        self._results: deque[Result | None] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = DeviceThreads(name, make, self._take, device)

    def wait_started(self) -> None:
        self._threads.wait_started()

    def launch(self, work: Work) -> None:
        if self._shares is not None:
            self._shares.launched(self._number)
        self._threads.launch(work)

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Nothing to do: the threads of a process share what they know of slots."""

    def fileno(self) -> int:
        return self._wake

    def collect(self) -> list[Result]:
        try:
            count = os.eventfd_read(self._wake)
        except BlockingIOError:
            return []
        results = [self._results.popleft() for _ in range(count)]
        if None in results:
            raise LaneDied(f"the device failed under lane {self.name}; what it held is lost")
        return [result for result in results if result is not None]

    def close(self) -> None:
        if self._wake < 0:
            return
        self._threads.close()
        os.close(self._wake)
        self._wake = -1

    def _take(self, result: Result | None) -> None:
        if self._shares is not None:
            self._shares.done(self._number)
        self._results.append(result)
        os.eventfd_write(self._wake, 1)
