"""What each policy does with an idle lane; and that every admitted request ends."""

import os
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from worlds import SHAPES, World

from muxrt.config.placement import Slo
from muxrt.core import Batch, Phase
from muxrt.sim.executor import ConstantCost

POLICIES = ["fcfs", "round-robin", "adbs", "slo"]
EXAMPLES = int(os.environ.get("MUXRT_EXAMPLES", "200"))


def phases(world: World) -> list[tuple[str, str]]:
    return [(batch.model, batch.phase.value) for batch in world.batches()]


# -- ADBS -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [2, 3])
def test_adbs_runs_one_prefill_beside_decodes_of_other_models(lanes: int) -> None:
    world = World("abc", lanes=lanes, num_blocks=400)
    for model in "abc" * 4:
        world.submit(model, prompt=60, output=20)
    running: set[tuple[int, Phase]] = set()
    while world.step():
        flights = [flight.work for flight in world.unit.scheduler.flights.values()]
        prefills = [w for w in flights if isinstance(w, Batch) and w.phase is Phase.PREFILL]
        assert len(prefills) <= 1
        running |= {(len(flights), w.phase) for w in flights if isinstance(w, Batch)}
    assert (lanes, Phase.PREFILL) in running  # a prefill and decodes filled all lanes
    world.run()


def test_adbs_prefills_before_it_decodes() -> None:
    # MuxServe's caller unpacks the policy's state in another order: broken every second tick.
    world = World("ab", lanes=1)
    world.submit("a", output=10)
    world.step()
    world.submit("b", output=10)
    world.run()
    order = phases(world)
    assert order.index(("b", "prefill")) <= 2


def test_adbs_takes_models_in_turn_for_prefills_and_decodes() -> None:
    world = World("abc", num_blocks=400, prefill_tokens=20)
    for model in "aaabbbccc":
        world.submit(model, prompt=20, output=8)
    world.run()
    prefills = [model for model, phase in phases(world) if phase == "prefill"]
    assert prefills == list("abc" * 3)


def test_adbs_on_one_lane_lets_streams_go_on_between_prefills() -> None:
    world = World("ab", num_blocks=400, prefill_tokens=32)
    rid = world.submit("a", prompt=8, output=100)
    for _ in range(8):
        world.submit("b", prompt=100, output=1)
    world.run()
    order = phases(world)
    last_prefill = max(i for i, (_, phase) in enumerate(order) if phase == "prefill")
    between = order[order.index(("a", "decode")) : last_prefill]
    assert all(pair != (("b", "prefill"), ("b", "prefill")) for pair in pairwise(between))
    assert world.answers[rid].finish == "stop"


def test_two_streams_of_decodes_do_not_starve_a_prefill() -> None:
    # In MuxServe a prefill at 100 % starts only when nothing runs: two decode streams keep it out.
    world = World("abc", lanes=2, num_blocks=400)
    world.submit("a", output=100)
    world.submit("b", output=100)
    for _ in range(20):
        world.step()
    asked_s = world.loop.now_s
    rid = world.submit("c", prompt=20, output=2)
    world.run()
    assert world.answers[rid].first_token_s - asked_s < 0.05  # type: ignore[operator]


def test_adbs_reserves_for_a_prefill_that_does_not_fit() -> None:
    """While the head of b waits for borrowed blocks, a's decodes do not borrow them away."""
    world = World(
        "ab", num_blocks=72, quotas={"a": 0.5, "b": 0.5}, quota_period_s=1000, max_sequences=4
    )
    held = world.submit("b", prompt=100, output=28)
    for _ in range(3):
        world.submit("a", prompt=30, output=90)
    waiting = world.submit("b", prompt=60, output=4)
    while world.answers[held].finish is None:
        world.step()
    end_s = world.loop.now_s
    while world.answers[waiting].first_token_s is None:
        world.step()
    assert world.answers[waiting].first_token_s - end_s < 0.1  # type: ignore[operator]
    world.run()


