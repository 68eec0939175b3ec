"""From sequences that clients wait for to units and back: admission, routing, failures."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import msgspec

from muxrt.config.placement import ModelSpec, UnitSpec
from muxrt.core import FinishReason, Output, Prompt, Refusal, Request, SamplingParams
from muxrt.engine.messages import Abort, ModelReady, Step, Submit, ToUnit
from muxrt.engine.requests import Ledger, LiveRequest
from muxrt.engine.router import Replica, choose
from muxrt.errors import MuxrtError, Overloaded, Unavailable
from muxrt.server.unit_process import UnitProcess

log = logging.getLogger(__name__)

QUEUE_RETRY_S = 1.0
# Outputs handled at once; those of a slow client wait as outputs, not as unsent bytes.
MAX_NEWS = 256

Sink = Callable[[Output], None]
# Takes an output of a choice at once, if it can.
Quick = Callable[[int, Output], bool]


@dataclass(frozen=True, slots=True)
class Draft:
    """One sequence before a unit was chosen for it."""

    model: str
    tokens: bytes  # the prompt: int32, little endian
    num_tokens: int
    max_tokens: int
    sampling: SamplingParams
    arrived_s: float
    deadline_s: float | None = None
    keys: tuple[bytes, ...] = ()
    block_tokens: int = 0  # what `keys` were made for

    def request(self, request_id: int, block_tokens: int) -> Request:
        """The request for a unit whose block groups hold `block_tokens` tokens."""
        return Request(
            id=request_id,
            model=self.model,
            prompt_tokens=self.num_tokens,
            max_tokens=self.max_tokens,
            payload=msgspec.msgpack.encode(Prompt(self.tokens, self.sampling)),
            keys=self.keys if block_tokens == self.block_tokens else (),
            arrived_s=self.arrived_s,
            deadline_s=self.deadline_s,
        )


class Units(Protocol):
    """What is needed of the supervisor."""

    @property
    def units(self) -> Mapping[str, UnitProcess]: ...

    def send(self, name: str, message: ToUnit) -> bool:
        """False if nobody listens there."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """Who wants the outputs of a live request."""

    draft: Draft
    sink: Sink
    is_untouched: bool = True  # it was sent once and nothing came back: it may be sent again


class Dispatcher:
    """Sends drafts to units and their outputs to sinks; a sink's last output has a finish."""

    def __init__(self, models: Sequence[ModelSpec], units: Units, now: Callable[[], float]) -> None:
        self.models = {model.name: model for model in models}
        self.ledger = Ledger()
        self.is_draining = False
        self._units = units
        self._now = now
        self._waiters: dict[int, _Waiter] = {}
        self._idle = asyncio.Event()

    # -- before a request --------------------------------------------------------------------

    def admit(self, model: str, num_sequences: int) -> ModelReady:
        """What `model` can do, if it takes `num_sequences` more now.

        Raises Unavailable (503) while it is not served, Overloaded (429) while its queue is full.
        """
        if self.is_draining:
            raise Unavailable("the server is shutting down", retry_after_s=QUEUE_RETRY_S)
        ready = self._ready_replicas(model)
        if not ready:
            raise self._unavailable(model)
        queued, limit = self.ledger.queued(model), self.models[model].max_queue
        # An empty queue takes any batch: one larger than the limit could never come in otherwise.
        if queued and queued + num_sequences > limit:
            raise Overloaded(
                f"{queued} requests wait for {model} already, the limit is {limit}",
                retry_after_s=QUEUE_RETRY_S,
            )
        infos = [self._units.units[replica.unit].models[model] for replica in ready]
        return min(infos, key=lambda info: info.max_model_len)

    def is_served(self, model: str) -> bool:
        """Some unit answers for `model` now."""
        return bool(self._ready_replicas(model))

    def _ready_replicas(self, model: str) -> list[Replica]:
        return [
            Replica(model, unit.name, _traffic(unit.spec, model))
            for unit in self._units.units.values()
            if unit.is_ready and model in unit.models
        ]

    def _unavailable(self, model: str) -> Unavailable:
        homes = [
            unit
            for unit in self._units.units.values()
            if any(part.name == model for part in unit.spec.models)
        ]
        waits = [unit.retry_after_s(self._now()) for unit in homes]
        return Unavailable(
            f"{model} is loading or being restarted; try again shortly",
            retry_after_s=min(waits, default=QUEUE_RETRY_S),
        )

    # -- requests ----------------------------------------------------------------------------

    def submit(self, draft: Draft, sink: Sink, unit: str | None = None) -> int:
        """Send `draft` to `unit`, or to the best replica; the request's id.

        Raises Unavailable if none is ready.
        """
        replicas = self._ready_replicas(draft.model)
        preferred = [replica for replica in replicas if replica.unit == unit]
        replica = choose(preferred or replicas, self.ledger)
        if replica is None:
            raise self._unavailable(draft.model)
        request_id = self.ledger.next_id()
        self._send(request_id, _Waiter(draft, sink), replica.unit)
        return request_id

    def _send(self, request_id: int, waiter: _Waiter, unit: str) -> None:
        block_tokens = self._units.units[unit].models[waiter.draft.model].block_tokens
        request = waiter.draft.request(request_id, block_tokens)
        self.ledger.open(request, unit)
        self._waiters[request_id] = waiter
        self._idle.clear()
        # A process that does not listen has just died; its funeral will tell this request, too.
        self._units.send(unit, Submit(request))

    def abort(self, request_id: int) -> None:
        """Nobody waits for this request any more: its unit frees everything of it at once."""
        live = self._close(request_id)
        if live is not None:
            self._units.send(live.unit, Abort(request_id))

    def unit_of(self, request_id: int) -> str | None:
        """Where a live request runs."""
        live = self.ledger.get(request_id)
        return live.unit if live else None

    def _close(self, request_id: int) -> LiveRequest | None:
        self._waiters.pop(request_id, None)
        live = self.ledger.close(request_id)
        if not self._waiters:
            self._idle.set()
        return live

    # -- what units say ----------------------------------------------------------------------

    def on_step(self, step: Step) -> None:
        """Hand every output to who waits for it; nobody waits for aborted ones."""
        for output in step.outputs:
            waiter = self._waiters.get(output.request_id)
            if waiter is None:
                continue
            waiter.is_untouched = False
            self.ledger.add_tokens(output.request_id, len(output.tokens))
            # Before it is closed: what starts with it must find its unit, and no idle moment.
            waiter.sink(output)
            if output.finish is not None:
                self._close(output.request_id)

    def on_death(self, unit: UnitProcess) -> None:
        """Everything live in `unit` is lost: what showed nothing yet may start over elsewhere."""
        lost = self.ledger.of_unit(unit.name)
        log.warning("event=requests_lost unit=%s count=%d", unit.name, len(lost))
        for live in lost:
            waiter = self._waiters[live.request.id]
            self._close(live.request.id)
            if not self._retry(live, waiter):
                why = f"the process that served {live.request.model} died; it is being restarted"
                waiter.sink(_gone(live, why, unit.retry_after_s(self._now())))

    def _retry(self, live: LiveRequest, waiter: _Waiter) -> bool:
        """Send a request that gave nothing to another replica, once; False if that cannot be."""
        replica = choose(self._ready_replicas(live.request.model), self.ledger)
        if not waiter.is_untouched or replica is None:
            return False
        waiter.is_untouched = False
        # The same id: who waits knows it. The unit that knew it is dead.
        self._send(live.request.id, waiter, replica.unit)
        return True

    async def drained(self, timeout_s: float) -> bool:
        """Take nothing new; True once nothing is live, False if that takes too long."""
        self.is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._waiters:
                    await self._idle.wait()
        return not self._waiters

    def abandon(self) -> None:
        """End everything that is live: its clients learn that the server goes."""
        for request_id, waiter in list(self._waiters.items()):
            live = self.ledger.get(request_id)
            self.abort(request_id)
            if live is not None:
                waiter.sink(_gone(live, "the server is shutting down", QUEUE_RETRY_S))

    def check(self) -> bool:
        """Waiters and ledger agree. Costs time: for tests."""
        assert all(self.ledger.get(request_id) for request_id in self._waiters)
        assert len(self.ledger) == len(self._waiters), "a request is lost"
        return self.ledger.check()


