"""A lane that is a process: both of its ends.

Arena, slot tables and weights are mapped, not copied. Orders go down one pipe, results come up
another. When the unit closes its end or dies, the lane reads the end of the file and exits.
"""

import logging
import os
import select
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, Self, TypeVar

import msgspec

from muxrt.config.model import ModelShape
from muxrt.core import Result, SlotOpen, Work
from muxrt.engine.build import UnitPlan
from muxrt.errors import MuxrtError
from muxrt.models.llama import Llama
from muxrt.models.weights import TensorPlace
from muxrt.worker.frames import FrameReader, write_frame
from muxrt.worker.kv_storage import Segment, SharedWeights, Storage, StorageFds
from muxrt.worker.lanes import LaneDied, attempt, occupy
from muxrt.worker.logs import log_to_stderr
from muxrt.worker.piped import Piped, start_piped
from muxrt.worker.runner import Resident, Runner

log = logging.getLogger(__name__)


class SharedModel(msgspec.Struct, frozen=True):
    """Where a child process finds a model's weights."""

    shape: ModelShape
    fd: int
    num_bytes: int
    places: dict[str, TensorPlace]

    @classmethod
    def of(cls, shape: ModelShape, weights: SharedWeights) -> "SharedModel":
        segment = weights.segment
        return cls(shape, segment.fd, segment.num_bytes, dict(weights.places))

    def attach(self) -> Llama:
        """The model over the shared weights. In the child, once."""
        segment = Segment(self.num_bytes, self.fd)
        return Llama.from_state(self.shape, SharedWeights(segment, self.places).state())


class Named(Protocol):
    """What a lane's process is told first: a struct, sent before the first order."""

    @property
    def name(self) -> str: ...


class Setup(Named, Protocol):
    """Likewise, with what its process is started with."""

    @property
    def module(self) -> str:
        """It runs as a program that calls `main`."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Inherited under the same numbers."""

    @property
    def environ(self) -> dict[str, str]:
        """Variables of its own."""


class LaneSetup(msgspec.Struct, frozen=True):
    """What a lane on cores starts from."""

    name: str
    plan: UnitPlan
    cores: tuple[int, ...]
    storage: StorageFds
    models: dict[str, SharedModel]

    @property
    def descriptors(self) -> tuple[int, ...]:
        weights = (model.fd for model in self.models.values())
        return (self.storage.arena, *self.storage.slots.values(), *weights)

    @property
    def module(self) -> str:
        return "muxrt.worker.process_lane"

    @property
    def environ(self) -> dict[str, str]:
        return {}


class Learn(msgspec.Struct, frozen=True, tag="learn"):
    """Another lane opens these slots."""

    model: str
    opened: tuple[SlotOpen, ...]


_ORDERS: msgspec.msgpack.Decoder[Work | Learn] = msgspec.msgpack.Decoder(Work | Learn)
_RESULTS = msgspec.msgpack.Decoder(Result)


class ProcessLane:
    """The unit's end."""

    def __init__(self, setup: Named, piped: Piped) -> None:
        """Tell a process that was started; `wait_started` tells whether it could begin.

        Raises LaneDied where it has ended.
        """
        self.name = setup.name
        self._process, self._orders, self._results = piped
        self._reader = FrameReader(self._results)
        self._steps: deque[Result] = deque()
        self._send(setup)

    @classmethod
    def start(cls, setup: Setup) -> Self:
        """Start the process, too."""
        return cls(setup, start_piped(setup.module, setup.descriptors, environ=setup.environ))

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_started(self) -> None:
        """Return when the lane takes work. Raises MuxrtError with the reason if it cannot.

        A process that starts in steps says so after each: one call for every step.
        """
        said = select.poll()  # `select` would end at descriptor 1,023
        said.register(self._results, select.POLLIN)
        while not self._steps:
            said.poll()
            self._steps += self.collect()
        error = self._steps.popleft().error
        if error is not None:
            raise MuxrtError(f"lane {self.name} could not start: {error}")

    def launch(self, work: Work) -> None:
        self._send(work)

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        self._send(Learn(model, opened))

    def fileno(self) -> int:
        return self._results

    def collect(self) -> list[Result]:
        results = [_RESULTS.decode(frame) for frame in self._reader.read()]
        if self._reader.is_at_end and not results:
            raise self._death()
        return results

    def close(self) -> None:
        """The lane exits when it reads the end of its orders, whatever it is doing."""
        if self._orders < 0:
            return
        os.close(self._orders)
        os.close(self._results)
        self._orders = self._results = -1
        self._process.wait()

    def kill(self) -> None:
        """End it at once, whatever it does; no error if it has ended."""
        self._process.kill()

    def _send(self, order: Any) -> None:
        self.write(msgspec.msgpack.encode(order))

    def write(self, order: bytes) -> None:
        """Send an order that is encoded already. Raises LaneDied."""
        try:
            # The other end reads on a thread of its own: this waits for no batch.
            write_frame(self._orders, order)
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> LaneDied:
        status = self._process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return LaneDied(f"the process {self._process.pid} of lane {self.name} ended {how}")


class Child(Protocol):
    """The lane in its own process."""

    def launch(self, work: Work) -> None:
        """Run `work` behind those before it."""

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Another lane opens these slots."""


Give = Callable[[Result], None]
SetupT = TypeVar("SetupT")


def main(setup_type: type[SetupT], start: Callable[[SetupT, Give], Child]) -> None:
    """The lane's end: `python -m MODULE ORDERS_FD RESULTS_FD ...`.

    `start` makes the lane; what it is given takes the results, in order.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the unit drains first, then closes the pipe
    orders, results = (int(argument) for argument in sys.argv[1:3])
    inbox: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_receive, args=(orders, inbox), name="orders", daemon=True).start()

    def give(result: Result) -> None:
        write_frame(results, msgspec.msgpack.encode(result))

    with suppress(BrokenPipeError):  # the unit is gone
        _serve(inbox, give, lambda data: start(msgspec.msgpack.decode(data, type=setup_type), give))


def _receive(orders: int, inbox: SimpleQueue[bytes]) -> None:
    reader = FrameReader(orders)
    while not reader.is_at_end:
        for frame in reader.read():
            inbox.put(frame)
    os._exit(0)  # nobody is left to compute for, not even to the end of this batch


def _serve(inbox: SimpleQueue[bytes], give: Give, start: Callable[[bytes], Child]) -> None:
    try:
        child = start(inbox.get())
    except Exception as error:
        log.exception("event=lane_failed")
        give(Result(error=repr(error)))
        return
    give(Result())
    while True:
        order = _ORDERS.decode(inbox.get())
        if isinstance(order, Learn):
            child.learn(order.model, order.opened)
        else:
            child.launch(order)


class CoresChild:
    """The lane in its own process, on its cores."""

    def __init__(self, setup: LaneSetup, give: Give) -> None:
        log_to_stderr(setup.name)
        team = occupy(setup.cores)
        storage = Storage(setup.plan, setup.storage)
        models = {
            name: Resident.of(model.attach(), name, storage) for name, model in setup.models.items()
        }
        self._runner = Runner(models, team)
        self._give = give

    def launch(self, work: Work) -> None:
        self._give(attempt(self._runner.run, work))

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        self._runner.learn(model, opened)


if __name__ == "__main__":
    main(LaneSetup, CoresChild)
