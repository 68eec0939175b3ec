"""The simulated endpoint against the real one: the same requests end the same way when units die.

The real one is `server/dispatch.py` itself, with units that run in the simulator instead of
processes: what it hears of them and when is the same.
"""

import struct
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_world import SLO, config, setting, unit

from muxrt.config.placement import Lanes, ModelSpec
from muxrt.config.serve import ServeConfig
from muxrt.core import FinishReason, Output, Prompt, SamplingParams
from muxrt.engine.messages import ModelReady, Ready, Step, Submit, ToUnit
from muxrt.errors import BadRequest, MuxrtError
from muxrt.server.dispatch import Dispatcher, Draft
from muxrt.server.unit_process import UnitProcess
from muxrt.sim.links import Links
from muxrt.sim.loop import ARRIVE, FINISH, EventLoop
from muxrt.sim.setting import Failure, Setting
from muxrt.sim.simulate import simulate
from muxrt.sim.tokens import SimPrompt
from muxrt.sim.unit import SimUnit
from muxrt.workload.arrivals import Arrival


@dataclass
class Seen:
    """What the client of one request saw."""

    unit: str | None = None  # the last one
    output_tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None
    finish: FinishReason | None = None
    refused: int | None = None


class Endpoint:
    """The real dispatcher before simulated units."""

    def __init__(self, placement: ServeConfig, known: Setting, asked: list[Arrival]) -> None:
        self.loop = EventLoop()
        self.links = Links(self.loop)
        self.seen = [Seen() for _ in asked]
        self._homes: dict[int, Seen] = {}
        self._sims = {s.name: SimUnit(s, placement.models, known, self) for s in placement.units}
        self.units = {spec.name: UnitProcess(spec) for spec in placement.units}
        self._dispatcher = Dispatcher(placement.models, self, lambda: self.loop.now_s)
        for name in self.units:
            self._load(name)
        for seen, arrival in zip(self.seen, asked, strict=True):
            self.loop.at(arrival.at_s, partial(self._arrive, seen, arrival), ARRIVE)
        for failure in known.failures:
            self.loop.at(failure.at_s, partial(self._die, failure.unit), FINISH)
            if failure.down_s is not None:
                self.loop.at(failure.ends_s, partial(self._revive, failure.unit), FINISH)
        while any(seen.finish is None for seen in self.seen):
            assert self.loop.step(), "requests wait and nothing is going to happen"
            assert self._dispatcher.check()

    # -- what units need ---------------------------------------------------------------------

    def advance(self, request_id: int, num_tokens: int, last_s: float) -> None:
        raise AssertionError("nothing is folded here")

    def emit(self, outputs: tuple[Output, ...]) -> None:
        self._dispatcher.on_step(Step(outputs))

    def horizon(self) -> float:
        return self.loop.now_s

    # -- what the dispatcher needs -----------------------------------------------------------

    def send(self, name: str, message: ToUnit) -> bool:
        assert isinstance(message, Submit)
        prompt = msgspec.msgpack.decode(message.request.payload, type=Prompt)
        number, output_tokens = struct.unpack("<ii", prompt.tokens)
        self.seen[number].unit = name
        payload = msgspec.msgpack.encode(SimPrompt(output_tokens))
        self._sims[name].add(msgspec.structs.replace(message.request, payload=payload))
        return True

    # -- what happens ------------------------------------------------------------------------

    def _arrive(self, seen: Seen, arrival: Arrival) -> None:
        number = next(n for n, one in enumerate(self.seen) if one is seen)
        try:
            ready = self._dispatcher.admit(arrival.model, 1)
            room = ready.max_model_len - arrival.prompt_tokens
            if room < 1:
                raise BadRequest("the prompt is too long")
            draft = Draft(
                model=arrival.model,
                tokens=struct.pack("<ii", number, arrival.output_tokens),
                num_tokens=arrival.prompt_tokens,
                max_tokens=room,
                sampling=SamplingParams(),
                arrived_s=arrival.at_s,
            )
            self._dispatcher.submit(draft, partial(self._take, seen))
        except MuxrtError as error:
            seen.finish, seen.refused = FinishReason.ERROR, error.status

    def _take(self, seen: Seen, output: Output) -> None:
        if output.tokens:
            seen.first_s = self.loop.now_s if seen.first_s is None else seen.first_s
            seen.last_s = self.loop.now_s
            seen.output_tokens += len(output.tokens)
        seen.finish = output.finish
        seen.refused = output.refusal.status if output.refusal is not None else None

    def _die(self, name: str) -> None:
        self._sims[name].die()
        self.units[name].on_exit(-9, self.loop.now_s)
        self._dispatcher.on_death(self.units[name])

    def _revive(self, name: str) -> None:
        self._sims[name].start()
        self._load(name)

    def _load(self, name: str) -> None:
        plan = self._sims[name].plan
        models = tuple(
            ModelReady(
                name=model,
                block_tokens=one.layout.block_tokens,
                max_model_len=one.max_model_len,
                quota_blocks=plan.quotas[model],
                blocks_per_group=one.layout.blocks_per_group,
                prefix_reuse=False,
            )
            for model, one in plan.models.items()
        )
        ready = Ready(name, 1, models, plan.num_blocks, plan.arena.block_bytes)
        self.units[name].begin(self.loop.now_s)
        self.units[name].on_ready(ready, self.loop.now_s)


