"""More requests than the lanes can serve: who is served is served in time, and as many as ever."""

from dataclasses import dataclass
from random import Random

import pytest
from worlds import Answer, World

from muxrt.config.placement import Slo
from muxrt.core import Batch, Work
from muxrt.metrics import Timing, is_met, tpot_s
from muxrt.sim.executor import ConstantCost

TARGET = Slo(ttft_s=1.0, tpot_s=0.1)
SHARES = {"a": 6, "b": 3, "c": 1}
SLOWNESS = {"a": 1.0, "b": 1.0, "c": 3.0}
SUSTAINED_RPS = 10.0  # about what one lane of the world below serves within TARGET


class UnevenCost:
    """One model is slower than the others, and no batch takes quite as long as the last one."""

    def __init__(self, num_lanes: int) -> None:
        self._scale = 1.0 if num_lanes == 1 else 1.8  # lanes share the cores
        self._random = Random(3)

    def __call__(self, work: Work) -> float:
        noise = self._random.lognormvariate(0, 0.15)
        num_tokens = work.num_tokens if isinstance(work, Batch) else 1
        return self._scale * noise * SLOWNESS[work.model] * (0.007 + 0.001 * num_tokens)


@dataclass
class Outcome:
    """What one run under load gave."""

    served: int
    good: int  # of the served: met both targets
    slow: int  # of the served: missed the TPOT target
    refused: int


def overload(times: float, lanes: int, deadline: bool = True, duration_s: float = 20.0) -> Outcome:
    """Poisson requests for three models at `times` the sustained rate."""
    world = World(
        "abc",
        lanes=lanes,
        num_blocks=3_000,
        planes_per_block=8,
        max_sequences=128,
        prefill_tokens=256,
        cost=UnevenCost(lanes),
        slo=TARGET,
    )
    random, at_s = Random(7), 0.0
    arrived: dict[int, float] = {}

    def arrive() -> None:
        model = random.choices(list(SHARES), list(SHARES.values()))[0]
        prompt, output = (min(60, round(30 * random.lognormvariate(-0.1, 0.5))) for _ in "po")
        deadline_s = world.loop.now_s + TARGET.ttft_s if deadline else None
        rid = world.submit(model, prompt + 1, output + 2, deadline_s=deadline_s)
        arrived[rid] = world.loop.now_s

    while (at_s := at_s + random.expovariate(times * SUSTAINED_RPS)) < duration_s:
        world.at(at_s, arrive)
    world.run(max_steps=1_000_000)
    served = [rid for rid in arrived if world.answers[rid].finish == "stop"]
    timings = [timing_of(world.answers[rid], arrived[rid]) for rid in served]
    good = sum(is_met(timing, TARGET) for timing in timings)
    slow = sum(timing.tpot_s is not None and timing.tpot_s > TARGET.tpot_s for timing in timings)
    return Outcome(len(served), good, slow, len(arrived) - len(served))


def timing_of(answer: Answer, arrived_s: float) -> Timing:
    assert answer.first_token_s is not None and answer.finished_s is not None
    tpot = tpot_s(answer.first_token_s, answer.finished_s, len(answer.tokens))
    return Timing(answer.first_token_s - arrived_s, tpot)


@pytest.mark.parametrize("lanes", [1, 2])
def test_goodput_holds_at_five_times_what_can_be_sustained(lanes: int) -> None:
    runs = {times: overload(times, lanes) for times in (0.5, 1.0, 3.0, 5.0)}
    peak = max(run.good for run in runs.values())
    assert runs[0.5].refused == 0
    assert runs[3.0].good >= 0.85 * peak
    assert runs[5.0].good >= 0.85 * peak
    for run in runs.values():
        assert run.good >= 0.95 * run.served


def test_without_a_deadline_nobody_is_refused_and_tpot_still_holds() -> None:
    run = overload(2.0, lanes=1, deadline=False)
    assert run.refused == 0
    assert run.slow <= 0.05 * run.served


def test_a_unit_that_became_faster_finds_out() -> None:
    # It would refuse every request, and so never see how long one takes now.
    seconds = [1.0]
    world = World("a", cost=lambda work: seconds[0])
    for _ in range(3):
        world.submit("a", output=5)
        world.run()
    seconds[0] = 0.01
    late, busy = world.submit("a", output=50, deadline_s=world.loop.now_s + 0.5), 0
    while world.answers[late].first_token_s is None:
        busy = world.submit("a", deadline_s=world.loop.now_s + 0.5)
        assert world.step()
    world.run()
    assert (world.answers[late].status, world.answers[busy].status) == (200, 429)


def test_who_keeps_its_turn_does_not_hold_up_prompts_under_way() -> None:
    # Found by fuzzing: a prompt in chunks waited for a model that waited for it to end.
    world = World("abc", prefill_tokens=16, slo=Slo(1.0, 0.03))
    for _ in range(20):
        for model in "abc":
            world.submit(model, prompt=60, output=10)
    world.run()


def test_a_refusal_says_to_come_back_after_as_long_as_it_waited() -> None:
    world = World("a", max_sequences=1, cost=ConstantCost(batch_s=0.1))
    world.submit("a", output=60)
    at_once, patient = world.submit("a", deadline_s=0.2), world.submit("a", deadline_s=3.0)
    world.run()
    assert world.answers[at_once].retry_after_s == 1.0
    assert world.answers[patient].retry_after_s == pytest.approx(3.0, abs=0.2)
