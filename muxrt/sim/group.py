"""Units that share replicas, and the requests for their models, on one virtual clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from muxrt.config.placement import ModelSpec, UnitSpec
from muxrt.core import FinishReason, Output, Request
from muxrt.engine.build import build_unit, plan_unit
from muxrt.engine.requests import Ledger
from muxrt.engine.router import Replica, choose
from muxrt.errors import BadRequest, Overloaded
from muxrt.sim.executor import MeshExecutor, SimPrompt
from muxrt.sim.folding import FoldingExecutor
from muxrt.sim.loop import ARRIVE, PLAN, Event, EventLoop
from muxrt.sim.mesh import MeshCost
from muxrt.sim.setting import Setting
from muxrt.workload.arrivals import Arrival

SAMPLE_S = 1.0  # how often KV use is looked at


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
    refused: int | None = None  # the HTTP status of its refusal

    @property
    def is_answered(self) -> bool:
        """It got all of its tokens."""
        return self.finish in (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What one model did in one unit."""

    model: str
    preemptions_swap: int
    preemptions_recompute: int
    quota_blocks: int  # at the end


@dataclass(frozen=True, slots=True)
class UnitUse:
    """How busy one unit was until its last request ended."""

    unit: str
    num_blocks: int
    kv_mean: float  # share of the blocks that sequences held, sampled once a second
    kv_peak: float
    lanes_busy: tuple[float, ...]  # share of the time, by lane
    num_batches: int
    models: tuple[ModelUse, ...]


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What became of every request, in order of arrival, and of every unit."""

    served: tuple[Served, ...]
    units: tuple[UnitUse, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Units that belong together: each model of one is nowhere else."""

    units: tuple[UnitSpec, ...]
    models: tuple[ModelSpec, ...]


def groups(units: Sequence[UnitSpec], models: Sequence[ModelSpec]) -> list[Group]:
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
        result.append(Group(ordered, tuple(specs[name] for name in here)))
    return result


@dataclass(slots=True)
class _Gauge:
    """Share of the blocks in use, sampled."""

    num_samples: int = 0
    total: float = 0.0
    peak: float = 0.0

    def add(self, share: float) -> None:
        self.num_samples += 1
        self.total += share
        self.peak = max(self.peak, share)


