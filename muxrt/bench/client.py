"""Endpoints under open-loop load: requests leave on time, whatever became of the others."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec

from muxrt.bench.job import Api, Job, Outcome, Progress, Status, Target
from muxrt.errors import MuxrtError

CONNECT_S = 10.0  # for what is not a generation: listing models, metrics


class EndpointError(MuxrtError):
    """The endpoint cannot be reached, or answers what no OpenAI-compatible server would."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def says_something(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content)))


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Chunk)


def body(target: Target, job: Job) -> dict[str, Any]:
    """The JSON of one request: greedy, streamed, with usage."""
    if target.api is Api.CHAT:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": job.prompt}]}
    else:
        asked = {"prompt": job.prompt}
    if target.ignore_eos:
        asked["ignore_eos"] = True
    return {
        "model": job.model,
        **asked,
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def session(target: Target) -> aiohttp.ClientSession:
    """A session without a limit of connections: an open loop never waits for one."""
    return aiohttp.ClientSession(
        headers=target.headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s, connect=None),
    )


async def list_models(http: aiohttp.ClientSession, target: Target) -> list[str]:
    """The names under /v1/models. Raises EndpointError."""
    url = f"{target.root}/v1/models"
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=CONNECT_S)) as response:
            if response.status != 200:
                raise EndpointError(f"{url} answers {response.status}: {await _message(response)}")
            listed = msgspec.json.decode(await response.read())
            return [str(model["id"]) for model in listed["data"]]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EndpointError(f"{target.root} cannot be reached: {_name(error)}") from None
    except (msgspec.DecodeError, KeyError, TypeError):
        raise EndpointError(f"{url} does not answer like an OpenAI server") from None


async def chat(
    http: aiohttp.ClientSession, target: Target, model: str, question: str, max_tokens: int
) -> str:
    """One greedy answer in full. Raises EndpointError where there is none."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    try:
        url = f"{target.root}/v1/chat/completions"
        async with http.post(url, data=msgspec.json.encode(asked)) as response:
            if response.status != 200:
                raise EndpointError(
                    f"{model} answers {response.status}: {await _message(response)}"
                )
            answer = msgspec.json.decode(await response.read())
            return str(answer["choices"][0]["message"]["content"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EndpointError(f"{model} does not answer: {_name(error)}") from None


async def replay(
    http: aiohttp.ClientSession,
    routes: Mapping[str, Target],
    jobs: Sequence[Job],
    progress: Progress,
) -> list[Outcome]:
    """Send every job when it is due, to its model's target, and wait for all answers.

    Cancelling it (Ctrl-C) stops sending, gives up what is under way, and returns what is done.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    tasks: list[asyncio.Task[Outcome]] = []

    async def send_one(job: Job) -> Outcome:
        outcome = await send(http, routes[job.model], job, start_s + job.at_s)
        progress.on_done(outcome)
        return outcome

    try:
        for job in jobs:
            await asyncio.sleep(max(0.0, start_s + job.at_s - loop.time()))
            tasks.append(asyncio.create_task(send_one(job)))
            progress.on_sent()
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks if task.done() and not task.cancelled()]


async def send(
    http: aiohttp.ClientSession, target: Target, job: Job, due_s: float | None = None
) -> Outcome:
    """One request from first byte to last; `due_s` is on the event loop's clock (None = now)."""
    loop = asyncio.get_running_loop()
    due_s = loop.time() if due_s is None else due_s
    outcome = Outcome(job.model, job.at_s, lag_s=loop.time() - due_s)
    try:
        data = msgspec.json.encode(body(target, job))
        async with http.post(target.route, data=data) as response:
            if response.status == 200:
                await _read_stream(response, outcome, lambda: loop.time() - due_s)
            else:
                refused = response.status == 429
                outcome.status = Status.REFUSED if refused else Status.FAILED
                outcome.error = f"{response.status}: {await _message(response)}"
    except TimeoutError:
        outcome.error = f"no complete answer within {target.timeout_s:g} s"
    except (aiohttp.ClientError, msgspec.DecodeError, ValueError) as error:
        outcome.error = _name(error)
    outcome.e2e_s = loop.time() - due_s
    return outcome


async def _read_stream(
    response: aiohttp.ClientResponse, outcome: Outcome, elapsed_s: Callable[[], float]
) -> None:
    """Follow the server-sent events to `[DONE]` and note when tokens came."""
    num_events = 0
    usage: _Usage | None = None
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        chunk = _DECODER.decode(data)
        if chunk.error is not None:
            outcome.error = f"in the stream: {_error_text(chunk.error)}"
            return
        usage = chunk.usage or usage
        if any(choice.says_something for choice in chunk.choices):
            num_events += 1
            outcome.last_s = elapsed_s()
            outcome.ttft_s = outcome.last_s if outcome.ttft_s is None else outcome.ttft_s
    else:
        outcome.error = "the stream ended without [DONE]"
        return
    outcome.prompt_tokens = usage.prompt_tokens if usage else 0
    outcome.output_tokens = usage.completion_tokens if usage else num_events
    # A stream may be without text (an end of sequence at once): then its end is all there is.
    outcome.ttft_s = elapsed_s() if outcome.ttft_s is None else outcome.ttft_s
    outcome.status = Status.OK


async def _message(response: aiohttp.ClientResponse) -> str:
    """What an error response says, in at most one line."""
    text = (await response.text(errors="replace")).strip()
    with suppress(msgspec.DecodeError, KeyError, TypeError):  # not an OpenAI error: as it is
        text = _error_text(msgspec.json.decode(text.encode())["error"])
    return " ".join(text.split())[:200] or (response.reason or "no reason given")


def _error_text(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


async def chars_per_token(
    http: aiohttp.ClientSession, target: Target, model: str, probe: str
) -> float:
    """How many characters of `probe` a token of `model` holds, by the server's own count.

    Raises EndpointError where the model does not answer.
    """
    outcome = await send(http, target, Job(0.0, model, probe, max_tokens=1))
    if outcome.status is not Status.OK:
        raise EndpointError(f"{model} does not answer a first request: {outcome.error}")
    return len(probe) / outcome.prompt_tokens if outcome.prompt_tokens else 4.0
