"""Units with roles under the virtual clock: real dispatcher, brains, kernels, memory, transfers.

What is made up is time, and what goes wrong: units die and come back, transfers are late, damaged
or lost. Two units read each other's memory as two processes would, through descriptors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import msgspec
import numpy as np
from real_world import DEMO, RealWorld, demo_llama
from torch import Tensor

from muxrt.config.model import load_shape
from muxrt.config.placement import (
    Lanes,
    Memory,
    ModelSpec,
    Role,
    Scheduling,
    UnitModel,
    UnitSpec,
    exchanging,
)
from muxrt.config.routing import Routing
from muxrt.core import (
    Copy,
    FinishReason,
    Output,
    Refusal,
    Result,
    SamplingParams,
    Transfer,
    TransferKind,
    Work,
)
from muxrt.engine.build import UnitPlan, build_unit, plan_unit
from muxrt.engine.executor import Done
from muxrt.engine.messages import Abort, Extend, ModelReady, Ready, Step, Submit, ToUnit
from muxrt.errors import TransferFailed, Unavailable
from muxrt.kernels import Team
from muxrt.server.dispatch import Dispatcher, Draft
from muxrt.server.unit_process import UnitProcess
from muxrt.sim.loop import FINISH, EventLoop
from muxrt.worker.kv_storage import Storage
from muxrt.worker.lanes import attempt
from muxrt.worker.runner import Copier, Resident, Runner
from muxrt.worker.torch_transport import TorchTransport
from muxrt.worker.transfer import Exchange, Geometry, Ids, Transport
from muxrt.worker.transports import SharedTransport

BATCH_S, COPY_S = 0.01, 0.005


@dataclass
class Faults:
    """What befalls the next transfers of a kind, one each; then nothing any more."""

    coming: list[str] = field(default_factory=list)  # "", "lost", "damaged", "late"
    befall: TransferKind = TransferKind.FETCH

    def next(self) -> str:
        return self.coming.pop(0) if self.coming else ""


class FaultyTransport:
    """A transport between real memories that loses or damages what it is told to."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.name = inner, inner.name
        self.fault = ""

    def peer(self) -> bytes:
        return self.inner.peer()

    def scratch(self, num_bytes: int) -> Tensor:
        return self.inner.scratch(num_bytes)

    def read(
        self, unit: str, peer: bytes, ids: Ids, block_bytes: int, into: Tensor, into_ids: Ids
    ) -> None:
        fault, self.fault = self.fault, ""
        if fault == "lost":
            raise TransferFailed("nothing came")
        self.inner.read(unit, peer, ids, block_bytes, into, into_ids)
        if fault == "damaged":
            into[int(into_ids[len(ids) // 2]) * block_bytes + block_bytes // 3] ^= 4

    def close(self) -> None:
        self.inner.close()


def open_transport(transfer: str, storage: Storage) -> Transport:
    """As units open it."""
    arena = storage.arena
    if transfer == "gloo":
        return TorchTransport(arena.tensor())
    return SharedTransport(arena.fd, arena.num_bytes)


class Host:
    """One life of a unit: its memory, its brain, what computes."""

    def __init__(self, world: "SplitWorld", plan: UnitPlan, identity: str) -> None:
        self.identity, self.plan = identity, plan
        self._loop, self._faults = world.loop, world.faults
        self.storage = Storage(plan)
        self.transport = FaultyTransport(open_transport(world.transfer, self.storage))
        geometries = {model: Geometry.of(plan, model) for model in plan.models}
        arena = self.storage.arena.tensor()
        self.exchange = Exchange(identity, geometries, arena, self.transport)
        residents = {m: Resident.of(demo_llama(m), m, self.storage) for m in plan.models}
        self._runner = Runner(residents, Team())
        self._copier = Copier(self.storage, plan.arena.block_bytes, self.exchange, residents)
        self._lane_free_s: dict[int, float] = {}
        self.is_alive = True
        self.unit = build_unit(plan, self, lambda: world.loop.now_s, self._emit)
        self._world = world
        self._timer_s: float | None = None

    def launch(self, work: Work, done: Done) -> None:
        fault = ""
        if isinstance(work, Transfer) and work.kind is self._faults.befall:
            fault = self._faults.next()
        seconds = COPY_S if isinstance(work, Copy | Transfer) else BATCH_S * work.share
        is_lost = fault == "lost" and self._faults.befall is TransferKind.SEAL
        start_s = max(self._loop.now_s, self._lane_free_s.get(work.lane, 0.0))
        self._lane_free_s[work.lane] = start_s + seconds + (100.0 if fault == "late" else 0.0)

        def land() -> None:
            if not self.is_alive:
                return
            self.transport.fault = fault
            run = self._copier.run if isinstance(work, Copy | Transfer) else self._runner.run
            result = Result(error="lost") if is_lost else attempt(run, work)
            done(work, msgspec.structs.replace(result, elapsed_s=seconds))
            self.arm()

        self._loop.at(self._lane_free_s[work.lane], land, FINISH)

    def arm(self) -> None:
        """Its timer, as the service's poller has one."""
        next_s = self.unit.next_timer()
        if next_s is not None and (self._timer_s is None or next_s < self._timer_s):
            self._timer_s = next_s
            self._loop.at(next_s, self._tick)

    def _tick(self) -> None:
        self._timer_s = None
        if self.is_alive:
            self.unit.tick()
            self.arm()

    def _emit(self, outputs: tuple[Output, ...]) -> None:
        self._world.say(self.identity, outputs)

    def ready(self) -> Ready:
        models = tuple(
            ModelReady(
                name,
                model.layout.block_tokens,
                model.max_model_len,
                self.plan.quotas[name],
                model.layout.blocks_per_group,
                address=self.exchange.address(name),
            )
            for name, model in self.plan.models.items()
        )
        return Ready(self.plan.spec.name, 0, models, self.plan.num_blocks, 0)

    def die(self) -> None:
        self.is_alive = False
        self.transport.close()
        self.storage.close()


@dataclass
class Asked:
    """What a client wants and got."""

    model: str
    prompt: list[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # when each came
    output: Output | None = None  # the last one
    request_id: int = 0


def split_plan(
    name: str,
    role: Role,
    models: Sequence[str],
    num_sequences: float = 8.0,
    planes_per_block: int = 1,
    plane_tokens: int = 16,
    depth: int = 2,
    **scheduling: object,
) -> UnitPlan:
    """A unit with room for so many sequences of maximum length of each model."""
    shapes = {model: load_shape(DEMO / model) for model in models}
    specs = {m: ModelSpec(name=m, path=str(DEMO / m), dtype="float32") for m in models}

    def plan(kv_bytes: int) -> UnitPlan:
        memory = Memory(
            kv_bytes=kv_bytes,
            swap_bytes=kv_bytes // 4,
            planes_per_block=planes_per_block,
            plane_tokens=plane_tokens,
        )
        unit = UnitSpec(
            name=name,
            models=tuple(UnitModel(name=model, role=role) for model in models),
            memory=memory,
            lanes=Lanes(split=(1,), depth=depth),
            scheduling=msgspec.convert(scheduling, Scheduling),
        )
        return plan_unit(unit, specs, shapes)

    roomy = plan(1 << 34)
    floor = sum(m.floor_blocks for m in roomy.models.values()) * roomy.arena.block_bytes
    return plan(int(num_sequences * floor))


class SplitWorld:
    """Units with roles behind one dispatcher."""

    def __init__(
        self,
        plans: Sequence[UnitPlan],
        faults: Sequence[str] = (),
        routing: Routing | None = None,
        transfer: str = "shared",
    ) -> None:
        self.transfer = transfer
        self.loop, self.faults = EventLoop(), Faults(list(faults))
        placed = exchanging([plan.spec for plan in plans])
        self.plans = {s.name: replace(p, spec=s) for s, p in zip(placed, plans, strict=True)}
        self.units: Mapping[str, UnitProcess] = {
            n: UnitProcess(p.spec) for n, p in self.plans.items()
        }
        names = list(dict.fromkeys(model for plan in plans for model in plan.models))
        specs = [ModelSpec(name=m, path=str(DEMO / m), dtype="float32") for m in names]
        self.dispatcher = Dispatcher(specs, self, lambda: self.loop.now_s, routing)
        self.asked: list[Asked] = []
        self.hosts: dict[str, Host] = {}
        self.lives: list[Host] = []
        self.said: list[Output] = []
        self.num_extends = 0  # pieces that a decode unit was told of after the first
        for name in self.plans:
            self.start(name)

    def start(self, name: str) -> None:
        unit = self.units[name]
        unit.begin(self.loop.now_s)
        host = self.hosts[name] = Host(self, self.plans[name], unit.identity.decode())
        self.lives.append(host)
        unit.on_ready(host.ready(), self.loop.now_s)

    def kill(self, name: str, down_s: float = 0.5) -> None:
        unit = self.units[name]
        if not unit.is_ready:
            return
        self.hosts[name].die()
        unit.on_exit(-9, self.loop.now_s)
        self.dispatcher.on_death(unit)
        self.loop.after(down_s, lambda: self.start(name))

    def send(self, name: str, message: ToUnit) -> bool:
        host = self.hosts[name]
        self.num_extends += isinstance(message, Extend)
        if not self.units[name].is_ready:
            return False

        def deliver() -> None:
            if not host.is_alive:
                return
            if isinstance(message, Submit):
                host.unit.add(message.request)
            elif isinstance(message, Extend):
                host.unit.extend(message)
            elif isinstance(message, Abort):
                host.unit.abort(message.request_id)
            host.arm()

        self.loop.at(self.loop.now_s, deliver)
        return True

    def say(self, identity: str, outputs: tuple[Output, ...]) -> None:
        def hear() -> None:
            name = identity.rpartition("#")[0]
            if self.units[name].is_ready and self.units[name].identity.decode() == identity:
                self.said += outputs
                self.dispatcher.on_step(Step(outputs))

        self.loop.at(self.loop.now_s, hear)

    def ask(self, model: str, prompt: list[int], max_tokens: int, **sampling: object) -> Asked:
        asked = Asked(model, prompt, max_tokens)
        self.asked.append(asked)

        def sink(output: Output) -> None:
            asked.tokens += output.tokens
            asked.times_s += [self.loop.now_s] * len(output.tokens)
            if output.finish is not None:
                asked.output = output

        params = msgspec.convert({"temperature": 0.0, **sampling}, SamplingParams)
        tokens = np.array(prompt, dtype="<i4").tobytes()
        draft = Draft(model, tokens, len(prompt), max_tokens, params, self.loop.now_s)
        try:
            asked.request_id = self.dispatcher.submit(draft, sink)
        except Unavailable as error:  # every unit is dead: the client is told
            refusal = Refusal(error.status, error.kind, error.message)
            asked.output = Output(0, finish=FinishReason.ERROR, refusal=refusal)
        return asked

    def at(self, at_s: float, action: Callable[[], object]) -> None:
        self.loop.at(at_s, lambda: (action(), None)[1])

    def run(self) -> "SplitWorld":
        """Until nothing happens any more; nobody waits, and nothing is left behind."""
        while self.loop.step():
            assert self.loop.now_s < 10_000, "it goes on for ever"
        assert all(asked.output is not None for asked in self.asked), "a request is stuck"
        assert self.dispatcher.check() and not len(self.dispatcher.ledger)
        router = self.dispatcher.router
        for name, plan in self.plans.items():
            assert not any(router.is_borrowed(model, name) for model in plan.models), "not home"
        for host in self.hosts.values():
            assert host.unit.check() and host.unit.is_idle
            pool = host.unit.scheduler.memory.pool
            assert (pool.num_used, pool.num_available) == (0, pool.num_blocks)
        return self

    def close(self) -> None:
        for host in self.lives:
            if host.is_alive:
                host.die()

    def __enter__(self) -> "SplitWorld":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def colocated(model: str, prompt: list[int], max_tokens: int, **sampling: object) -> list[int]:
    """The tokens of one unit that does it all."""
    world = RealWorld((model,))
    rid = world.submit(model, prompt, max_tokens, **sampling)
    return world.run().served[rid].tokens


def pick(random: Random, chances: Mapping[str, float]) -> str:
    """One of the keys, by its weight."""
    return random.choices(list(chances), list(chances.values()))[0]
