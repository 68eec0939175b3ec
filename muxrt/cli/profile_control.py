"""What the endpoint takes beside the kernels: scheduler, messages, HTTP.

Measured on a real `muxrt serve` of the first model under a few streams and under many. Whatever its
processes compute outside their lanes is control; the client is not.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from muxrt.bench.client import replay, session
from muxrt.bench.job import Job, Outcome, Progress, Status, Target
from muxrt.cli.batch_counts import Batches, batches_since, read_batches
from muxrt.cli.endpoint import OwnEndpoint, start_endpoint
from muxrt.cli.profile_source import Subject
from muxrt.config.load import dump
from muxrt.config.placement import Lanes, Memory, Scheduling, UnitModel, UnitSpec
from muxrt.config.serve import Endpoint, ServeConfig
from muxrt.core import Phase
from muxrt.cost.memory import kv_token_bytes
from muxrt.engine.build import DTYPE_BYTES, kv_dtype, weight_bytes
from muxrt.errors import MuxrtError

FEW, MANY = 1, 8  # streams
PROMPT, PROMPT_TOKENS = "Once upon a time", 16  # no tokenizer needs more for it
OUTPUT_TOKENS = 96  # of each stream
ROUNDS = 2
SINGLES = 15  # requests of one token, one after the other
BUSY_TOKENS = 128  # of the prompts that are computed while streams run
BUSY_SINGLES = 8
SINGLE_GAP_S = 0.02  # before each: streams get their turns
DOUBLE_BYTES = 2 << 30  # of weights, at most
DOUBLE = " beside"  # the same weights under another name: what is counted of either is its own
REPORT_S = 5.0  # in which a unit that went idle has said what it computed
POLL_S = 0.1
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Control:
    """Seconds beside the kernels, of a core: `step_s` + `sequence_s` x sequences for each step.

    And `request_s` from a request's arrival to its unit and from its first token to the client.
    `prefill_s` is what a prompt of BUSY_TOKENS takes on one core while streams keep another one at
    work; None where no prompt may be so long, or the weights are too large to be there twice.
    """

    sequence_s: float
    step_s: float
    request_s: float
    prefill_s: float | None


@dataclass(frozen=True, slots=True)
class _Count:
    """What happened under one load."""

    batches: int
    tokens: int
    control_s: float


def measure_control(subject: Subject) -> Control:
    """Serve the first model for some seconds. Raises MuxrtError where it cannot be served."""
    name = subject.specs[0].name
    with tempfile.TemporaryDirectory(prefix="muxrt-profile-") as folder:
        config = _config(subject)
        file = Path(folder) / "serve.yaml"
        file.write_text(dump(config), encoding="utf-8")
        endpoint = start_endpoint(file, config, Path(folder) / "serve.log")
        try:
            endpoint.wait_ready(lambda _: None)
            length = min(OUTPUT_TOKENS, config.models[0].max_model_len or OUTPUT_TOKENS)
            for streams in (FEW, MANY):  # code and buffers that only a first request meets
                _ask(endpoint, name, streams, length - PROMPT_TOKENS)
            few, many = (
                [_count(endpoint, name, streams, length) for _ in range(ROUNDS)]
                for streams in (FEW, MANY)
            )
            request_s = _request_s(endpoint, name)
            has_double = len(config.models) > 1
            prefill_s = _busy_prefill_s(endpoint, name, length) if has_double else None
        finally:
            endpoint.stop()
    return Control(*_prices(_sum(few), _sum(many)), request_s, prefill_s)


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


def _busy_prefill_s(endpoint: OwnEndpoint, model: str, length: int) -> float:
    """What a single prompt takes while the model's double answers MANY streams."""
    before, key = read_batches(endpoint.url), (model, Phase.PREFILL)
    prompt = [1 + number % 64 for number in range(BUSY_TOKENS)]  # ids that every vocabulary has
    singles = [Job(0.0, model, prompt, 1)] * BUSY_SINGLES
    streams = [Job(0.0, model + DOUBLE, PROMPT, length - PROMPT_TOKENS)] * MANY
    asyncio.run(_ask_beside(endpoint, singles, streams))
    return _wait(endpoint, before, key, batches=BUSY_SINGLES)[key].seconds / BUSY_SINGLES


async def _ask_beside(
    endpoint: OwnEndpoint, singles: Sequence[Job], streams: Sequence[Job]
) -> None:
    """Ask `singles` one after the other while all of `streams` are answered, again and again.

    Raises MuxrtError where a single one fails.
    """
    target = Target(endpoint.url)
    routes = {job.model: target for job in (*singles, *streams)}
    async with session(target) as http:
        is_over = asyncio.Event()

        async def stream() -> None:
            while not is_over.is_set():
                await replay(http, routes, streams, Progress(len(streams)))

        beside = asyncio.create_task(stream())
        try:
            for job in singles:
                await asyncio.sleep(SINGLE_GAP_S)
                _check(await replay(http, routes, [job], Progress(1)))
        finally:
            is_over.set()
            await beside  # streams end by themselves


def _sum(counts: list[_Count]) -> _Count:
    return _Count(
        sum(one.batches for one in counts),
        sum(one.tokens for one in counts),
        sum(one.control_s for one in counts),
    )


def _config(subject: Subject) -> ServeConfig:
    """One lane on one core: the rest is for what is measured."""
    spec = subject.specs[0]
    shape = subject.shapes[spec.name]
    wanted = max(PROMPT_TOKENS + OUTPUT_TOKENS, BUSY_TOKENS + 1)
    longest = min(spec.max_model_len or shape.max_positions, wanted)
    token_bytes = kv_token_bytes(shape, 1, DTYPE_BYTES[kv_dtype(spec, shape)])
    changes = {"max_model_len": longest, "slo": None, "queue_timeout_s": None}
    model = msgspec.structs.replace(spec, **changes)
    models = [model]
    if longest > BUSY_TOKENS and weight_bytes(spec, shape) <= DOUBLE_BYTES:
        models.append(msgspec.structs.replace(model, name=spec.name + DOUBLE))
    unit = UnitSpec(
        name="control",
        models=tuple(UnitModel(name=one.name) for one in models),
        # Twice what the streams hold: nobody is to be preempted.
        memory=Memory(kv_bytes=4 * MANY * (longest + PROMPT_TOKENS) * token_bytes),
        lanes=Lanes(split=(1,)),
        scheduling=Scheduling(prefix_reuse=False, max_sequences=MANY),
    )
    endpoint = Endpoint(port=0, drain_s=1.0)
    return ServeConfig(models=tuple(models), units=(unit,), endpoint=endpoint)


def _ask(endpoint: OwnEndpoint, model: str, streams: int, output: int) -> list[Outcome]:
    """Answers of so many tokens, all at once. Raises MuxrtError where one fails."""
    target = Target(endpoint.url)
    jobs = [Job(0.0, model, PROMPT, output) for _ in range(streams)]

    async def ask() -> list[Outcome]:
        async with session(target) as http:
            return await replay(http, {model: target}, jobs, Progress(streams))

    done = asyncio.run(ask())
    _check(done)
    return done


def _check(done: Sequence[Outcome]) -> None:
    for outcome in done:
        if outcome.status is not Status.OK:
            raise MuxrtError(f"{outcome.model} does not answer: {outcome.error}")


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
