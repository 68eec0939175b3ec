"""Models that sleep and wake in a unit of the brain: requests, blocks, deadlines, nothing lost."""

from random import Random

import pytest
from worlds import SHAPES, World

from muxrt.config.placement import Memory, ModelSpec, UnitModel, UnitSpec
from muxrt.core import Load, Result, Sleep, Work
from muxrt.engine.build import plan_unit
from muxrt.engine.executor import Done
from muxrt.errors import ConfigError
from muxrt.sim.executor import ConstantCost, SimExecutor
from muxrt.sim.loop import EventLoop

MIB = 1 << 20


def sleepy(models: str = "ab", **options: object) -> World:
    """A world whose models may sleep; `a` takes 460 kB, `b` 575 kB."""
    return World(models=models, **options)  # type: ignore[arg-type]


def moves(world: World) -> list[tuple[str, str]]:
    launched = world.memory.launched
    return [(type(w).__name__, w.model) for w in launched if isinstance(w, Load | Sleep)]


def settle(world: World) -> None:
    """Until time alone changes nothing any more."""
    while world.unit.next_timer() is not None or world.loop.has_events:
        assert world.step()


def one_awake(**options: object) -> World:
    """Only one of `a` and `b` fits."""
    return sleepy(weight_bytes=700_000, **options)


def test_a_request_wakes_its_model_and_is_answered() -> None:
    world = one_awake()
    assert world.plan.awake == ("a",)
    rid = world.submit("b", output=5)
    world.run()
    assert len(world.answers[rid].tokens) == 5
    assert moves(world) == [("Sleep", "a"), ("Load", "b")]
    assert world.unit.state_of("a") == "asleep" and world.unit.state_of("b") == "awake"


def test_who_runs_finishes_before_it_sleeps() -> None:
    world = one_awake()
    first = world.submit("a", output=40)
    world.at(0.02, lambda: world.submit("b", output=3))
    world.run()
    assert len(world.answers[first].tokens) == 40
    names = [type(w).__name__ + w.model for w in world.memory.launched]
    assert names.index("Sleepa") > max(i for i, name in enumerate(names) if name == "Batcha")


def test_models_take_turns_and_every_request_is_answered() -> None:
    world, random = one_awake(num_blocks=60), Random(1)
    for number in range(60):
        world.at(number * 0.05, lambda: world.submit(random.choice("ab"), random.randint(1, 60), 9))
    world.run()
    assert all(len(answer.tokens) == 9 for answer in world.answers.values())
    assert len(moves(world)) > 4


def test_minimum_residency_bounds_how_often() -> None:
    world, random = one_awake(min_residency_s=1.0), Random(1)
    for number in range(60):
        world.at(number * 0.05, lambda: world.submit(random.choice("ab"), 20, 9))
    world.run()
    assert 1 <= sum(name == "Load" for name, _ in moves(world)) <= 4


def test_an_idle_model_falls_asleep_and_its_memory_is_blocks() -> None:
    world = sleepy(idle_timeout_s=1.0)
    before = world.pool.num_blocks
    world.submit("a")
    world.run()
    settle(world)
    assert {world.unit.state_of("a"), world.unit.state_of("b")} == {"asleep"}
    freed = sum(habits.num_bytes for habits in (world.plan.habits or {}).values())
    assert world.pool.num_blocks == before + freed // world.plan.arena.block_bytes
    rid = world.submit("b")
    world.run()
    assert world.answers[rid].finish == "stop"


def test_blocks_of_a_sleeping_model_are_called_back_when_it_wakes() -> None:
    """Sequences that borrowed them are preempted and go on afterwards, none is lost."""
    world = sleepy(num_blocks=40, weight_bytes=1_100_000, idle_timeout_s=0.5, max_model_len=64)
    world.submit("a", output=2)
    world.run()
    settle(world)
    assert world.pool.num_blocks > 40
    for _ in range(8):
        world.submit("b", prompt=30, output=30)
    world.at(world.loop.now_s + 0.1, lambda: world.submit("a", output=2))
    world.run()
    assert all(answer.finish == "stop" for answer in world.answers.values())
    stats = {model.model: model for model in world.unit.stats().models}
    assert stats["b"].preemptions_recompute + stats["b"].preemptions_swap > 0


def test_the_arena_never_overlaps_weights() -> None:
    world, random = sleepy(num_blocks=40, weight_bytes=700_000, max_model_len=64), Random(3)
    for number in range(80):
        world.at(
            number * 0.03, lambda: world.submit(random.choice("ab"), random.randint(1, 30), 20)
        )
    while world.loop.has_events or not world.unit.is_idle:
        assert world.step()
        world.check()
    assert all(answer.finish == "stop" for answer in world.answers.values())


def test_who_waits_for_too_long_is_told_to_come_back() -> None:
    world = one_awake(wake_timeout_s=0.5)
    world.submit("a", prompt=20, output=100)
    late = world.submit("b")
    world.run()
    answer = world.answers[late]
    assert (answer.status, answer.finish) == (503, "deadline")
    assert answer.retry_after_s is not None and answer.retry_after_s >= 1.0


def test_a_client_that_leaves_while_its_model_sleeps_is_forgotten() -> None:
    world = one_awake()
    world.submit("a", output=50)
    rid = world.submit("b")
    world.unit.abort(rid)
    world.answers[rid].finish = "abort"
    world.run()
    assert world.unit.stats().models[1].waiting == 0


class NoWeights(SimExecutor):
    """Weights cannot be read."""

    def launch(self, work: Work, done: Done) -> None:
        super().launch(work, lambda w, result: done(w, self._failed(w, result)))

    def _failed(self, work: Work, result: Result) -> Result:
        return Result(error="no such disk") if isinstance(work, Load) else result


def test_a_model_that_cannot_wake_takes_nobody_with_it() -> None:
    def wrap(loop: EventLoop, _: object) -> NoWeights:
        return NoWeights(loop, ConstantCost())

    world = one_awake(wrap=wrap)
    lost, served = world.submit("b"), world.submit("a", output=3)
    world.run()
    assert world.answers[lost].status == 503
    assert world.answers[served].status == 503  # it had to make room, and cannot come back either
    assert world.unit.state_of("b") == "asleep"


def test_orders_are_obeyed_and_pins_kept() -> None:
    world = sleepy(weight_bytes=10 * MIB, pin="a")
    for name in "ab":
        world.unit.set_awake(name, False)
    world.run()
    assert (world.unit.state_of("a"), world.unit.state_of("b")) == ("awake", "asleep")
    world.unit.set_awake("b", True)
    world.run()
    assert world.unit.state_of("b") == "awake"


def test_what_can_never_be_awake_is_refused_with_figures() -> None:
    spec = UnitSpec(
        name="unit",
        models=(UnitModel(name="a"),),
        memory=Memory(kv_bytes=MIB, weight_bytes=1000),
    )
    with pytest.raises(ConfigError, match=r"memory\.weight_bytes of unit unit: found 1000"):
        plan_unit(spec, {"a": ModelSpec(name="a", path="a")}, {"a": SHAPES["a"]})
