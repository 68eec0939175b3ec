"""Memory that is short, quotas that move, and steps of any length: everybody gets an answer."""

from functools import partial
from random import Random

import pytest
from clock_world import Asked
from real_world import demo_plan
from test_one_clock import workload

from muxrt.core import Output, Work
from muxrt.engine.build import UnitPlan, build_unit
from muxrt.sim.executor import SimExecutor
from muxrt.sim.loop import EventLoop
from muxrt.sim.tokens import SimPrompt

PATIENCE_S = 600.0  # the longest world that is answered takes less than a tenth


class CrowdedUnit:
    """A unit of three models with room for hardly more than one long sequence of each."""

    def __init__(self, plan: UnitPlan, asked: list[Asked], seed: int) -> None:
        self._random = Random(seed)
        self._scale = self._random.choice([0.2, 1.0, 3.0, 10.0, 50.0])
        self._loop = EventLoop()
        self._timer_s: float | None = None
        executor = SimExecutor(self._loop, self._seconds)
        self.unit = build_unit(plan, executor, lambda: self._loop.now_s, self._emit)
        self.ended: list[int] = []
        for number, one in enumerate(asked):
            self._loop.at(one.at_s, partial(self._add, number, one))
            if one.leaves_s is not None:
                self._loop.at(one.at_s + one.leaves_s, partial(self.unit.abort, number))

    def run(self) -> None:
        """Until nothing happens any more, or for too long."""
        while self._loop.now_s < PATIENCE_S and self._loop.step():
            self._arm()

    def _seconds(self, work: Work) -> float:
        seconds = 0.004 * self._scale * self._random.uniform(0.3, 3)
        return seconds + self._random.choice([0.05, 0.3, 1.0]) * (self._random.random() < 0.01)

    def _add(self, number: int, one: Asked) -> None:
        tokens = one.max_tokens if one.ignores_eos else self._random.randint(1, one.max_tokens)
        self.unit.add(one.request(number, SimPrompt(tokens), self._loop.now_s))

    def _emit(self, outputs: tuple[Output, ...]) -> None:
        self.ended += [output.request_id for output in outputs if output.finish is not None]

    def _arm(self) -> None:
        next_s = self.unit.next_timer()
        if next_s is not None and (self._timer_s is None or next_s < self._timer_s):
            self._timer_s = next_s
            self._loop.at(next_s, self._wake)

    def _wake(self) -> None:
        self._timer_s = None
        next_s = self.unit.next_timer()
        if next_s is not None and next_s <= self._loop.now_s:
            self.unit.tick()


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
        world = CrowdedUnit(plan, asked, seed)
        world.run()
        assert world.unit.is_idle and world.unit.check(), f"seed {seed}: somebody waits for ever"
        stayed = {number for number, one in enumerate(asked) if one.leaves_s is None}
        assert stayed <= set(world.ended)
