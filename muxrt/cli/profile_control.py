"""What the brain takes of a decode step: schedule, commit and the message to the API."""

from dataclasses import dataclass
from time import perf_counter

import msgspec

from muxrt.cli.profile_source import Subject
from muxrt.config.placement import Lanes, Memory, Scheduling, UnitModel, UnitSpec
from muxrt.core import Batch, Output, Prompt, Request, Result, SamplingParams, Work
from muxrt.engine.build import build_unit, plan_unit
from muxrt.engine.executor import Done
from muxrt.engine.messages import Step
from muxrt.metrics import percentile

FEW, MANY = 1, 64  # sequences
PROMPT_TOKENS = 16
MOST_STEPS = 300
AMPLE_BYTES = 1 << 50  # to lay an arena out before its size is known


@dataclass(frozen=True, slots=True)
class Control:
    """Host seconds of a step: `step_s` + `sequence_s` x sequences."""

    sequence_s: float
    step_s: float


class _Held:
    """An executor that keeps the one work in flight."""

    def __init__(self) -> None:
        self.flight: tuple[Work, Done] | None = None

    def launch(self, work: Work, done: Done) -> None:
        self.flight = work, done


def measure_control(subject: Subject) -> Control:
    """Time decode steps of the first model that nobody computes, of few and of many sequences."""
    few_s, many_s = (_step_s(subject, number) for number in (FEW, MANY))
    sequence_s = max(0.0, (many_s - few_s) / (MANY - FEW))
    return Control(sequence_s, max(0.0, few_s - FEW * sequence_s))


def _step_s(subject: Subject, num_sequences: int) -> float:
    """The lower quartile of the steps of that many sequences."""
    spec, shape = subject.specs[0], subject.shapes[subject.specs[0].name]
    length = min(PROMPT_TOKENS + MOST_STEPS, spec.max_model_len or shape.max_positions)
    short = msgspec.structs.replace(spec, max_model_len=length)
    unit_spec = UnitSpec(
        name="control",
        models=(UnitModel(name=spec.name),),
        memory=Memory(kv_bytes=AMPLE_BYTES),
        lanes=Lanes(split=(1,), depth=1),
        scheduling=Scheduling(
            quota_period_s=0.0,
            prefill_tokens=PROMPT_TOKENS * num_sequences,
            max_sequences=num_sequences,
        ),
    )
    ample = plan_unit(unit_spec, {spec.name: short}, {spec.name: shape})
    blocks = (num_sequences + 1) * ample.models[spec.name].floor_blocks
    memory = Memory(kv_bytes=blocks * ample.arena.block_bytes)
    sized = msgspec.structs.replace(unit_spec, memory=memory)
    plan = plan_unit(sized, {spec.name: short}, {spec.name: shape})
    held, encoder = _Held(), msgspec.msgpack.Encoder()

    def emit(outputs: tuple[Output, ...]) -> None:
        encoder.encode(Step(outputs))

    unit = build_unit(plan, held, perf_counter, emit)
    prompt = Prompt(bytes(4 * PROMPT_TOKENS), SamplingParams(ignore_eos=True))
    payload = msgspec.msgpack.encode(prompt)
    for number in range(num_sequences):
        output = length - PROMPT_TOKENS
        unit.scheduler.add(Request(number, spec.name, PROMPT_TOKENS, output, payload))
    unit.pump()
    steps = [_turn(held) for _ in range(length - PROMPT_TOKENS - 1)]
    value = percentile(steps[1:], 25)  # the first is the prefill
    assert value is not None, "a model has more positions than that"
    return value


def _turn(held: _Held) -> float:
    """End the work in flight; seconds until the next one is launched."""
    assert held.flight is not None, "every sequence still decodes"
    work, done = held.flight
    assert isinstance(work, Batch)
    tokens = tuple(7 if entry.samples else None for entry in work.entries)
    result = Result(tokens, (False,) * len(tokens), elapsed_s=1e-4 * work.num_tokens)
    begun_s = perf_counter()
    done(work, result)
    return perf_counter() - begun_s
