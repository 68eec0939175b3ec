"""What every unit process does, whatever computes its tokens.

It reads a `UnitBoot` from stdin, opens its executor, and then runs one loop over one poller:
messages from the API, results of the lanes, signals. Nothing sleeps, nothing waits for anything
else.
"""

import gc
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from threading import Thread
from time import monotonic
from types import FrameType
from typing import NamedTuple, NoReturn, Protocol, Self

import msgspec
import zmq

from muxrt.core import Output
from muxrt.engine.build import UnitPlan, build_unit
from muxrt.engine.executor import Executor
from muxrt.engine.messages import (
    Abort,
    Drain,
    Extend,
    Failed,
    Forget,
    FromUnit,
    Loading,
    ModelReady,
    Ready,
    SetAwake,
    Stats,
    Step,
    Stopped,
    Submit,
    ToUnit,
    UnitBoot,
)
from muxrt.engine.metered import Metered
from muxrt.engine.unit import Unit
from muxrt.errors import MuxrtError
from muxrt.worker.logs import log_to_stderr

log = logging.getLogger(__name__)

STATS_PERIOD_S = 1.0
SIGTERM_DRAIN_S = 30.0  # what runs may finish until then, where nobody said how long
LINGER_MS = 1000  # for the last message to leave at exit

_BOOTS = msgspec.json.Decoder(UnitBoot)
_ORDERS: msgspec.msgpack.Decoder[ToUnit] = msgspec.msgpack.Decoder(ToUnit)


class UnitExecutor(Executor, Protocol):
    """An executor whose results the loop below waits for."""

    def fileno(self) -> int:
        """Readable while `drain` has something to do."""

    def drain(self) -> None:
        """Call `done` for every work that is over."""

    def close(self) -> None:
        """End what computes, and give its memory back."""


class Opened(NamedTuple):
    """A unit that can start to serve."""

    plan: UnitPlan
    executor: UnitExecutor
    is_made_up: bool = False  # its tokens come from no model
    addresses: Mapping[str, bytes] = {}  # how other units reach its K and V, by model


Tell = Callable[[Loading], None]
Open = Callable[[UnitBoot, Tell], Opened]