# -- the ablations ----------------------------------------------------------------------------


def test_fcfs_serves_the_model_that_came_first_until_it_is_done() -> None:
    world = World("ab", policy="fcfs")
    world.submit("a", output=5)
    world.submit("b", output=5)
    world.run()
    assert [model for model, _ in phases(world)] == ["a"] * 5 + ["b"] * 5


def test_round_robin_alternates() -> None:
    world = World("ab", policy="round-robin")
    world.submit("a", output=5)
    world.submit("b", output=5)
    world.run()
    assert [model for model, _ in phases(world)] == ["a", "b"] * 5


# -- fairness ---------------------------------------------------------------------------------


def ttft_of_b(flood: bool) -> list[float]:
    cost = ConstantCost(batch_s=0.004, token_s=0.00005)
    world = World("ab", num_blocks=400, cost=cost, max_sequences=16, quota_period_s=0.5)
    started: dict[int, float] = {}

    def send(model: str) -> None:
        started[world.submit(model, prompt=40, output=20)] = world.loop.now_s

    for index in range(200):
        world.at(index * 0.15, lambda: send("b"))
        for burst in range(10 if flood else 1):
            world.at(index * 0.15 + 0.07 + burst * 0.004, lambda: send("a"))
    world.run()
    return sorted(
        world.answers[rid].first_token_s - at_s  # type: ignore[operator]
        for rid, at_s in started.items()
        if world.streams[rid].model == "b"
    )


def test_a_flood_of_one_model_delays_the_other_by_a_bounded_time() -> None:
    """At most what is in flight and one round: a prefill of a, a decode of each."""
    calm, flooded = ttft_of_b(flood=False), ttft_of_b(flood=True)
    p99 = int(0.99 * len(calm))
    assert flooded[p99] - calm[p99] < 0.004 * 3 + 0.00005 * (64 + 2 * 16)


# -- progress ---------------------------------------------------------------------------------

WORLDS = st.fixed_dictionaries(
    {
        "models": st.sampled_from(["a", "ab", "abc"]),
        "policy": st.sampled_from(POLICIES),
        "depth": st.sampled_from([1, 2]),
        "lanes": st.sampled_from([1, 2, 3]),
        "planes_per_block": st.sampled_from([1, 8]),
        "swap_blocks": st.sampled_from([0, 20, 500]),
        "preempt": st.sampled_from(["auto", "swap", "recompute"]),
        "prefill_tokens": st.sampled_from([16, 64]),
        "max_sequences": st.sampled_from([1, 3, 8]),
        "quota_period_s": st.sampled_from([0.0, 0.1, 2.0]),
        "borrow": st.booleans(),
        "slo": st.sampled_from([None, Slo(1.0, 0.03), Slo(1.0, 0.1), Slo(0.05, 0.1)]),
    }
).filter(lambda knobs: knobs["policy"] != "slo" or knobs["slo"] is not None)


def smallest_arena(models: str, planes_per_block: int) -> int:
    """Blocks that hold one sequence of maximum length of every model."""
    world = World(models, planes_per_block=planes_per_block, num_blocks=10_000)
    return sum(model.floor_blocks for model in world.plan.models.values())


def assert_walls_hold(world: World) -> None:
    """Nobody has more than its quota, and the quotas are the first ones."""
    accounts = world.pool.accounts
    assert all(account.used <= account.quota for account in accounts.values())
    assert {name: account.quota for name, account in accounts.items()} == world.plan.quotas


