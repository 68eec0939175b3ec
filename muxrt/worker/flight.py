"""Work on its way through a device: launched without waiting, read when the device is done."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from muxrt.core import Result


@dataclass(frozen=True, slots=True)
class Share:
    """A stream, and how many SMs its kernels may use."""

    name: str
    stream: Any  # torch.cuda's or torch.cpu's
    sm_count: int


class Span:
    """What the current stream does between two points; the host passes them long before."""

    def __init__(self, device: torch.device) -> None:
        """It begins here."""
        self._is_cuda = device.type == "cuda"
        self.over: Any = None
        self.begin()

    def begin(self) -> None:
        """No, here: what came before was preparation."""
        self._begun_s = perf_counter()
        self._begun = self._record()

    def end(self) -> None:
        """And ends here."""
        self.over = self._record()
        self._seconds = perf_counter() - self._begun_s

    def wait(self) -> float:
        """Return when the device has passed the end; the seconds it took from the beginning."""
        self.over.synchronize()
        if not self._is_cuda:
            return self._seconds
        milliseconds: float = self._begun.elapsed_time(self.over)
        return milliseconds / 1000

    def _record(self) -> Any:
        # Blocking: a thread that waits leaves its core to the others.
        event: Any = (
            torch.cuda.Event(enable_timing=True, blocking=True)
            if self._is_cuda
            else torch.cpu.Event()
        )
        event.record()
        return event


@dataclass(frozen=True, slots=True)
class Flight:
    """One work that was launched."""

    span: Span
    read: Callable[[float], Result]  # given its seconds, once the span is over

    def wait(self) -> Result:
        """What it gave, as soon as it has given it. Raises what `read` raises."""
        return self.read(self.span.wait())


Launch = Callable[[Any], Flight]