class SimUnit:
    """A unit of the brain with its timer and its lanes."""

    def __init__(
        self, spec: UnitSpec, models: Sequence[ModelSpec], setting: Setting, group: "Simulation"
    ) -> None:
        self._loop = group.loop
        self.plan = plan_unit(spec, {m.name: m for m in models}, setting.shapes)
        block_bytes = self.plan.arena.block_bytes
        cost = MeshCost(spec, setting, block_bytes)
        folding = None
        if setting.fold and cost.can_fold:
            folding = FoldingExecutor(self._loop, cost, group.advance, self._horizon)
        self.executor = folding or MeshExecutor(self._loop, cost)
        self._group = group
        self.unit = build_unit(self.plan, self.executor, self._now, group.emit)
        if folding is not None:
            folding.attach(self.unit)
        self._folding = folding
        self.gauge = _Gauge()
        self._timer: Event | None = None
        self._timer_s: float | None = None

    def _now(self) -> float:
        return self._loop.now_s

    def _horizon(self) -> float:
        """The next request or sample of the group, or the unit's own timer."""
        group_s = self._group.horizon()
        return group_s if self._timer_s is None else min(group_s, self._timer_s)

    def add(self, request: Request) -> None:
        """A request arrives; its deadline may be the next thing to look at."""
        self.settle()
        self.unit.add(request)
        self._arm()

    def settle(self) -> None:
        """All that happened so far is written down."""
        if self._folding is not None:
            self._folding.settle()

    def publish(self) -> None:
        """The router may count the tokens that were generated so far."""
        if self._folding is not None:
            self._folding.publish()

    def _arm(self) -> None:
        next_s = self.unit.next_timer()
        if next_s is None or (self._timer_s is not None and self._timer_s <= next_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = self._loop.at(next_s, self._wake), next_s

    def _wake(self) -> None:
        self._timer = self._timer_s = None
        next_s = self.unit.next_timer()
        if next_s is not None and next_s <= self._loop.now_s:
            self.settle()
            self.unit.tick()
        self._arm()

    def sample(self) -> None:
        """Look at how full the arena is."""
        pool = self.unit.scheduler.memory.pool
        self.gauge.add(pool.num_used / pool.num_blocks)

    def use(self, wall_s: float) -> UnitUse:
        """How busy it was in `wall_s` seconds."""
        stats, gauge = self.unit.stats(), self.gauge
        busy = self.executor.lanes.busy_s
        num_lanes = self.unit.scheduler.limits.num_lanes
        return UnitUse(
            unit=self.unit.name,
            num_blocks=stats.blocks_total,
            kv_mean=gauge.total / gauge.num_samples if gauge.num_samples else 0.0,
            kv_peak=gauge.peak,
            lanes_busy=tuple(
                busy.get(lane, 0.0) / wall_s if wall_s else 0.0 for lane in range(num_lanes)
            ),
            num_batches=self.executor.lanes.num_batches,
            models=tuple(
                ModelUse(m.model, m.preemptions_swap, m.preemptions_recompute, m.blocks_quota)
                for m in stats.models
            ),
        )


@dataclass(slots=True)
class _Arrivals:
    """What is still to come, in order of time, with each one's place among all arrivals."""

    items: Sequence[tuple[int, Arrival]]
    next: int = field(default=0)


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
        """Raises ConfigError where a unit cannot be laid out or costed."""
        self._watch = watch
        self.loop = EventLoop()
        self.ledger = Ledger()
        self.served: list[Served] = []
        self._live: dict[int, Served] = {}
        self._models = {spec.name: spec for spec in group.models}
        self.units = {spec.name: SimUnit(spec, group.models, setting, self) for spec in group.units}
        self._replicas = {
            name: [
                Replica(name, unit.name, part.traffic)
                for unit in group.units
                for part in unit.models
                if part.name == name
            ]
            for name in self._models
        }
        self._lengths = {
            name: min(
                self.units[replica.unit].plan.models[name].max_model_len for replica in replicas
            )
            for name, replicas in self._replicas.items()
        }
        self._coming = _Arrivals([])
        self._asks_exactly = setting.asks_exactly
        self._request_s = setting.engine.request_s  # all of it before the unit: the same TTFT
        self._next_sample_s = SAMPLE_S

    def run(self, arrivals: Sequence[tuple[int, Arrival]]) -> GroupResult:
        """Serve `arrivals` (place, arrival), in order of time, until the last one has ended."""
        self._coming = _Arrivals(arrivals)
        self._expect()
        self.loop.at(self._next_sample_s, self._sample, PLAN)
        while self._live or self._coming.next < len(arrivals):
            if self._watch is not None and self._watch.is_certain:
                break
            if not self.loop.step():
                raise AssertionError("requests wait and nothing is going to happen")
        wall_s = max((s.last_s for s in self.served if s.last_s is not None), default=0.0)
        uses = tuple(unit.use(wall_s) for unit in self.units.values())
        return GroupResult(tuple(self.served), uses)

    def _sample(self) -> None:
        for unit in self.units.values():
            unit.sample()
        self._next_sample_s = self.loop.now_s + SAMPLE_S
        self.loop.at(self._next_sample_s, self._sample, PLAN)

    def horizon(self) -> float:
        """When units are looked at or given something next."""
        coming = self._coming
        if coming.next < len(coming.items):
            return min(self._next_sample_s, coming.items[coming.next][1].at_s + self._request_s)
        return self._next_sample_s

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
        room = self._lengths[arrival.model] - arrival.prompt_tokens
        if room < 1:
            self._turn_away(served, BadRequest.status)
            return
        queued = self.ledger.queued(arrival.model)
        if queued and queued + 1 > spec.max_queue:
            self._turn_away(served, Overloaded.status)
            return
        replicas = self._replicas[arrival.model]
        if len(replicas) > 1:  # the router counts the tokens of each
            for candidate in replicas:
                self.units[candidate.unit].publish()
        replica = choose(replicas, self.ledger)
        assert replica is not None, "a model of a placement is in one of its units"
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
        served.unit = replica.unit
        self._live[request.id] = served
        self.ledger.open(request, replica.unit)
        self.units[replica.unit].add(request)

    def _turn_away(self, served: Served, status: int) -> None:
        served.finish, served.refused = FinishReason.ERROR, status
        if self._watch is not None:
            self._watch.ended(served)

    def advance(self, request_id: int, num_tokens: int, last_s: float) -> None:
        """A request got more tokens, the last of them at `last_s`; it goes on."""
        served = self._live[request_id]
        served.output_tokens += num_tokens
        served.last_s = last_s
        self.ledger.add_tokens(request_id, num_tokens)

    def emit(self, outputs: tuple[Output, ...]) -> None:
        """Tokens and ends, as the client sees them."""
        now, live, replicas = self.loop.now_s, self._live, self._replicas
        for output in outputs:
            served = live[output.request_id]
            if output.tokens:
                # The router counts tokens where it has a choice, and who has none yet anywhere.
                if served.first_s is None or len(replicas[served.model]) > 1:
                    self.ledger.add_tokens(output.request_id, len(output.tokens))
                if served.first_s is None:
                    served.first_s = now
                served.output_tokens += len(output.tokens)
                served.last_s = now
            if output.finish is not None:
                served.finish = output.finish
                if output.refusal is not None:
                    served.refused = output.refusal.status
                del live[output.request_id]
                self.ledger.close(output.request_id)
                if self._watch is not None:
                    self._watch.ended(served)
