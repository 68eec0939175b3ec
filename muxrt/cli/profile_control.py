"""What the endpoint takes beside the kernels: scheduler, messages, HTTP.

Measured on a real `muxrt serve` of the first model under a few streams and under many. Whatever its
processes compute outside their lanes is control; the client is not.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from muxrt.bench.client import replay, session
from muxrt.bench.job import Job, Outcome, Progress, Status, Target
from muxrt.cli.batch_counts import Batches, batches_since, read_batches
from muxrt.cli.endpoint import OwnEndpoint, ready_endpoint
from muxrt.cli.profile_source import Subject
from muxrt.config.placement import Lanes, Memory, Mesh, Scheduling, UnitModel, UnitSpec
from muxrt.config.serve import Endpoint, ServeConfig
from muxrt.core import Phase
from muxrt.cost.memory import kv_token_bytes
from muxrt.engine.build import DTYPE_BYTES, kv_dtype
from muxrt.errors import MuxrtError

FEW, MANY = 1, 8  # streams
PROMPT, PROMPT_TOKENS = "Once upon a time", 16  # no tokenizer needs more for it
OUTPUT_TOKENS = 96  # of each stream
ROUNDS = 2
SINGLES = 15  # requests of one token, one after the other
REPORT_S = 5.0  # in which a unit that went idle has said what it computed
POLL_S = 0.1
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Control:
    """Seconds beside the kernels, of a core: `step_s` + `sequence_s` x sequences for each step.

    And `request_s` from a request's arrival to its unit and from its first token to the client.
    """

    sequence_s: float
    step_s: float
    request_s: float


@dataclass(frozen=True, slots=True)
class _Count:
    """What happened under one load."""

    batches: int
    tokens: int
    control_s: float


def measure_control(subject: Subject, tp: int = 1) -> Control:
    """Serve the first model for some seconds. Raises MuxrtError where it cannot be served."""
    name = subject.specs[0].name
    config = _config(subject, tp)
    with ready_endpoint(config) as endpoint:
        length = min(OUTPUT_TOKENS, config.models[0].max_model_len or OUTPUT_TOKENS)
        for streams in (FEW, MANY):  # code and buffers that only a first request meets
            _ask(endpoint, name, streams, length - PROMPT_TOKENS)
        few, many = (
            [_count(endpoint, name, streams, length) for _ in range(ROUNDS)]
            for streams in (FEW, MANY)
        )
        request_s = _request_s(endpoint, name)
    return Control(*_prices(_sum(few), _sum(many)), request_s)


def _prices(few: _Count, many: _Count) -> tuple[float, float]:
    """Per sequence and per step: what explains both loads; neither is below 0."""
    per_step = [count.control_s / count.batches for count in (few, many)]
    width = [count.tokens / count.batches for count in (few, many)]
    sequence_s = max(0.0, (per_step[1] - per_step[0]) / (width[1] - width[0]))
    return sequence_s, max(0.0, per_step[0] - width[0] * sequence_s)


def _request_s(endpoint: OwnEndpoint, model: str) -> float:
    """What the first token takes, less its prefill: the median of single requests."""
    before, key = read_batches(endpoint.url), (model, Phase.PREFILL)
    waited = [_ask(endpoint, model, 1, 1)[0].ttft_s or 0.0 for _ in range(SINGLES)]
    prefills = _wait(endpoint, before, key, batches=SINGLES)[key]
    return max(0.0, statistics.median(waited) - prefills.seconds / SINGLES)


def _sum(counts: list[_Count]) -> _Count:
    return _Count(
        sum(one.batches for one in counts),
        sum(one.tokens for one in counts),
        sum(one.control_s for one in counts),
    )


def _config(subject: Subject, tp: int) -> ServeConfig:
    """One lane on one core of each rank: the rest is for what is measured."""
    spec = subject.specs[0]
    shape = subject.shapes[spec.name]
    longest = min(spec.max_model_len or shape.max_positions, PROMPT_TOKENS + OUTPUT_TOKENS)
    token_bytes = tp * kv_token_bytes(shape, tp, DTYPE_BYTES[kv_dtype(spec, shape)])
    unit = UnitSpec(
        name="control",
        models=(UnitModel(name=spec.name),),
        # Twice what the streams hold: nobody is to be preempted.
        memory=Memory(kv_bytes=2 * MANY * (longest + PROMPT_TOKENS) * token_bytes),
        mesh=Mesh(gpus=tuple(range(tp))),
        lanes=Lanes(split=(1,)),
        scheduling=Scheduling(prefix_reuse=False, max_sequences=MANY),
    )
    model = msgspec.structs.replace(spec, max_model_len=longest, slo=None, queue_timeout_s=None)
    return ServeConfig(models=(model,), units=(unit,), endpoint=Endpoint(port=0, drain_s=1.0))


def _ask(endpoint: OwnEndpoint, model: str, streams: int, output: int) -> list[Outcome]:
    """Answers of so many tokens, all at once. Raises MuxrtError where one fails."""
    target = Target(endpoint.url)
    jobs = [Job(0.0, model, PROMPT, output) for _ in range(streams)]

    async def ask() -> list[Outcome]:
        async with session(target) as http:
            return await replay(http, {model: target}, jobs, Progress(streams))

    done = asyncio.run(ask())
    for outcome in done:
        if outcome.status is not Status.OK:
            raise MuxrtError(f"{model} does not answer: {outcome.error}")
    return done


def _count(endpoint: OwnEndpoint, model: str, streams: int, length: int) -> _Count:
    output, key = length - PROMPT_TOKENS, (model, Phase.DECODE)
    before, begun_s = read_batches(endpoint.url), _control_s(endpoint.process.pid)
    _ask(endpoint, model, streams, output)
    control_s = _control_s(endpoint.process.pid) - begun_s
    found = _wait(endpoint, before, key, tokens=streams * (output - 1))
    batches = sum(one.batches for one in found.values())
    return _Count(batches, found[key].tokens, control_s)


def _wait(
    endpoint: OwnEndpoint,
    before: Batches,
    key: tuple[str, Phase],
    batches: int = 0,
    tokens: int = 0,
) -> Batches:
    """What was computed since `before`, once that is so much. Raises MuxrtError if it is not."""
    until_s = time.monotonic() + REPORT_S
    while time.monotonic() < until_s:
        found = batches_since(before, read_batches(endpoint.url))
        if key in found and found[key].batches >= batches and found[key].tokens >= tokens:
            return found
        time.sleep(POLL_S)
    raise MuxrtError("/metrics of the endpoint does not count its batches")


def _control_s(api: int) -> float:
    """Seconds that the API process and its units' loops have computed, lanes left out."""
    total = sum(_thread_s(thread) for thread in (PROC / str(api) / "task").iterdir())
    for unit in _children(api):
        for thread in (PROC / str(unit) / "task").iterdir():
            is_lane = int(thread.name) != unit and not _name(thread).startswith("ZMQbg")
            total += 0.0 if is_lane else _thread_s(thread)
    return total


def _children(parent: int) -> Iterator[int]:
    for thread in (PROC / str(parent) / "task").iterdir():
        yield from (int(pid) for pid in (thread / "children").read_text().split())


def _thread_s(thread: Path) -> float:
    """What a thread has run, to the nanosecond."""
    return int((thread / "schedstat").read_text().split()[0]) / 1e9


def _name(thread: Path) -> str:
    return (thread / "comm").read_text().strip()
