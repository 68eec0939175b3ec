"""Memory that is short while quotas move and models wake: nobody waits for ever."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import pytest
from clock_world import Asked
from real_world import demo_plan
from test_one_clock import workload

from muxrt.config.model import load_shape
from muxrt.config.placement import (
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
    Slo,
    UnitModel,
    UnitSpec,
)
from muxrt.core import Batch, Load, Output, Phase, Request, Work
from muxrt.cost.latency import BatchShape, Latency
from muxrt.engine.build import UnitPlan, build_unit, plan_unit
from muxrt.engine.executor import Done
from muxrt.sim.executor import SimExecutor
from muxrt.sim.loop import EventLoop
from muxrt.sim.tokens import SimPrompt

MODEL = Path(__file__).parent.parent / "configs" / "demo_models" / "pydoc-s"
PATIENCE_S = 600.0  # the longest world that is answered takes less than a tenth


class VirtualUnit(SimExecutor):
    """A unit on a virtual clock, whose works take what it is told."""

    def __init__(
        self, plan: UnitPlan, seconds: Callable[[Work], float], latency: Latency | None = None
    ) -> None:
        self.loop = EventLoop()
        super().__init__(self.loop, seconds)
        self.ended: dict[int, Output] = {}
        self.loads_s: list[float] = []  # when weights were asked for
        self._timer_s: float | None = None
        self.unit = build_unit(plan, self, lambda: self.loop.now_s, self._emit, latency)

    def launch(self, work: Work, done: Done) -> None:
        if isinstance(work, Load):
            self.loads_s.append(self.loop.now_s)
        super().launch(work, done)

    def submit(
        self, number: int, model: str, prompt: int, output: int, keys: tuple[bytes, ...] = ()
    ) -> None:
        """A request that arrives now."""
        payload = msgspec.msgpack.encode(SimPrompt(output))
        now_s = self.loop.now_s
        self.unit.add(Request(number, model, prompt, output, payload, keys=keys, arrived_s=now_s))

    def run(self) -> None:
        """Until nothing happens any more, or for too long; everybody is answered then."""
        while self.loop.now_s < PATIENCE_S and self.loop.step():
            next_s = self.unit.next_timer()
            if next_s is not None and (self._timer_s is None or next_s < self._timer_s):
                self._timer_s = next_s
                self.loop.at(next_s, self._wake)
        assert self.unit.is_idle and self.unit.check(), "somebody waits for ever"

    def _wake(self) -> None:
        self._timer_s = None
        next_s = self.unit.next_timer()
        if next_s is not None and next_s <= self.loop.now_s:
            self.unit.tick()

    def _emit(self, outputs: tuple[Output, ...]) -> None:
        for output in outputs:
            if output.finish is not None:
                self.ended[output.request_id] = output


# -- quotas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "round-robin", "adbs"])
@pytest.mark.parametrize(("lanes", "depth", "preempt"), [(1, 1, "recompute"), (2, 2, "auto")])
def test_a_claim_ends_with_the_quota_that_it_was_made_under(
    policy: str, lanes: int, depth: int, preempt: str
) -> None:
    """Two models stood for ever: each within reach of free blocks that were kept for the other.

    Both had been entitled to them when they asked; then quotas moved.
    """
    plan = demo_plan(
        lanes=lanes, depth=depth, num_groups=1.1, swap_groups=0.5, policy=policy,
        prefill_tokens=128, quota_period_s=0.05, max_sequences=16, preempt=preempt,
    )  # fmt: skip
    asked = workload(3, plan)
    for seed in range(3):
        random = Random(seed)
        scale = random.choice([0.2, 1.0, 3.0, 10.0, 50.0])
        world = VirtualUnit(plan, partial(_any_seconds, random, scale))
        for number, one in enumerate(asked):
            tokens = one.max_tokens if one.ignores_eos else random.randint(1, one.max_tokens)
            world.loop.at(one.at_s, partial(_arrive, world, number, one, tokens))
            if one.leaves_s is not None:
                world.loop.at(one.at_s + one.leaves_s, partial(world.unit.abort, number))
        world.run()
        stayed = {number for number, one in enumerate(asked) if one.leaves_s is None}
        assert stayed <= world.ended.keys()


def _any_seconds(random: Random, scale: float, work: Work) -> float:
    """Of any length, now and then much longer."""
    seconds = 0.004 * scale * random.uniform(0.3, 3)
    return seconds + random.choice([0.05, 0.3, 1.0]) * (random.random() < 0.01)


def _arrive(world: VirtualUnit, number: int, one: Asked, tokens: int) -> None:
    world.unit.add(one.request(number, SimPrompt(tokens), world.loop.now_s))


# -- claims that nobody comes for --------------------------------------------------------------

PREFILL_S, STEP_S = 0.3, {"A": 0.043, "B": 0.0005, "C": 0.0005}


class KnownSeconds(Latency):
    """Knows what works will take, from the beginning."""

    def predict(self, model: str, shape: BatchShape) -> float | None:
        return PREFILL_S if shape.num_tokens > 32 else STEP_S[model]


def _known_seconds(work: Work) -> float:
    if isinstance(work, Batch):
        return PREFILL_S if work.phase is Phase.PREFILL else STEP_S[work.model]
    return 0.02


@pytest.mark.parametrize("policy", ["fcfs", "round-robin", "adbs", "slo"])
def test_what_is_kept_for_who_cannot_come_is_given_away(policy: str) -> None:
    """A stood for blocks that were kept for B, which was not let in to spare the steps of A.

    B is entitled to blocks that are A's for now; before they are free, a prefill of C uses up what
    A's steps have to spare.
    """
    slos = {"A": Slo(ttft_s=99.0, tpot_s=0.05), "B": None, "C": None}
    if policy == "slo":
        slos |= dict.fromkeys("BC", Slo(ttft_s=1e6, tpot_s=9.0))
    specs = {
        name: ModelSpec(
            name=name, path=str(MODEL), dtype="float32", max_model_len=256, slo=slos[name]
        )
        for name in "ABC"
    }
    scheduling = Scheduling(policy=policy, preempt="swap", quota_period_s=2.0, prefill_tokens=1024)
    world = VirtualUnit(
        _plan(specs, scheduling, num_groups=72, lanes=1), _known_seconds, KnownSeconds()
    )
    at = world.loop.at
    at(0.0, partial(world.submit, 9, "C", 40, 1))
    for number in range(6):
        at(0.01, partial(world.submit, number, "A", 112, 128))
    at(2.48, partial(world.submit, 10, "B", 217, 20))
    at(2.48, partial(world.submit, 11, "C", 40, 1))
    world.run()
    assert world.ended.keys() == {*range(6), 9, 10, 11}


def _plan(
    specs: dict[str, ModelSpec], scheduling: Scheduling, *, num_groups: int, lanes: int
) -> UnitPlan:
    """A unit with room for so many groups of tokens of one model, and as much to swap to."""
    shapes = dict.fromkeys(specs, load_shape(MODEL))

    def unit(memory: Memory) -> UnitSpec:
        return UnitSpec(
            name="u",
            models=tuple(UnitModel(name=name) for name in specs),
            memory=memory,
            mesh=Mesh(gpus=(0,)),
            lanes=Lanes(split=(1,) * lanes, depth=1),
            scheduling=scheduling,
        )

    ample = plan_unit(unit(Memory(kv_bytes=1 << 34)), specs, shapes)
    layout = next(iter(ample.models.values())).layout
    held = num_groups * layout.blocks_per_group * ample.arena.block_bytes
    return plan_unit(unit(Memory(kv_bytes=held, swap_bytes=held)), specs, shapes)


# -- models that wake --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "round-robin", "adbs", "slo"])
def test_who_makes_room_for_a_waking_model_does_not_come_back_to_it(policy: str) -> None:
    """Preempted sequences shared blocks of a prompt that were to leave, one held by the other.

    They took turns at it for 17 s before the weights could come.
    """
    slo = Slo(ttft_s=100.0, tpot_s=10.0) if policy == "slo" else None
    specs = {
        name: ModelSpec(
            name=name, path=str(MODEL), dtype="float32", max_model_len=512, slo=slo,
            wake_timeout_s=30.0,
        )
        for name in "AB"
    }  # fmt: skip
    plan = _sleepers(specs, policy)
    steps = iter(range(1 << 30))

    def seconds(work: Work) -> float:
        if not isinstance(work, Batch):
            return 0.01
        return (0.05 if work.phase is Phase.PREFILL else 0.02) * (1 + next(steps) % 7 / 10)

    world = VirtualUnit(plan, seconds)
    at = world.loop.at
    at(0.0, partial(world.unit.set_awake, "B", False))
    for number in range(4):
        at(0.1, partial(world.submit, number, "A", 240, 20))
    keys = tuple(b"key %d" % number for number in range(12))  # of a prompt in common
    for number in range(4):
        at(0.2 + 0.15 * number, partial(world.submit, 10 + number, "A", 200, 300, keys))
    at(1.5, partial(world.submit, 99, "B", 10, 2))
    world.run()
    assert world.ended[99].refusal is None
    assert len(world.loads_s) >= 1 and 1.5 <= world.loads_s[-1] < 3.0  # before it was 18.2


def _sleepers(specs: dict[str, ModelSpec], policy: str) -> UnitPlan:
    """Two models of which one can be awake, or both and hardly any blocks more."""
    shapes = dict.fromkeys(specs, load_shape(MODEL))
    scheduling = Scheduling(
        policy=policy, preempt="recompute", quota_period_s=2.0, prefill_tokens=512
    )

    def unit(memory: Memory) -> UnitSpec:
        return UnitSpec(
            name="u",
            models=tuple(UnitModel(name=name) for name in specs),
            memory=memory,
            mesh=Mesh(gpus=(0,)),
            lanes=Lanes(split=(1, 1), depth=1),
            scheduling=scheduling,
        )

    ample = plan_unit(unit(Memory(kv_bytes=1 << 30, weight_bytes=1 << 30)), specs, shapes)
    floor = ample.models["A"].floor_blocks * ample.arena.block_bytes
    weights = 80 * ample.arena.block_bytes
    memory = Memory(kv_bytes=2 * floor, weight_bytes=2 * weights)
    return plan_unit(unit(memory), specs, shapes, dict.fromkeys(specs, weights))
