"""The policy `slo`: who goes first, who steps behind, and that nobody is forgotten."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_world import burst, config, setting, unit
from test_overload import TARGET, timing_of
from worlds import World

from muxrt.config.placement import Lanes, Scheduling, Slo
from muxrt.core import Phase
from muxrt.errors import ConfigError
from muxrt.metrics import is_met
from muxrt.sched.policies import POLICIES
from muxrt.sched.policies.slo import LATE_TURN, PATIENCE
from muxrt.sim.executor import ConstantCost, Job, MeshExecutor
from muxrt.sim.simulate import simulate

COST = ConstantCost(batch_s=0.01, token_s=0.001)


def world(models: str = "ab", slo: Slo = TARGET, **knobs: object) -> World:
    """A unit that knows how long its batches take."""
    knobs = {"num_blocks": 2_000, "planes_per_block": 8, "cost": COST, **knobs}
    made = World(models, policy="slo", slo=slo, **knobs)  # type: ignore[arg-type]
    for model in models:
        for _ in range(4):
            made.submit(model, prompt=20, output=12)
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


@pytest.mark.parametrize("others", [0, 150])
def test_the_oldest_late_request_is_first_whatever_its_model(others: int) -> None:
    """When nobody else waits, and between prompts of others that can be in time."""
    run = world("abc", slo=Slo(0.6, 0.5), prefill_tokens=64, max_sequences=4)
    first, begun_s = len(run.answers), run.loop.now_s
    for model in "ababbaaabb" * 4:
        run.submit(model, prompt=60, output=1)
    for number in range(others):
        run.at(begun_s + 0.06 * number, lambda: run.submit("c", prompt=60, output=1))
    run.run()
    tokens_s = {rid: run.answers[rid].first_token_s for rid in range(first, first + 40)}
    late = [rid for rid in starts(run, first) if tokens_s.get(rid, 0) > begun_s + 0.7]  # type: ignore[operator]
    assert len(late) > 8
    assert late == sorted(late)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_long_prompt_that_has_begun_goes_on_though_its_model_is_flooded(depth: int) -> None:
    run = world("ab", slo=Slo(0.4, 0.5), prefill_tokens=16, max_sequences=3, depth=depth)
    since, begun_s = len(run.batches()), run.loop.now_s
    for _ in range(30):
        run.submit("a", prompt=96, output=1)
    for number in range(300):
        run.at(begun_s + 0.03 * number, lambda: run.submit("b", prompt=15, output=1))
    run.run()
    works = run.batches()[since:]
    chunks = [(n, entry) for n, b in enumerate(works) for entry in b.entries if b.model == "a"]
    gaps = [n - m for (m, _), (n, entry) in pairwise(chunks) if entry.start]
    assert max(gaps) <= 3


def test_who_may_not_start_yet_keeps_its_turn() -> None:
    """A stream leaves time for many small prompts or one large one; the large one is due first."""
    run = world("abc", slo=Slo(30.0, 0.03), prefill_tokens=64, max_sequences=64)
    stream = run.submit("a", prompt=10, output=110)
    while run.answers[stream].first_token_s is None:
        run.step()
    large = run.submit("b", prompt=64, output=1)
    small = [run.submit("c", prompt=12, output=1) for _ in range(20)]
    run.run()
    tokens_s = [run.answers[rid].first_token_s for rid in (large, *small)]
    assert tokens_s[0] == min(tokens_s)  # type: ignore[type-var]


def test_a_model_that_is_hopelessly_slow_still_gets_its_steps() -> None:
    """Its pace cannot be kept, so it binds nobody; prompts of the other would go on for ever."""
    run = world("ab", slo=Slo(50.0, 0.012), prefill_tokens=64, max_sequences=200)
    since = len(run.batches())
    rid = run.submit("a", prompt=10, output=100)
    for _ in range(400):
        run.submit("b", prompt=60, output=2)
    while run.answers[rid].finish is None:
        assert run.step()
    places = [place for place, b in enumerate(run.batches()[since:]) if b.model == "a"]
    assert len(places) == 100
    assert all(after - before <= PATIENCE + 3 for before, after in pairwise(places))
    run.run()


def test_nobody_waits_for_a_stream_that_is_hopelessly_behind() -> None:
    run = world("ab", slo=Slo(5.0, 0.05))
    run.submit("a", prompt=10, output=100)
    for _ in range(10):
        run.step()
    (behind,) = run.unit.scheduler.queues["a"].running
    behind.first_token_s -= 1.0  # as if everything had stood still for a second
    run.submit("b", prompt=10, output=20)
    since = len(run.batches())
    for _ in range(12):
        run.step()
    steps = [b.model for b in run.batches()[since:] if b.phase is Phase.DECODE]
    assert 4 <= steps.count("b") <= 8
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


def test_runs_of_decodes_of_one_model_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, land = [], MeshExecutor.land

    def counted(self: MeshExecutor, job: Job, elapsed_s: float) -> None:
        seen.append(job)
        land(self, job, elapsed_s)

    monkeypatch.setattr(MeshExecutor, "land", counted)
    placed = unit(
        "a", "b", scheduling=Scheduling(policy="slo", prefill_tokens=2048),
        lanes=Lanes(kind="green", sm_pct=(40, 60)),
    )  # fmt: skip
    asked = burst("a", 4, output=800) + burst("b", 4, at_s=60.0, output=800)
    run = simulate(config(placed), setting("a", "b"), asked)
    assert run.units[0].num_batches > 1500
    assert len(seen) < 100


@pytest.mark.parametrize("seed", range(40))
def test_blocks_that_are_kept_for_who_stepped_behind_stop_nobody(seed: int) -> None:
    """A claim of a model whose requests had become late kept the others' from going on, for ever.

    The worlds are tight: two models, hardly more blocks than one long sequence of each.
    """
    random = Random(seed)
    floor = sum(m.floor_blocks for m in World("ab", planes_per_block=8).plan.models.values())
    world = World(
        "ab",
        policy="slo",
        slo=Slo(ttft_s=random.choice([0.05, 1.0]), tpot_s=0.03),
        planes_per_block=8,
        num_blocks=floor + random.randint(0, floor // 3),
        depth=2,
        lanes=random.choice([1, 2]),
        swap_blocks=random.choice([0, 500]),
        prefill_tokens=16,
        preempt="swap",
    )
    tokens = 0
    for _ in range(random.randint(5, 25)):
        prompt = random.randint(1, 100)
        output = random.randint(1, 128 - prompt)
        tokens += prompt + output
        world.submit(random.choice("ab"), prompt, output)
        for _ in range(random.randint(0, 15)):
            world.step()
        assert world.check()
    world.run(max_steps=world.num_steps + 200 + 40 * tokens)