failures = st.lists(
    st.tuples(
        st.sampled_from(["u0", "u1", "u2"]),
        st.floats(0.01, 6),
        st.one_of(st.none(), st.floats(0.1, 3)),
    ),
    max_size=4,
    unique_by=lambda failure: failure[0],
)
requests = st.lists(
    st.tuples(st.floats(0, 5), st.sampled_from("ab"), st.integers(1, 2060), st.integers(1, 120)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(requests, failures, st.integers(1, 4))
def test_every_request_ends_as_with_the_real_dispatcher(
    asked: list[tuple[float, str, int, int]],
    dying: list[tuple[str, float, float | None]],
    max_queue: int,
) -> None:
    models = [
        ModelSpec(name=n, preset="llama-7b", slo=SLO, max_queue=max_queue, max_model_len=2048)
        for n in "ab"
    ]
    lanes = Lanes(kind="green", sm_pct=(40, 60))
    placement = config(
        unit("a", "b", name="u0", lanes=lanes),
        unit("a", name="u1", gpus=[1], lanes=lanes),
        unit("b", "a", name="u2", gpus=[2], lanes=lanes),
        models=models,
    )
    known = replace(setting("a", "b"), failures=tuple(Failure(*one) for one in dying), fold=False)
    arrivals = sorted((Arrival(*one) for one in asked), key=lambda arrival: arrival.at_s)
    simulated = simulate(placement, known, arrivals).served
    real = Endpoint(placement, known, arrivals).seen
    found = [
        Seen(s.unit, s.output_tokens, s.first_s, s.last_s, s.finish, s.refused) for s in simulated
    ]
    assert found == real


def test_the_case_has_deaths_that_matter() -> None:
    """Retries, losses and refusals, all in one run."""
    placement = config(unit("a", name="u0"), unit("a", name="u1", gpus=[1]))
    known = replace(setting("a"), failures=(Failure("u0", 0.05), Failure("u1", 1.0, 1.0)))
    asked = [Arrival(0.0, "a", 1700, 300), Arrival(0.0, "a", 2000, 5), Arrival(1.5, "a", 10, 5)]
    asked += [Arrival(2.5, "a", 10, 5)]
    real = Endpoint(placement, replace(known, fold=False), asked).seen
    assert [seen.refused for seen in real] == [503, None, 503, None]
    simulated = simulate(placement, known, asked).served
    assert [one.refused for one in simulated] == [503, None, 503, None]
    assert [one.unit for one in simulated] == [seen.unit for seen in real]
    assert simulated[0].is_retried and simulated[0].first_s == pytest.approx(real[0].first_s)
