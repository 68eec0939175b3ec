"""The simulator that people write first: SimPy, a process per unit, an event per decode step.

Continuous batching with the step times of the real one (`MeshCost.batch_s`), one model per unit.
It leaves out: blocks, quotas, preemption, the limit of sequences, deadlines and admission by SLO;
several models and lanes, interference, works in flight, estimates of latency, and all statistics
but the number of tokens. A request goes to the unit with the fewest.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy
from sim_speed_cases import Case

from muxrt.cost.batch import BatchWork
from muxrt.sim.mesh import MeshCost
from muxrt.workload.arrivals import Arrival


@dataclass(slots=True, eq=False)
class Running:
    """A sequence."""

    context: int
    remaining: int


@dataclass(slots=True)
class UnitLoop:
    """One unit: prefills before decode steps of everybody."""

    env: simpy.Environment
    cost: MeshCost
    model: str
    prefill_tokens: int
    waiting: deque[Arrival] = field(default_factory=deque)
    running: list[Running] = field(default_factory=list)
    is_awake: simpy.Event = field(init=False)
    num_steps: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.is_awake = self.env.event()

    def add(self, arrival: Arrival) -> None:
        """A request arrives."""
        self.waiting.append(arrival)
        if not self.is_awake.triggered:
            self.is_awake.succeed()

    def run(self) -> Generator[simpy.Event, Any, None]:
        """Prefill who waits, then take a decode step, for ever."""
        while True:
            if not self.waiting and not self.running:
                self.is_awake = self.env.event()
                yield self.is_awake
            if self.waiting:
                started, work = self._prefill()
                yield self.env.timeout(self._seconds(work))
                self.running += [one for one in started if one.remaining]
                self.num_tokens += len(started)
            if self.running:
                context = sum([one.context for one in self.running])
                work = BatchWork(decodes=len(self.running), context=context)
                yield self.env.timeout(self._seconds(work))
                self._step()

    def _seconds(self, work: BatchWork) -> float:
        return self.cost.batch_s(self.model, work, share=1.0, is_alone=True)

    def _prefill(self) -> tuple[list[Running], BatchWork]:
        started: list[Running] = []
        tokens = squares = 0
        while self.waiting:
            length = self.waiting[0].prompt_tokens
            if started and tokens + length > self.prefill_tokens:
                break
            arrival = self.waiting.popleft()
            tokens, squares = tokens + length, squares + length * length
            started.append(Running(length + 1, arrival.output_tokens - 1))
        return started, BatchWork(tokens, squares)

    def _step(self) -> None:
        self.num_steps += 1
        self.num_tokens += len(self.running)
        has_ended = False
        for one in self.running:
            one.context += 1
            one.remaining -= 1
            if not one.remaining:
                has_ended = True
        if has_ended:
            self.running = [one for one in self.running if one.remaining]


def arrive(
    env: simpy.Environment, units: Sequence[UnitLoop], arrivals: Sequence[Arrival]
) -> Generator[simpy.Event, Any, None]:
    """Hand every request to a unit when its time has come."""
    for arrival in arrivals:
        yield env.timeout(max(0.0, arrival.at_s - env.now))
        min(units, key=lambda unit: len(unit.waiting) + len(unit.running)).add(arrival)


def run_simpy(case: Case) -> list[UnitLoop]:
    """Serve the requests of a case of one model to their end."""
    env = simpy.Environment()
    (model,) = case.config.models
    units = [
        UnitLoop(
            env,
            MeshCost(spec, case.setting),
            model.name,
            spec.scheduling.prefill_tokens,
        )
        for spec in case.config.units
    ]
    for unit in units:
        env.process(unit.run())
    env.process(arrive(env, units, case.arrivals))
    env.run()
    return units
