"""Units that share replicas, and the requests for their models, on one virtual clock."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from muxrt.config.placement import ModelSpec, UnitSpec, exchanging
from muxrt.config.routing import Routing
from muxrt.core import ID_BYTES, FinishReason, Output, Piece, Request, Source
from muxrt.engine.handoff import LEASE_S, Event, Handoff, Stage
from muxrt.engine.messages import Extend
from muxrt.engine.pools import make_router
from muxrt.engine.relay import Relay
from muxrt.engine.requests import Ledger, LiveRequest
from muxrt.engine.router import Ask, Replica, Switch
from muxrt.errors import BadRequest, ConfigError, Overloaded, Unavailable
from muxrt.sim.links import Link, Links
from muxrt.sim.loop import ARRIVE, FINISH, PLAN, EventLoop
from muxrt.sim.setting import Failure, Setting
from muxrt.sim.tokens import SimPrompt
from muxrt.sim.unit import SimUnit
from muxrt.sim.use import SAMPLE_S, UnitUse
from muxrt.workload.arrivals import Arrival


@dataclass(slots=True)
class Served:
    """What one request got; times on the clock of the arrivals, seconds."""

    index: int  # among all arrivals
    model: str
    at_s: float
    prompt_tokens: int
    unit: str | None = None  # None: it went nowhere
    output_tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None
    finish: FinishReason | None = None
    refused: int | None = None  # the HTTP status of its refusal, or of its end with its unit
    is_retried: bool = False  # its first unit died before its first token
    handoff: Handoff | None = None  # another unit takes it over after its prompt

    @property
    def is_answered(self) -> bool:
        """It got all of its tokens."""
        return self.finish in (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What became of every request, in order of arrival, and of every unit."""

    served: tuple[Served, ...]
    units: tuple[UnitUse, ...]
    switches: tuple[tuple[float, Switch], ...] = ()  # of roles, and when


@dataclass(frozen=True, slots=True)
class Group:
    """Units that belong together: each model of one is nowhere else."""

    units: tuple[UnitSpec, ...]
    models: tuple[ModelSpec, ...]
    routing: Routing = field(default_factory=Routing)


def groups(
    units: Sequence[UnitSpec], models: Sequence[ModelSpec], routing: Routing | None = None
) -> list[Group]:
    """Split a placement into parts without a common model: what one does, no other notices."""
    found: list[list[UnitSpec]] = []
    for unit in units:
        names = {part.name for part in unit.models}
        near = [g for g in found if any(p.name in names for u in g for p in u.models)]
        found = [g for g in found if g not in near] + [[u for g in near for u in g] + [unit]]
    specs = {spec.name: spec for spec in models}
    result = []
    for members in found:
        ordered = tuple(unit for unit in units if unit in members)
        here = dict.fromkeys(part.name for unit in ordered for part in unit.models)
        here_specs = tuple(specs[name] for name in here)
        result.append(Group(ordered, here_specs, routing or Routing()))
    return result


@dataclass(slots=True)
class _Arrivals:
    """What is still to come, in order of time, with each one's place among all arrivals."""

    items: Sequence[tuple[int, Arrival]]
    next: int = field(default=0)


# So many more requests have ended.
Tell = Callable[[int], None]


class Watch(Protocol):
    """Is told of every request that ends, and may have seen enough."""

    def ended(self, served: Served) -> None:
        """A request got its last token, or was refused."""

    @property
    def is_certain(self) -> bool:
        """The simulation may stop."""


