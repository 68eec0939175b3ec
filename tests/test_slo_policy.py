"""The policy `slo`: who goes first, who steps behind, and that nobody is forgotten."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_world import burst, config, setting, unit
from test_overload import TARGET, timing_of
from worlds import World

from muxrt.config.placement import Scheduling, Slo, UnitModel
from muxrt.core import Phase
from muxrt.errors import ConfigError
from muxrt.metrics import is_met
from muxrt.sched.policies import POLICIES
from muxrt.sched.policies.slo import LATE_TURN, PATIENCE
from muxrt.sim.executor import ConstantCost
from muxrt.sim.simulate import simulate

COST = ConstantCost(batch_s=0.01, token_s=0.001)
LAX = Slo(ttft_s=100.0, tpot_s=1.0)


def world(models: str = "ab", slo: Slo = TARGET, **knobs: object) -> World:
    """A unit that knows how long its batches take."""
    knobs = {"num_blocks": 2_000, "planes_per_block": 8, "cost": COST, **knobs}
    made = World(models, policy="slo", slo=slo, **knobs)  # type: ignore[arg-type]
    for model in models:
        for _ in range(4):
            made.submit(model, prompt=20, output=5)
    made.run()
    return made


def starts(run: World, since: int) -> list[int]:
    """Requests from `since` on, in the order of their first tokens."""
    found = [(a.first_token_s, rid) for rid, a in run.answers.items() if rid >= since]
    return [rid for _, rid in sorted(found)]  # type: ignore[type-var]


# -- order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_the_prompt_that_is_due_first_starts_first_whatever_its_model(depth: int) -> None:
    run = world("abc", slo=Slo(5.0, 0.2), prefill_tokens=64, depth=depth)
    first, at_s = len(run.answers), run.loop.now_s
    for number, model in enumerate("cabbacacb"):
        run.at(at_s + 0.0001 * number, lambda m=model: run.submit(m, prompt=60, output=1))  # type: ignore[misc]
    run.run()
    assert starts(run, first) == sorted(starts(run, first))


def overloaded(policy: str, lanes: int, depth: int) -> tuple[int, int, float]:
    """Requests in time, requests, and when the last one ended; at 2.5 times what is possible."""
    run = World("ab", policy=policy, lanes=lanes, depth=depth, num_blocks=3_000,
                planes_per_block=8, max_sequences=64, cost=COST, slo=TARGET)  # fmt: skip
    random, at_s, arrived = Random(5), 0.0, dict[int, float]()

    def arrive(model: str, prompt: int, output: int) -> None:
        arrived[run.submit(model, prompt, output)] = run.loop.now_s

    while (at_s := at_s + random.expovariate(40 * lanes)) < 15:
        asked = (random.choice("ab"), random.randint(5, 60), random.randint(2, 60))
        run.at(at_s, lambda asked=asked: arrive(*asked))  # type: ignore[misc]
    run.run(max_steps=1_000_000)
    good = sum(is_met(timing_of(run.answers[rid], at), TARGET) for rid, at in arrived.items())
    return good, len(arrived), run.loop.now_s


@pytest.mark.parametrize(("lanes", "depth"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_in_overload_most_of_what_is_possible_is_in_time(lanes: int, depth: int) -> None:
    ours, asked, end_s = overloaded("slo", lanes, depth)
    theirs, _, their_end_s = overloaded("adbs", lanes, depth)
    assert ours > 4 * theirs
    assert theirs < 0.1 * asked
    assert end_s < 1.03 * their_end_s  # all are served, and as quickly


def test_a_decode_step_goes_to_the_model_whose_token_is_due_first() -> None:
    """Both run all the time on one lane: the tighter target gets more steps."""
    models = {
        name: World("ab", slo=slo).plan.models[name]
        for name, slo in (("a", Slo(1.0, 0.1)), ("b", Slo(1.0, 0.4)))
    }
    run = world("ab")
    for queue in run.unit.scheduler.queues.values():
        queue.model = models[queue.name]
    run.unit.scheduler.policy = POLICIES["slo"](2.0, models)
    for model in "ab":
        run.submit(model, prompt=10, output=100)
    for _ in range(100):
        run.step()
    steps = [b.model for b in run.batches()[-80:] if b.phase is Phase.DECODE]
    assert 3 * steps.count("b") < steps.count("a") < 5 * steps.count("b")
    run.run()


# -- nobody starves ---------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_a_late_request_starts_after_a_bounded_number_of_prefills(depth: int) -> None:
    """Prompts that can be in time keep coming as fast as they are served."""
    run = world("ab", slo=Slo(0.5, 0.5), prefill_tokens=64, max_sequences=64, depth=depth)
    late = [run.submit("a", prompt=60, output=1) for _ in range(40)]
    begun_s, since = run.loop.now_s, len(run.batches())
    for number in range(600):
        run.at(begun_s + 0.05 * number, lambda: run.submit("b", prompt=60, output=1))
    run.run(max_steps=100_000)
    order = [run.streams[rid].model for rid in starts(run, late[0])]
    waited = [rid for rid in late if run.answers[rid].first_token_s > begun_s + 0.5]  # type: ignore[operator]
    assert len(waited) > 10, "nobody was late"
    assert len(run.batches()) - since >= 600
    places = [place for place, model in enumerate(order) if model == "a"]
    for number, place in enumerate(places[-len(waited) :]):
        assert place <= len(late) - len(waited) + (number + 1) * (LATE_TURN + 2)


def test_the_oldest_late_request_is_first_whatever_its_model() -> None:
    run = world("ab", slo=Slo(0.2, 0.5), prefill_tokens=64, max_sequences=4)
    first = len(run.answers)
    for model in "ababab" * 3:
        run.submit(model, prompt=60, output=1)
    run.run()
    late = [r for r in starts(run, first) if run.answers[r].first_token_s > 5]  # type: ignore[operator]
    assert late == sorted(late)


def test_a_model_that_is_hopelessly_slow_still_gets_its_steps() -> None:
    """Its pace cannot be kept, so it binds nobody; prompts of the other would go on for ever."""
    run = world("ab", slo=Slo(50.0, 0.012), prefill_tokens=64, max_sequences=200)
    rid = run.submit("a", prompt=10, output=100)
    for _ in range(400):
        run.submit("b", prompt=60, output=2)
    since = len(run.batches())
    while run.answers[rid].finish is None:
        assert run.step()
    works = run.batches()[since:]
    steps = [n for n, b in enumerate(works) if b.model == "a" and b.phase is Phase.DECODE]
    assert all(after - before <= PATIENCE + 3 for before, after in pairwise(steps))
    run.run()


@settings(max_examples=30, deadline=None)
@given(
    lanes=st.sampled_from([1, 2, 3]),
    depth=st.sampled_from([1, 2]),
    slo=st.sampled_from([Slo(0.01, 0.001), Slo(0.1, 0.02), Slo(0.3, 0.1)]),
    blocks=st.integers(150, 300),
    seed=st.integers(0, 10**6),
)
def test_every_request_of_a_flood_ends(
    lanes: int, depth: int, slo: Slo, blocks: int, seed: int
) -> None:
    run = World("abc", policy="slo", lanes=lanes, depth=depth, slo=slo, num_blocks=blocks,
                max_sequences=4, prefill_tokens=32, quota_period_s=0.1)  # fmt: skip
    random, tokens = Random(seed), 0
    for number in range(60):
        model, prompt, output = random.choice("abc"), random.randint(1, 90), random.randint(1, 30)
        tokens += prompt + output
        run.at(0.005 * number, lambda m=model, p=prompt, o=output: run.submit(m, p, o))  # type: ignore[misc]
    run.run(max_steps=200 + 40 * tokens)
    assert all(answer.finish == "stop" for answer in run.answers.values())


# -- fairness ---------------------------------------------------------------------------------


def test_a_flood_of_one_model_makes_the_other_no_later_than_its_target() -> None:
    """a asks for three times what the lane can do; b's requests stay in time."""
    run = world("ab", slo=Slo(0.5, 0.2), max_sequences=16)
    arrived: dict[int, float] = {}
    begun_s = run.loop.now_s
    for number in range(100):

        def ask() -> None:
            arrived[run.submit("b", prompt=20, output=5)] = run.loop.now_s

        run.at(begun_s + 0.3 * number, ask)
    for number in range(3_000):
        run.at(begun_s + 0.01 * number, lambda: run.submit("a", prompt=40, output=5))
    run.run(max_steps=1_000_000)
    timings = [timing_of(run.answers[rid], at_s) for rid, at_s in arrived.items()]
    assert sum(is_met(timing, Slo(0.5, 0.2)) for timing in timings) >= 90


