"""From sequences that clients wait for to units and back: admission, routing, failures."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec
import numpy as np

from muxrt.config.placement import ModelSpec, Role
from muxrt.config.routing import Routing
from muxrt.core import (
    FinishReason,
    Output,
    Piece,
    Prompt,
    Refusal,
    Request,
    SamplingParams,
    Source,
)
from muxrt.engine.handoff import LEASE_S, Event, Handoff, Stage
from muxrt.engine.messages import Abort, Extend, ModelReady, Step, Submit, ToUnit
from muxrt.engine.pools import make_router
from muxrt.engine.relay import Relay
from muxrt.engine.requests import Ledger, LiveRequest
from muxrt.engine.router import Ask, Replica, Route, Switch
from muxrt.errors import BadRequest, Overloaded, Unavailable
from muxrt.server.unit_process import UnitProcess

log = logging.getLogger(__name__)

QUEUE_RETRY_S = 1.0

Sink = Callable[[Output], None]


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
    path: str | None = None  # of the folder that its tokens are of; None: whatever is served

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

    def resumed(self, request_id: int, outputs: Sequence[int], source: Source | None) -> Request:
        """The rest of a request that gave `outputs` already, in another unit.

        Its K and V are at `source`, or to be computed again. What was said of the prompt is said.
        """
        tokens = self.tokens + np.array(outputs, dtype="<i4").tobytes()
        sampling = msgspec.structs.replace(self.sampling, prompt_logprobs=None)
        return Request(
            id=request_id,
            model=self.model,
            prompt_tokens=self.num_tokens,
            max_tokens=self.max_tokens,
            payload=msgspec.msgpack.encode(Prompt(tokens, sampling, len(outputs))),
            arrived_s=self.arrived_s,
            num_outputs=len(outputs),
            source=source,
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
    handoff: Handoff | None = None  # another unit is to take it over
    outputs: list[int] = field(default_factory=list)  # what its client has
    known_as: int | None = None  # by whom waits, if it has another id since it moved


class Dispatcher:
    """Sends drafts to units and their outputs to sinks; a sink's last output has a finish."""

    def __init__(
        self,
        models: Sequence[ModelSpec],
        units: Units,
        now: Callable[[], float],
        routing: Routing | None = None,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.ledger = Ledger()
        self.router = make_router(
            routing or Routing(), self.ledger, self._ready_replicas, self._on_switch
        )
        self.num_switches: Counter[tuple[str, str]] = Counter()  # of roles, by model and unit
        self._roles: dict[tuple[str, str], Role] = {}  # likewise: those that are not as configured
        self.is_draining = False
        self._units = units
        self._now = now
        self._relay = Relay(self.ledger, self)
        self._waiters: dict[int, _Waiter] = {}
        self._moved: dict[int, int] = {}  # ids that requests were submitted with -> those they have
        self._idle = asyncio.Event()
        self._ended = asyncio.Event()  # some request has

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
            self._replica(unit, model)
            for unit in self._units.units.values()
            if unit.is_ready and unit.takes(model)
        ]

    def _homes(self, model: str) -> list[UnitProcess]:
        """Units that have it and may be given new requests, ready or not."""
        units = self._units.units.values()
        return [
            unit
            for unit in units
            if unit.is_routed and any(part.name == model for part in unit.spec.models)
        ]

    def _unavailable(self, model: str) -> Unavailable:
        waits = [unit.retry_after_s(self._now()) for unit in self._homes(model)]
        return Unavailable(
            f"{model} is loading or being restarted; try again shortly",
            retry_after_s=min(waits, default=QUEUE_RETRY_S),
        )

    # -- requests ----------------------------------------------------------------------------

    def submit(self, draft: Draft, sink: Sink, unit: str | None = None) -> int:
        """Send `draft` to the best replica, or to `unit`, which knows its prompt; the request's id.

        Raises Unavailable if none is ready.
        """
        request_id = self.ledger.next_id()
        if not self._start(request_id, _Waiter(draft, sink), unit):
            raise self._unavailable(draft.model)
        return request_id

    def _start(self, request_id: int, waiter: _Waiter, near: str | None = None) -> bool:
        """Send a request that gave nothing yet, to `near` if that suits; False if none is ready."""
        draft = waiter.draft
        route = self._leaving(near, draft.model)
        if route is None and self._is_known(draft):
            ask = Ask(draft.model, draft.num_tokens, draft.max_tokens > 1, near)
            route = self.router.route(ask)
        if route is None:
            return False
        name = route.replica.unit
        block_tokens = self._units.units[name].models[draft.model].block_tokens
        request = draft.request(request_id, block_tokens)
        # Where it is decided who generates its answer, another one does if that unit dies.
        waiter.handoff = None if route.decoder is None else Handoff(Stage.DECODING)
        if route.is_handed_over:
            waiter.handoff = Handoff()
            request = msgspec.structs.replace(request, max_tokens=1, hold_s=LEASE_S)
        self.ledger.open(request, name, route.decoder)
        self._send(request, waiter, name)
        return True

    def _is_known(self, draft: Draft) -> bool:
        """Its model is still served, and no other one has that name now."""
        spec = self.models.get(draft.model)
        return spec is not None and draft.path in (None, spec.path)

    def _leaving(self, name: str | None, model: str) -> Route | None:
        """To a unit that only finishes, for who belongs to something that runs there."""
        unit = self._units.units.get(name) if name is not None else None
        if unit is None or not unit.is_ready or (unit.is_routed and model not in unit.leaving):
            return None
        return Route(self._replica(unit, model))

    def _send(self, request: Request, waiter: _Waiter, unit: str) -> None:
        self._waiters[request.id] = waiter
        if waiter.known_as is not None:
            self._moved[waiter.known_as] = request.id
        self._idle.clear()
        # A process that does not listen has just died; its funeral will tell this request, too.
        self._units.send(unit, Submit(request))

    def abort(self, request_id: int) -> None:
        """Nobody waits for this request any more: its units free everything of it at once."""
        live = self._close(self._moved.get(request_id, request_id))
        if live is not None:
            self._units.send(live.unit, Abort(live.request.id))
            self.router.settle()

    def unit_of(self, request_id: int) -> str | None:
        """Where a live request runs."""
        live = self.ledger.get(self._moved.get(request_id, request_id))
        return live.unit if live else None

    def _close(self, request_id: int) -> LiveRequest | None:
        """It has ended, however; whoever keeps something of it for another unit lets go."""
        waiter = self._waiters.pop(request_id, None)
        if waiter is not None and waiter.handoff is not None:
            self._relay.let_go(request_id, waiter.handoff)
        if waiter is not None and waiter.known_as is not None:
            del self._moved[waiter.known_as]
        live = self.ledger.close(request_id)
        self._ended.set()
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
            waiter.outputs += output.tokens
            if waiter.handoff is not None and self._hand_over(waiter, waiter.handoff, output):
                continue
            waiter.is_untouched = False
            self.ledger.add_tokens(output.request_id, len(output.tokens))
            # Before it is closed: what starts with it must find its unit, and no idle moment.
            waiter.sink(output)
            if output.finish is not None:
                self._close(output.request_id)
        self.router.settle()

    def on_death(self, unit: UnitProcess) -> None:
        """Everything live in `unit` is lost: what showed nothing yet may start over elsewhere.

        What is handed over from unit to unit is computed again by whoever is there.
        """
        for live in self.ledger.promised_to(unit.name):
            handoff = self._waiters[live.request.id].handoff
            assert handoff is not None, "it has an heir"
            self._relay.on(live.request.id, handoff, Event.HEIR_DIED)
        if lost := self.ledger.of_unit(unit.name):
            log.warning("event=requests_lost unit=%s count=%d", unit.name, len(lost))
        for live in lost:
            waiter = self._waiters[live.request.id]
            if waiter.outputs and waiter.handoff is not None:
                self._relay.on(live.request.id, waiter.handoff, Event.DIED)
                continue
            self._close(live.request.id)
            if not self._retry(live, waiter):
                self._give_up(live, waiter, unit.retry_after_s(self._now()))
        self.router.settle()

    def _give_up(self, live: LiveRequest, waiter: _Waiter, retry_after_s: float) -> None:
        why = f"the process that served {live.request.model} died; it is being restarted"
        waiter.sink(_gone(live, why, retry_after_s))

    def _retry(self, live: LiveRequest, waiter: _Waiter) -> bool:
        """Send a request that gave nothing to another replica, once; False if that cannot be."""
        if not waiter.is_untouched:
            return False
        # The same id: who waits knows it. The unit that knew it is dead.
        is_sent = self._start(live.request.id, waiter)
        waiter.is_untouched = False
        return is_sent

    # -- from a unit that ends ---------------------------------------------------------------

    def move(self, unit: str) -> int:
        """What runs in a unit that is routed no more goes on in others; how many requests did.

        Their tokens are computed anew there, those of the answer that the client has included. Who
        is not understood there, or does not fit, ends where it is.
        """
        moved = 0
        for live in self.ledger.of_unit(unit):
            waiter = self._waiters[live.request.id]
            if (route := self._way_out(waiter)) is None:
                continue
            there = route.replica.unit
            self._close(live.request.id)
            waiter.known_as = waiter.known_as or live.request.id
            self._units.send(unit, Abort(live.request.id))
            # Another id: what the old unit said of it before it hears of this is nobody's.
            self.ledger.open(request := self._rest(waiter, there), there)
            self.ledger.add_tokens(request.id, live.output_tokens)
            self._send(request, waiter, there)
            moved += 1
        return moved

    def _way_out(self, waiter: _Waiter) -> Route | None:
        """Where a request can go on to its end, alone; None: nowhere."""
        draft = waiter.draft
        # What was said of its prompt cannot be said again.
        is_stuck = not (waiter.outputs or waiter.is_untouched) or waiter.handoff is not None
        if is_stuck or not self._is_known(draft):
            return None
        route = self.router.route(Ask(draft.model, draft.num_tokens))
        if route is None or route.is_handed_over or route.decoder is not None:
            return None
        ready = self._units.units[route.replica.unit].models[draft.model]
        is_long = draft.num_tokens + draft.max_tokens > ready.max_model_len
        # Where models sleep it might wait for room for longer than it may.
        return None if is_long or ready.may_sleep else route

    def _rest(self, waiter: _Waiter, unit: str) -> Request:
        """What is left of a request, for another unit."""
        draft, request_id = waiter.draft, self.ledger.next_id()
        if not waiter.outputs:
            block_tokens = self._units.units[unit].models[draft.model].block_tokens
            return draft.request(request_id, block_tokens)
        # Whose first token came waits for none: there it arrives now.
        rest = draft.resumed(request_id, waiter.outputs, None)
        return msgspec.structs.replace(rest, arrived_s=self._now())

    # -- roles -------------------------------------------------------------------------------

    def role_now(self, model: str, unit: str) -> Role:
        """What `unit` does for `model` now, also where it is borrowed."""
        if self.router.is_borrowed(model, unit):
            return "mixed"
        parts = self._units.units[unit].spec.models
        configured = next(part.role for part in parts if part.name == model)
        return self._roles.get((model, unit), configured)

    def switch_role(self, model: str, unit: str, role: Role) -> None:
        """From the next request on `unit` does this for `model`, also when it was started again.

        Requests that are on their way stay where they are, and end there; only those that a decode
        unit was going to take over may find another one. Until the leases of both sides are over
        two units may wait for each other's room. Raises BadRequest for a model that is not in that
        unit, or a unit that exchanges nothing with others.
        """
        process = self._units.units.get(unit)
        if process is None or all(part.name != model for part in process.spec.models):
            homes = self._homes(model)
            known = ", ".join(home.name for home in homes) or "none, nobody has it"
            raise BadRequest(f"found no {model!r} in unit {unit!r}, expected one of: {known}")
        if role != "mixed" and not process.spec.has_roles:
            raise BadRequest(
                f"{unit} exchanges no K and V: expected a unit of models that others have roles"
                " for, or one with `exchanges: true`"
            )
        before = self.role_now(model, unit)
        self.router.rehome(model, unit)
        self._roles[model, unit] = role
        if before != role:
            self._on_switch(Switch(model, unit, before, role))

    def _replica(self, unit: UnitProcess, model: str) -> Replica:
        ready = unit.models[model]
        kv_tokens = ready.quota_blocks // ready.blocks_per_group * ready.block_tokens
        replica = Replica.of(unit.spec, model, kv_tokens)
        return replace(replica, role=self._roles.get((model, unit.name), replica.role))

    def _on_switch(self, switch: Switch) -> None:
        self.num_switches[switch.model, switch.unit] += 1
        log.info(
            "event=role_switch unit=%s model=%s from=%s to=%s",
            switch.unit,
            switch.model,
            switch.before,
            switch.after,
        )

    # -- from unit to unit -------------------------------------------------------------------

    def _hand_over(self, waiter: _Waiter, handoff: Handoff, output: Output) -> bool:
        """Take note of an output of a request on its way; True if its client need not know."""
        if output.refusal is not None and output.attempt:
            log.warning("event=transfer_failed error=%r", output.refusal.message)
        return self._relay.hear(handoff, output)

    def choose_decoder(self, request_id: int) -> str | None:
        """See `Reach`; so are the others up to `give_up`."""
        decoder = self.router.decoder(request_id)
        return None if decoder is None else decoder.unit

    def identity(self, unit: str) -> str:
        return self._units.units[unit].identity.decode()

    def address(self, model: str, holder: str) -> bytes | None:
        unit = self._units.units[holder.rpartition("#")[0]]
        is_there = unit.is_ready and unit.identity.decode() == holder
        return unit.models[model].address if is_there else None

    def resume(self, request_id: int, unit: str, source: Source | None) -> None:
        self._units.send(unit, Submit(self._resumed(request_id, source)))

    def extend(self, request_id: int, unit: str, piece: Piece) -> None:
        more = Extend(request_id, piece)
        if piece.is_last:
            request = self._resumed(request_id, None)
            more = Extend(request_id, piece, request.payload, request.num_outputs)
        self._units.send(unit, more)

    def release(self, request_id: int, unit: str) -> None:
        self._units.send(unit, Abort(request_id))

    def give_up(self, request_id: int) -> None:
        waiter, live = self._waiters[request_id], self._close(request_id)
        if live is not None:
            self._give_up(live, waiter, QUEUE_RETRY_S)

    def _resumed(self, request_id: int, source: Source | None) -> Request:
        waiter = self._waiters[request_id]
        return waiter.draft.resumed(request_id, waiter.outputs, source)

    def serve(self, models: Sequence[ModelSpec]) -> None:
        """These are the models from now on; what is live of others goes on."""
        self.models.clear()
        self.models.update((model.name, model) for model in models)

    async def quiet(self, unit: str, model: str | None = None) -> None:
        """Until nothing is live in `unit`, or on its way there; of `model`, if that is given."""
        while any(
            model in (None, live.request.model)
            for live in (*self.ledger.of_unit(unit), *self.ledger.promised_to(unit))
        ):
            self._ended.clear()
            await self._ended.wait()

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


def _gone(live: LiveRequest, why: str, retry_after_s: float) -> Output:
    """The last output of a request that its unit will not end."""
    refusal = Refusal(Unavailable.status, Unavailable.kind, why, retry_after_s)
    return Output(live.request.id, finish=FinishReason.ERROR, refusal=refusal)