class Simulation:
    """Router, units and clock of one group."""

    def __init__(self, group: Group, setting: Setting, watch: Watch | None = None) -> None:
        """Raises ConfigError where a unit cannot be laid out or costed, or dies while dead."""
        self._watch = watch
        self.loop = EventLoop()
        self.links = Links(self.loop)
        self.ledger = Ledger()
        self._relay = Relay(self.ledger, self)
        self.served: list[Served] = []
        self._live: dict[int, Served] = {}
        self._requests: dict[int, Request] = {}  # of those, as their clients sent them
        self._setting = setting
        self._models = {spec.name: spec for spec in group.models}
        placed = exchanging(group.units)
        self.units = {spec.name: SimUnit(spec, group.models, setting, self) for spec in placed}
        self._replicas = {name: self._of_model(name) for name in self._models}
        self._switches: list[tuple[float, Switch]] = []
        self.router = make_router(group.routing, self.ledger, self._published, self._on_switch)
        self._coming = _Arrivals([])
        self._asks_exactly = setting.asks_exactly
        self._request_s = setting.engine.request_s  # all of it before the unit: the same TTFT
        self._next_sample_s = SAMPLE_S
        self._tell: Tell = lambda num_requests: None
        self._told = 0
        self._changes_s = deque(self._expect_failures(setting.failures))

    def run(
        self, arrivals: Sequence[tuple[int, Arrival]], tell: Tell = lambda num_requests: None
    ) -> GroupResult:
        """Serve `arrivals` (place, arrival), in order of time, until the last one has ended.

        `tell` is told from time to time how many requests have ended since it was told last.
        """
        self._tell = tell
        self._coming = _Arrivals(arrivals)
        self._expect()
        self.loop.at(self._next_sample_s, self._sample, PLAN)
        while self._live or self._coming.next < len(arrivals):
            if self._watch is not None and self._watch.is_certain:
                break
            if not self.loop.step():
                raise AssertionError("requests wait and nothing is going to happen")
        wall_s = max((s.last_s for s in self.served if s.last_s is not None), default=0.0)
        self._tell(len(self.served) - len(self._live) - self._told)
        uses = tuple(unit.use(wall_s) for unit in self.units.values())
        return GroupResult(tuple(self.served), uses, tuple(self._switches))

    def _of_model(self, model: str) -> list[Replica]:
        plans = [unit.plan for unit in self.units.values() if model in unit.plan.models]
        return [Replica.of(plan.spec, model, plan.kv_tokens(model)) for plan in plans]

    def _on_switch(self, switch: Switch) -> None:
        self._switches.append((self.loop.now_s, switch))

    def _sample(self) -> None:
        for unit in self.units.values():
            unit.sample()
        num_ended = len(self.served) - len(self._live)
        self._tell(num_ended - self._told)
        self._told = num_ended
        self._next_sample_s = self.loop.now_s + SAMPLE_S
        self.loop.at(self._next_sample_s, self._sample, PLAN)

    def horizon(self) -> float:
        """When units are looked at or given something next.

        Runs of decode steps go on until then without asking (`sim/folding.py`): whatever comes to a
        unit from outside must be counted in.
        """
        coming, next_s = self._coming, self._next_sample_s
        if self._changes_s:
            next_s = min(next_s, self._changes_s[0])
        if coming.next < len(coming.items):
            return min(next_s, coming.items[coming.next][1].at_s + self._request_s)
        return next_s

    # -- failures ----------------------------------------------------------------------------

    def _expect_failures(self, failures: Sequence[Failure]) -> list[float]:
        """Those of the group's units are events; when they and their ends happen, in order."""
        times: list[float] = []
        back_s: dict[str, float] = {}
        for failure in sorted(failures, key=lambda failure: failure.at_s):
            if failure.unit not in self.units:
                continue
            if failure.at_s < back_s.get(failure.unit, 0.0):
                raise ConfigError(
                    f"{failure.unit}: found a failure at {failure.at_s:g} s, expected one after it"
                    f" is back from the one before, at {back_s[failure.unit]:g} s"
                )
            back_s[failure.unit] = failure.ends_s
            self.loop.at(failure.at_s, partial(self._die, failure.unit), FINISH)
            times.append(failure.at_s)
            if failure.down_s is not None:
                self.loop.at(failure.ends_s, partial(self._revive, failure.unit), FINISH)
                times.append(failure.ends_s)
        return sorted(times)

    def _die(self, name: str) -> None:
        """What the endpoint does when a unit's process ends (server/dispatch.py: `on_death`)."""
        self._changes_s.popleft()
        self.units[name].die()
        for promised in self.ledger.promised_to(name):
            handoff = self._live[promised.request.id].handoff
            assert handoff is not None, "it has an heir"
            self._relay.on(promised.request.id, handoff, Event.HEIR_DIED)
        for lost in self.ledger.of_unit(name):
            served = self._live[lost.request.id]
            if served.output_tokens and served.handoff is not None:
                self._relay.on(lost.request.id, served.handoff, Event.DIED)
                continue
            self._let_go(lost.request.id, served)
            self.ledger.close(lost.request.id)
            if not self._retry(lost, served):
                self._lose(lost.request.id, served)
        self.router.settle()

    def _lose(self, request_id: int, served: Served) -> None:
        del self._live[request_id], self._requests[request_id]
        self._turn_away(served, Unavailable.status)

    def _revive(self, name: str) -> None:
        self._changes_s.popleft()
        self.units[name].start()

    def _retry(self, lost: LiveRequest, served: Served) -> bool:
        """What gave nothing may start over elsewhere, once; False if that cannot be."""
        if served.first_s is not None or served.is_retried:
            return False
        served.is_retried = self._start(self._requests[lost.request.id], served)
        return served.is_retried

    # -- requests ----------------------------------------------------------------------------

    def _expect(self) -> None:
        """The next arrival is an event; those after it wait for theirs."""
        coming = self._coming
        if coming.next < len(coming.items):
            at_s = coming.items[coming.next][1].at_s + self._request_s
            self.loop.at(at_s, self._arrive, ARRIVE)

    def _arrive(self) -> None:
        index, arrival = self._coming.items[self._coming.next]
        self._coming.next += 1
        self._submit(index, arrival)
        self._expect()

    def _submit(self, index: int, arrival: Arrival) -> None:
        """What the endpoint does with a request: refuse it, or send it to a replica."""
        spec = self._models[arrival.model]
        served = Served(index, arrival.model, arrival.at_s, arrival.prompt_tokens)
        self.served.append(served)
        ready = self._ready(arrival.model)
        if not ready:
            self._turn_away(served, Unavailable.status)
            return
        queued = self.ledger.queued(arrival.model)
        if queued and queued + 1 > spec.max_queue:
            self._turn_away(served, Overloaded.status)
            return
        longest = min(self.units[r.unit].plan.models[r.model].max_model_len for r in ready)
        room = longest - arrival.prompt_tokens
        if room < 1:
            self._turn_away(served, BadRequest.status)
            return
        timeout_s = spec.queue_timeout_s
        request = Request(
            id=self.ledger.next_id(),
            model=arrival.model,
            prompt_tokens=arrival.prompt_tokens,
            # A client that sets no limit; the sequence ends by itself.
            max_tokens=min(room, arrival.output_tokens) if self._asks_exactly else room,
            payload=msgspec.msgpack.encode(SimPrompt(arrival.output_tokens)),
            arrived_s=arrival.at_s,
            deadline_s=arrival.at_s + timeout_s if timeout_s else None,
        )
        is_sent = self._start(request, served)
        assert is_sent, "some are ready"

    def _start(self, request: Request, served: Served) -> bool:
        """Send a request that gave nothing yet; False if nobody is ready."""
        route = self.router.route(Ask(request.model, request.prompt_tokens, request.max_tokens > 1))
        if route is None:
            return False
        served.handoff = None if route.decoder is None else Handoff(Stage.DECODING)
        self._requests[request.id] = request
        if route.is_handed_over:
            served.handoff = Handoff()
            request = msgspec.structs.replace(request, max_tokens=1, hold_s=LEASE_S)
        self._live[request.id] = served
        self.ledger.open(request, route.replica.unit, route.decoder)
        self._send(request, served, route.replica.unit)
        return True

    def _ready(self, model: str) -> list[Replica]:
        return [r for r in self._replicas[model] if self.units[r.unit].is_up]

    def _published(self, model: str) -> list[Replica]:
        """Who is ready, with all the tokens that were generated so far."""
        ready = self._ready(model)
        if len(ready) > 1:  # the router counts the tokens of each
            for candidate in ready:
                self.units[candidate.unit].publish()
        return ready

    def _send(self, request: Request, served: Served, unit: str) -> None:
        served.unit = unit
        self.units[unit].add(request)

    # -- from unit to unit (as server/dispatch.py) -------------------------------------------

    def _let_go(self, request_id: int, served: Served) -> None:
        """Whoever keeps something of it for another unit need not."""
        if served.handoff is not None:
            self._relay.let_go(request_id, served.handoff)

    def choose_decoder(self, request_id: int) -> str | None:
        """See `Reach`; so are the others up to `give_up`."""
        decoder = self.router.decoder(request_id)
        return None if decoder is None else decoder.unit

    def identity(self, unit: str) -> str:
        return self.units[unit].identity

    def address(self, model: str, holder: str) -> bytes | None:
        unit = self.units[holder.rpartition("#")[0]]
        return b"" if unit.is_up and unit.identity == holder else None

    def resume(self, request_id: int, unit: str, source: Source | None) -> None:
        payload, said = self._payload(request_id)
        request = msgspec.structs.replace(
            self._requests[request_id],
            payload=payload,
            deadline_s=None,
            num_outputs=said,
            source=source,
        )
        self._settle_in(request_id)
        self._say(unit, partial(self.units[unit].add, request))

    def extend(self, request_id: int, unit: str, piece: Piece) -> None:
        more = Extend(request_id, piece)
        if piece.is_last:
            more = Extend(request_id, piece, *self._payload(request_id))
            self._settle_in(request_id)
        self._say(unit, partial(self.units[unit].extend, more))

    def release(self, request_id: int, unit: str) -> None:
        self._say(unit, partial(self.units[unit].abort, request_id))

    def give_up(self, request_id: int) -> None:
        served = self._live[request_id]
        self._let_go(request_id, served)
        self.ledger.close(request_id)
        self._lose(request_id, served)

    def _settle_in(self, request_id: int) -> None:
        """The request is where the ledger says; an heir does not have it yet."""
        live = self.ledger.get(request_id)
        assert live is not None, "who is on the way is live"
        self._live[request_id].unit = live.unit

    def _payload(self, request_id: int) -> tuple[bytes, int]:
        """Of a request that goes on elsewhere, and how many tokens of it are said."""
        payload, said = self._requests[request_id].payload, self._live[request_id].output_tokens
        prompt = msgspec.msgpack.decode(payload, type=SimPrompt)
        return msgspec.msgpack.encode(SimPrompt(prompt.output_tokens, said)), said

    def _say(self, unit: str, say: Callable[[], None]) -> None:
        """An event of its own: the unit that spoke is in the middle of a step."""
        identity = self.units[unit].identity

        def tell() -> None:
            if self.units[unit].is_up and self.units[unit].identity == identity:
                say()

        self.loop.at(self.loop.now_s, tell, FINISH)

    def path(self, source: str, unit: str) -> tuple[Link, ...]:
        """The links from `source` (name and life) to `unit`; none where it is gone."""
        name, _, _ = source.rpartition("#")
        sender, receiver = self.units[name], self.units[unit]
        if not sender.is_up or sender.identity != source:
            return ()
        gpus, rate = self._setting.gpus, self._setting.network_bytes_per_s
        ends = []
        for end, one in (("out", sender), ("in", receiver)):
            mesh = one.plan.spec.mesh
            link_s = gpus[mesh.kind].link_bytes_per_s if mesh.kind else rate
            ends.append(Link(f"{one.plan.spec.name} {end}", link_s * len(mesh.gpus or (0,))))
        here, there = (one.plan.spec.mesh.node or 0 for one in (sender, receiver))
        if here == there:
            return tuple(ends)
        return (*ends, Link(f"node {here} out", rate), Link(f"node {there} in", rate))

    def num_bytes(self, source: str, model: str, pieces: Sequence[Piece]) -> int:
        """Of these pieces of a sequence, as they lie in `source`."""
        plan = self.units[source.rpartition("#")[0]].plan
        layout = plan.models[model].layout
        group_bytes = ID_BYTES * layout.blocks_per_group
        layers = [len(p.blocks) // group_bytes * (p.end_layer - p.first_layer) for p in pieces]
        return sum(layers) * layout.shape.num_kv_heads * plan.arena.plane_bytes

    def _turn_away(self, served: Served, status: int) -> None:
        served.finish, served.refused = FinishReason.ERROR, status
        if self._watch is not None:
            self._watch.ended(served)

    def advance(
        self, model: str, unit: str, request_ids: Sequence[int], num_tokens: int, last_s: float
    ) -> None:
        """Requests got `num_tokens` more each, the last of them at `last_s`; they go on."""
        live = self._live
        for request_id in request_ids:
            served = live[request_id]
            served.output_tokens += num_tokens
            served.last_s = last_s
        if len(self._replicas[model]) > 1:
            self.ledger.credit(request_ids, num_tokens)

    def weigh(self, model: str, unit: str, num_tokens: int) -> None:
        """Requests of `model` in `unit` got so many tokens more in all; `advance` says which."""
        if len(self._replicas[model]) > 1:  # the router counts them where it has a choice
            self.ledger.weigh(model, unit, num_tokens)

    def emit(self, outputs: tuple[Output, ...]) -> None:
        """Tokens and ends, as the client sees them."""
        now, live, replicas = self.loop.now_s, self._live, self._replicas
        for output in outputs:
            served = live.get(output.request_id)
            if served is None:
                continue  # what an attempt that was given up said at the very end
            if served.handoff is not None and self._relay.hear(served.handoff, output):
                continue
            if output.tokens:
                num_tokens = len(output.tokens)
                # The router counts tokens where it has a choice, and who has none yet anywhere.
                if served.first_s is None:
                    served.first_s = now
                    self.ledger.add_tokens(output.request_id, num_tokens)
                elif len(replicas[served.model]) > 1:
                    self.ledger.add_tokens(output.request_id, num_tokens)
                served.output_tokens += num_tokens
                served.last_s = now
            if output.finish is not None:
                served.finish = output.finish
                if output.refusal is not None:
                    served.refused = output.refusal.status
                self._let_go(output.request_id, served)
                del live[output.request_id], self._requests[output.request_id]
                self.ledger.close(output.request_id)
                if self._watch is not None:
                    self._watch.ended(served)
        self.router.settle()