# -- what it needs ----------------------------------------------------------------------------


def test_it_refuses_a_model_without_targets() -> None:
    with pytest.raises(ConfigError, match="policy slo needs targets: found none for a, expected"):
        World("a", policy="slo")


def test_late_requests_count_as_waiting() -> None:
    run = world("a", slo=Slo(0.05, 0.5), max_sequences=1)
    for _ in range(6):
        run.submit("a", prompt=60, output=30)
    while not run.unit.scheduler.queues["a"].late:
        assert run.step()
    queue = run.unit.scheduler.queues["a"]
    (stats,) = run.unit.stats().models
    assert stats.waiting == len(queue.waiting) + len(queue.late) > 0
    assert not queue.is_empty and not queue.is_waitless
    late = queue.late[0]
    assert run.unit.scheduler.abort(late.request.id)
    assert late not in queue.late
    run.answers[late.request.id].finish = "abort"
    run.run()


def test_a_run_of_decodes_is_folded() -> None:
    scheduling = Scheduling(policy="slo", prefill_tokens=2048)
    placed = config(unit(parts=[UnitModel(name="a"), UnitModel(name="b")], scheduling=scheduling))
    asked = burst("a", 4, output=800) + burst("b", 4, output=800)
    run = simulate(placed, setting("a", "b"), asked)
    assert run.units[0].num_batches > 1500