class Life(RuleBasedStateMachine):
    """Requests come, stop, leave and are preempted at random; the accounts hold after each."""

    @initialize(kwargs=WORLDS, spare=st.floats(0, 1))
    def build(self, kwargs: dict[str, object], spare: float) -> None:
        self.models = str(kwargs["models"])
        floor = smallest_arena(self.models, int(str(kwargs["planes_per_block"])))
        self.world = World(num_blocks=floor + int(spare * floor), **kwargs)  # type: ignore[arg-type]

    @rule(
        model=st.integers(0, 2),
        prompt=st.integers(1, 100),
        output=st.integers(1, 127),
        unread=st.integers(0, 20),
        family=st.sampled_from([None, 1, 2]),
        shared=st.integers(0, 100),
        deadline_s=st.none() | st.floats(0, 1),
    )
    def add(
        self,
        model: int,
        prompt: int,
        output: int,
        unread: int,
        family: int | None,
        shared: int,
        deadline_s: float | None,
    ) -> None:
        output = min(output, 128 - prompt)
        self.world.submit(
            self.models[model % len(self.models)],
            prompt,
            output,
            max_tokens=min(output + unread, 128 - prompt),
            family=family,
            shared=shared,
            deadline_s=None if deadline_s is None else self.world.loop.now_s + deadline_s,
        )

    @rule(count=st.integers(1, 20))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @rule(number=st.integers(0, 99))
    def abort(self, number: int) -> None:
        if self.world.answers:
            rid = number % len(self.world.answers)
            self.world.unit.abort(rid)
            answer = self.world.answers[rid]
            answer.finish = answer.finish or "abort"

    @rule(number=st.integers(0, 99))
    def preempt(self, number: int) -> None:
        memory = self.world.unit.scheduler.memory
        queues = self.world.unit.scheduler.queues.values()
        running = [s for queue in queues for s in queue.running if s.can_run]
        if running:
            memory.preempt(running[number % len(running)])
            self.world.unit.pump()

    @invariant()
    def accounts_hold(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.check()
        if not self.world.plan.spec.scheduling.borrow:
            assert_walls_hold(self.world)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        answers = self.world.answers.values()
        # Every sequence runs at most its tokens, once more for each time it lost its blocks.
        tokens = sum(len(a.tokens) for a in answers) + 128 * len(answers)
        self.world.run(max_steps=self.world.num_steps + 200 + 40 * tokens)


Life.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase


@settings(max_examples=EXAMPLES // 4, deadline=None)
@given(
    kwargs=WORLDS,
    requests=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 127), st.integers(1, 127)), max_size=12
    ),
)
def test_every_request_ends_in_an_arena_that_holds_one_sequence_per_model(
    kwargs: dict[str, object], requests: list[tuple[int, int, int]]
) -> None:
    models, planes = str(kwargs["models"]), int(str(kwargs["planes_per_block"]))
    world = World(num_blocks=smallest_arena(models, planes), **kwargs)  # type: ignore[arg-type]
    for model, prompt, output in requests:
        world.submit(models[model % len(models)], prompt, min(output, 128 - prompt))
    bound = 200 + 40 * sum(prompt + output for _, prompt, output in requests)
    world.run(max_steps=bound)
    assert all(
        len(a.tokens) == min(r[2], 128 - r[1])
        for a, r in zip(world.answers.values(), requests, strict=True)
        if a.finish == "stop"
    )


def test_worlds_cover_head_dims_in_one_arena() -> None:
    assert {shape.head_dim for shape in SHAPES.values()} == {32, 64}


# -- overload ---------------------------------------------------------------------------------


def test_overload_is_not_spent_on_preempting() -> None:
    """Twice what the lane can do: who starts can also grow, so few are sent away again."""
    cost = ConstantCost(batch_s=0.004, token_s=0.0002)
    world = World("ab", num_blocks=160, swap_blocks=400, max_sequences=16, cost=cost)
    for index in range(200):
        prompt, output = 20 + index * 7 % 40, 20 + index * 11 % 40
        model = "ab"[index * 5 % 3 % 2]
        world.at(index / 40, lambda m=model, p=prompt, o=output: world.submit(m, p, o))  # type: ignore[misc]
    world.run()
    preemptions = sum(m.preemptions_swap for m in world.unit.stats().models)
    assert preemptions < 0.25 * len(world.answers)