class Call:
    """The sequences that one HTTP request waits for. Leaving the block aborts what still runs."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._ids: dict[int, int] = {}  # choice -> request, while it is live
        self._followers: dict[int, list[tuple[int, Draft]]] = {}
        self._news: list[tuple[int, Output]] = []
        self._reader: asyncio.Future[None] | None = None  # of whoever waits, or last waited
        self.quick: Quick | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._followers.clear()
        self.quick = None  # it knows who knows us: a cycle would wait for the collector
        for index in list(self._ids):
            self.abort(index)

    def start(self, first: int, drafts: Sequence[Draft]) -> None:
        """Generate choices `first`, `first` + 1, ... of one prompt. Raises Unavailable.

        All but the first start with its first token: by then its prompt's blocks can be shared.
        """
        self._submit(first, drafts[0])
        if len(drafts) > 1:
            self._followers[first] = list(enumerate(drafts[1:], first + 1))

    def abort(self, index: int) -> None:
        """Choice `index` has all it needs."""
        request_id = self._ids.pop(index, None)
        if request_id is not None:
            self._dispatcher.abort(request_id)

    async def news(self) -> list[tuple[int, Output]]:
        """The outputs that came since the last call, at least one, with their choices.

        While this waits, `quick` may take outputs instead; they are all older than the next news.
        """
        if not self._news:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        news, self._news = self._news[:MAX_NEWS], self._news[MAX_NEWS:]
        return news

    def _submit(self, index: int, draft: Draft, unit: str | None = None) -> None:
        self._ids[index] = self._dispatcher.submit(draft, partial(self._take, index), unit)

    def _take(self, index: int, output: Output) -> None:
        if self._followers and output.refusal is None and (output.tokens or output.finish):
            self._start_followers(index)
        if output.finish is not None:
            self._ids.pop(index, None)
        reader = self._reader
        if reader is None or reader.done():
            self._news.append((index, output))
        elif self.quick is None or not self.quick(index, output):
            self._news.append((index, output))
            reader.set_result(None)

    def _start_followers(self, leader: int) -> None:
        followers = self._followers.pop(leader, None)
        if followers is None:
            return
        unit = self._dispatcher.unit_of(self._ids[leader])
        for index, draft in followers:
            try:
                self._submit(index, draft, unit)
            except MuxrtError as error:
                refusal = Refusal(error.status, error.kind, error.message, error.retry_after_s)
                self._take(index, Output(0, finish=FinishReason.ERROR, refusal=refusal))


def _traffic(unit: UnitSpec, model: str) -> float:
    return next(part.traffic for part in unit.models if part.name == model)


def _gone(live: LiveRequest, why: str, retry_after_s: float) -> Output:
    """The last output of a request that its unit will not end."""
    refusal = Refusal(Unavailable.status, Unavailable.kind, why, retry_after_s)
    return Output(live.request.id, finish=FinishReason.ERROR, refusal=refusal)
