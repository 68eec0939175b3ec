"""One workload twice: on real lanes by the real clock, and in the simulator by that clock's notes.

The first run notes what the world told the brain: when requests came and left, when works were
done and how long they took, and every reading of the clock. The second tells the same, at the same
times, to a brain whose works nobody computes. What the two brains launch must be the same.
"""

import math
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

import msgspec
import numpy as np
from real_world import demo_llama

from muxrt.core import Output, Prompt, Request, Result, SamplingParams, Work
from muxrt.engine.build import UnitPlan, build_unit
from muxrt.engine.executor import Done
from muxrt.sim.loop import EventLoop
from muxrt.sim.tokens import SimPrompt, Tokens
from muxrt.worker.build import open_executor
from muxrt.worker.executor import LaneExecutor

CORES = sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Asked:
    """A request on its way; times are seconds after the start."""

    at_s: float
    model: str
    prompt: list[int]
    max_tokens: int
    keys: tuple[bytes, ...] = ()
    patience_s: float | None = None  # for its first token
    leaves_s: float | None = None  # its client, so long after it came
    ignores_eos: bool = False
    hold_s: float = 0.0  # another unit might fetch it for so long

    def request(self, number: int, payload: msgspec.Struct, arrived_s: float) -> Request:
        return Request(
            id=number,
            model=self.model,
            prompt_tokens=len(self.prompt),
            max_tokens=self.max_tokens,
            payload=msgspec.msgpack.encode(payload),
            keys=self.keys,
            arrived_s=arrived_s,
            deadline_s=None if self.patience_s is None else arrived_s + self.patience_s,
            hold_s=self.hold_s,
        )


@dataclass
class Log:
    """What a brain was told, and what it did."""

    readings: list[float] = field(default_factory=list)  # of the clock, in order
    came_s: dict[int, float] = field(default_factory=dict)  # by request
    left_s: dict[int, float] = field(default_factory=dict)
    ticks_s: list[float] = field(default_factory=list)
    done_s: dict[int, float] = field(default_factory=dict)  # by work
    elapsed_s: dict[int, float] = field(default_factory=dict)
    works: list[Work] = field(default_factory=list)  # in order of launch
    tokens: dict[int, int] = field(default_factory=dict)  # by request
    ended: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    preemptions: int = 0
    cached_tokens: int = 0

    def emit(self, outputs: tuple[Output, ...]) -> None:
        for output in outputs:
            before = self.tokens.get(output.request_id, 0)
            self.tokens[output.request_id] = before + len(output.tokens)
            if output.finish is not None:
                self.ended.add(output.request_id)
            self.cached_tokens += output.cached_tokens
            if output.refusal is not None:
                self.refused.add(output.request_id)


class RealRun:
    """The loop of worker/service.py without its socket."""

    def __init__(self, plan: UnitPlan, asked: list[Asked]) -> None:
        self.log = Log()
        self._asked = asked
        self._last_s = 0.0
        models = {name: demo_llama(name) for name in plan.models}
        with open_executor(plan, models, CORES[: len(plan.spec.lanes.split or (1,))]) as lanes:
            self._lanes = lanes
            self._unit = build_unit(plan, self, self._read, self.log.emit)
            self._run(lanes)
        stats = self._unit.stats()
        self.log.preemptions = sum(
            m.preemptions_swap + m.preemptions_recompute for m in stats.models
        )

    def _read(self) -> float:
        now = monotonic()
        self.log.readings.append(now)
        return now

    def _event_s(self) -> float:
        """Now, and later than every event before: in the simulator no two are at the same time."""
        self._last_s = max(monotonic(), math.nextafter(self._last_s, math.inf))
        return self._last_s

    def launch(self, work: Work, done: Done) -> None:
        self.log.works.append(work)

        def noted(work: Work, result: Result) -> None:
            assert result.error is None, result.error
            self.log.done_s[work.id] = self._event_s()
            self.log.elapsed_s[work.id] = result.elapsed_s
            done(work, result)

        self._lanes.launch(work, noted)

    def _run(self, lanes: LaneExecutor) -> None:
        start_s = monotonic()
        coming = deque(sorted((one.at_s, n) for n, one in enumerate(self._asked)))
        leaving = deque(
            sorted((a.at_s + a.leaves_s, n) for n, a in enumerate(self._asked) if a.leaves_s)
        )
        while coming or leaving or not self._unit.is_idle:
            next_s = [start_s + events[0][0] for events in (coming, leaving) if events]
            timer_s = self._unit.next_timer()
            soonest = min([*next_s, *([] if timer_s is None else [timer_s])], default=math.inf)
            lanes.drain(min(1.0, max(0.0, soonest - monotonic())))
            while coming and start_s + coming[0][0] <= monotonic():
                self._add(coming.popleft()[1])
            while leaving and start_s + leaving[0][0] <= monotonic():
                number = leaving.popleft()[1]
                self.log.left_s[number] = self._event_s()
                self._unit.abort(number)
            timer_s = self._unit.next_timer()
            if timer_s is not None and timer_s <= monotonic():
                self.log.ticks_s.append(self._event_s())
                self._unit.tick()

    def _add(self, number: int) -> None:
        one = self._asked[number]
        tokens = np.array(one.prompt, "<i4").tobytes()
        self.log.came_s[number] = self._event_s()
        sampling = SamplingParams(temperature=0.0, ignore_eos=one.ignores_eos)
        prompt = Prompt(tokens, sampling)
        self._unit.add(one.request(number, prompt, self.log.came_s[number]))


class Replay:
    """The simulator, told what `real` was told."""

    def __init__(self, plan: UnitPlan, asked: list[Asked], real: Log) -> None:
        self.log = Log()
        self._real = real
        self._readings = iter(real.readings)
        self._loop = EventLoop()
        self._tokens = Tokens()
        self._unit = build_unit(plan, self, self._read, self.log.emit)
        for number, at_s in real.came_s.items():
            # Whose client left would have gone on, and so would what is held for another unit.
            has_ended = number in real.ended
            said = real.tokens[number] if has_ended else asked[number].max_tokens
            prompt = SimPrompt(said + (asked[number].hold_s > 0))
            request = asked[number].request(number, prompt, at_s)
            self._at(at_s, lambda request=request: self._unit.add(request))  # type: ignore[misc]
        for number, at_s in real.left_s.items():
            self._at(at_s, lambda number=number: self._unit.abort(number))  # type: ignore[misc]
        for at_s in real.ticks_s:
            self._at(at_s, self._unit.tick)
        while self._loop.step():
            pass
        assert self._unit.is_idle and self._unit.check()
        assert next(self._readings, None) is None, "it looked at the clock less often"

    def _at(self, at_s: float, action: Callable[[], None]) -> None:
        self._loop.at(at_s, action)

    def _read(self) -> float:
        return next(self._readings)

    def launch(self, work: Work, done: Done) -> None:
        self.log.works.append(work)
        result = self._tokens.run(work, self._real.elapsed_s[work.id])
        self._loop.at(self._real.done_s[work.id], lambda: done(work, result))