class Link:
    """The unit's end of the socket to the API."""

    def __init__(self, endpoint: str, identity: str) -> None:
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.socket.identity = identity.encode()
        # No limit on what is queued: a loop that waits for a busy API would stop its lanes.
        self.socket.set_hwm(0)
        self.socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: FromUnit) -> None:
        self.socket.send(self._encoder.encode(message))

    def receive(self) -> Iterator[ToUnit]:
        """All messages that are there."""
        while True:
            try:
                data = self.socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield _ORDERS.decode(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._context.destroy(linger=LINGER_MS)


class Service:
    """The loop of a unit that is ready."""

    def __init__(self, unit: Unit, executor: UnitExecutor, meter: Metered, link: Link) -> None:
        """`meter` is what the unit launches its work with, on `executor` in the end."""
        self._unit = unit
        self._executor = executor
        self._meter = meter
        self._link = link
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._num_terms = 0
        self._drain_until_s: float | None = None
        self._timer_s: float | None = None  # of the unit, when the poller was asked last
        self._next_stats_s = 0.0
        self._last_stats: Stats | None = None
        self._was_idle = False

    def run(self) -> bool:
        """Serve until drained (True), or until that takes too long (False)."""
        poller = zmq.Poller()
        for source in (self._link.socket, self._executor.fileno(), self._wake):
            poller.register(source, zmq.POLLIN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._report(monotonic())  # /metrics knows blocks and quotas before the first request
        while not self._is_over():
            ready = {source for source, _ in poller.poll(self._timeout_ms())}
            if self._executor.fileno() in ready:
                self._executor.drain()
            if self._link.socket in ready:
                self._receive()
            self._tell_time()
        return self._unit.is_idle

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._num_terms += 1
        os.eventfd_write(self._wake, 1)  # the poller does not return for a signal alone

    def _is_over(self) -> bool:
        if self._num_terms and self._drain_until_s is None:
            self._drain(SIGTERM_DRAIN_S)
        if self._drain_until_s is None:
            return False
        is_late = monotonic() >= self._drain_until_s
        return self._unit.is_idle or is_late or self._num_terms > 1

    def _receive(self) -> None:
        for order in self._link.receive():
            match order:
                case Submit():
                    self._unit.add(order.request)
                case Extend():
                    self._unit.extend(order)
                case Abort():
                    self._unit.abort(order.request_id)
                case Drain():
                    self._drain(order.deadline_s)
                case SetAwake():
                    self._unit.set_awake(order.model, order.is_awake)
                case Forget():
                    self._unit.forget(order.model)

    def _drain(self, seconds: float) -> None:
        log.info("event=drain deadline_s=%.1f", seconds)
        self._unit.drain()
        self._drain_until_s = monotonic() + seconds

    def _timeout_ms(self) -> int | None:
        """Until the next thing that time alone brings about; None = nothing does."""
        self._timer_s = self._unit.next_timer()
        times = [self._timer_s, self._drain_until_s]
        if not self._unit.is_idle:
            times.append(self._next_stats_s)
        soonest = min((time for time in times if time is not None), default=None)
        if soonest is None:
            return None
        return max(0, math.ceil((soonest - monotonic()) * 1000))

    def _tell_time(self) -> None:
        now = monotonic()
        # The one that was waited for, too: once it is past, the unit no longer names it.
        timers = (self._timer_s, self._unit.next_timer())
        if any(timer_s is not None and timer_s <= now for timer_s in timers):
            self._unit.tick()
        is_idle = self._unit.is_idle
        if not self._was_idle if is_idle else now >= self._next_stats_s:
            self._report(now)
        self._was_idle = is_idle

    def _report(self, now: float) -> None:
        self._next_stats_s = now + STATS_PERIOD_S
        stats = msgspec.structs.replace(self._unit.stats(), batches=self._meter.stats())
        if stats != self._last_stats:
            self._last_stats = stats
            self._link.send(stats)


def ready_message(unit: Opened) -> Ready:
    """What the API must know of the unit to send it requests."""
    plan = unit.plan
    models = tuple(
        ModelReady(
            name=name,
            block_tokens=model.layout.block_tokens,
            max_model_len=model.max_model_len,
            quota_blocks=plan.quotas[name],
            blocks_per_group=model.layout.blocks_per_group,
            prefix_reuse=plan.spec.scheduling.prefix_reuse,
            is_made_up=unit.is_made_up,
            address=unit.addresses.get(name, b""),
            may_sleep=plan.habits is not None,
        )
        for name, model in plan.models.items()
    )
    return Ready(plan.spec.name, os.getpid(), models, plan.num_blocks, plan.arena.block_bytes)


def serve(boot: UnitBoot, link: Link, open_unit: Open) -> bool:
    """Open the unit and serve it; True if it was drained to the end. Raises MuxrtError."""

    def emit(outputs: tuple[Output, ...]) -> None:
        link.send(Step(outputs))

    opened = open_unit(boot, link.send)
    plan, executor = opened.plan, opened.executor
    meter = Metered(executor)
    unit = build_unit(plan, meter, monotonic, emit)
    # What is there now stays: the collector need not look at it again in the middle of a batch.
    gc.collect()
    gc.freeze()
    link.send(ready_message(opened))
    log.info("event=ready models=%s blocks=%d", ",".join(plan.models), plan.num_blocks)
    is_drained = Service(unit, executor, meter, link).run()
    if is_drained:
        executor.close()
        link.send(Stopped(boot.unit.name))
    log.info("event=stopped drained=%s", is_drained)
    return is_drained


def exit_with_parent() -> None:
    """End this process when stdin ends, whatever it is doing: the API is gone."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        log.warning("event=orphaned")
        os._exit(1)

    Thread(target=watch, name="parent", daemon=True).start()


def main(open_unit: Open) -> int:
    """0 = drained; 1 = could not serve, or could not finish in time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the API says what to do
    boot = _BOOTS.decode(sys.stdin.buffer.readline())
    log_to_stderr(boot.unit.name)
    exit_with_parent()
    with Link(boot.endpoint, boot.identity) as link:
        try:
            return 0 if serve(boot, link, open_unit) else 1
        except MuxrtError as error:
            log.error("event=failed error=%s", error.message)
            link.send(Failed(boot.unit.name, error.message))
        except Exception as error:
            log.exception("event=failed")
            link.send(Failed(boot.unit.name, f"{type(error).__name__}: {error}"))
    return 1


def run(open_unit: Open) -> NoReturn:
    """`main` as a whole process."""
    status = main(open_unit)
    logging.shutdown()
    # Lanes that still compute would be waited for; what they hold goes back with the process.
    os._exit(status)
