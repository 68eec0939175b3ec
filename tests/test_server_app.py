"""The endpoint over HTTP, its unit played by the test: answers, streams, refusals, departures."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from scripted_unit import (
    BLOCK_TOKENS,
    MAX_LEN,
    WAIT_S,
    Stage,
    make_config,
    on_loop,
    prompt_of,
    serving,
    write_words,
)
from tiny_folder import byte_level

from muxrt.config.serve import ApiKeys, Endpoint, ServeConfig
from muxrt.core import FinishReason, Output, Phase, Refusal, TokenLogprobs
from muxrt.engine.messages import BatchStats, ModelStats, Stats, Step
from muxrt.server.event_stream import EventStream
from muxrt.server.served_model import ServedModel

CORE = byte_level()
EOS = CORE.token_to_id("<|eos|>")
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def tokens_of(text: str) -> list[int]:
    return CORE.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"))


class Client:
    """Asks the endpoint as curl would."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http

    def post(self, path: str = "/v1/completions", **fields: Any) -> Any:
        return self.http.post(path, json={"model": "tiny", "prompt": "hi", **fields})

    def ask(self, path: str = "/v1/completions", **fields: Any) -> asyncio.Task[Any]:
        """Send now; the task gives status, headers and body."""

        async def go() -> Any:
            async with self.post(path, **fields) as response:
                return response.status, response.headers, await response.json()

        return asyncio.create_task(go())


@asynccontextmanager
async def stage(config: ServeConfig, **options: Any) -> AsyncIterator[tuple[Stage, Client]]:
    async with (
        serving(config, **options) as played,
        aiohttp.ClientSession(played.server.url) as http,
    ):
        yield played, Client(http)


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    async for line in response.content:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield data.decode() if data == b"[DONE]" else json.loads(data)


# -- answers ---------------------------------------------------------------------------------


@on_loop
async def test_a_completion(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask(prompt="the quick", max_tokens=9)
        request = await played.unit.request()
        assert (request.model, request.max_tokens) == ("tiny", 9)
        assert prompt_of(request).token_ids().tolist() == CORE.encode("the quick").ids
        await played.unit.step(request, tokens_of(" brown"), cached_tokens=2)
        await played.unit.step(request, [*tokens_of(" fox"), EOS], STOP)
        status, _, answer = await asked
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["choices"] == [
        {"index": 0, "text": " brown fox", "logprobs": None, "finish_reason": "stop"}
    ]
    given, prompt = len(tokens_of(" brown")) + len(tokens_of(" fox")) + 1, request.prompt_tokens
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": given,
        "total_tokens": prompt + given,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@on_loop
async def test_a_chat_goes_through_the_template(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.http.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
        )
        task = asyncio.ensure_future(asked)
        request = await played.unit.request()
        ids = prompt_of(request).token_ids().tolist()
        assert CORE.decode(ids, skip_special_tokens=False) == (
            "<|bos|><|user|>user: hi\n<|user|>assistant: "
        )
        assert request.max_tokens == MAX_LEN - len(ids)
        await played.unit.step(request, tokens_of("ho"), LENGTH)
        answer = await (await task).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "ho"}
    assert answer["choices"][0]["finish_reason"] == "length"


@on_loop
async def test_keys_cover_full_groups_but_the_last_token(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        counts = []
        for length in (BLOCK_TOKENS, BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS):
            asked = client.ask(prompt=list(range(3, 3 + length)))
            request = await played.unit.request()
            counts.append(len(request.keys))
            await played.unit.step(request, [5], LENGTH)
            await asked
        assert counts == [0, 1, 2]


@on_loop
async def test_a_scored_prompt_is_not_taken_from_the_cache(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        prompt = list(range(3, 12))
        asked = client.ask(prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        request = await played.unit.request()
        assert request.keys == () and prompt_of(request).sampling.prompt_logprobs == 1
        scores = [TokenLogprobs(token, -float(token), (7,), (-0.5,)) for token in prompt[1:]]
        half = Output(request.id, prompt_logprobs=tuple(scores[:4]))
        rest = Output(request.id, finish=LENGTH, prompt_logprobs=tuple(scores[4:]))
        await played.unit.say(Step((half,)))
        await played.unit.say(Step((rest,)))
        _, _, answer = await asked
    logprobs = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == CORE.decode(prompt)
    assert logprobs["token_logprobs"] == [None, *(-float(token) for token in prompt[1:])]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"][1]) == 2
    assert answer["usage"]["completion_tokens"] == 0


@on_loop
async def test_logprobs_are_json_even_of_the_impossible(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask(logprobs=0)
        request = await played.unit.request()
        token = tokens_of("fox")[0]
        scored = (TokenLogprobs(token, float("-inf")),)
        await played.unit.step(request, [token], LENGTH, logprobs=scored)
        _, _, answer = await asked
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


@on_loop
async def test_a_batch_of_prompts_keeps_its_order(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask(prompt=[[11], [12, 13]], n=2)
        leaders = [await played.unit.request(), await played.unit.request()]
        assert [leader.prompt_tokens for leader in leaders] == [1, 2]
        for leader in reversed(leaders):
            await played.unit.step(leader, tokens_of("a"))
        followers = [await played.unit.request(), await played.unit.request()]
        assert [follower.prompt_tokens for follower in followers] == [2, 1]
        for request, text in zip((*leaders, *followers), "WXZY", strict=True):
            await played.unit.step(request, tokens_of(text), LENGTH)
        _, _, answer = await asked
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["aW", "Y", "aX", "Z"]
    assert answer["usage"]["prompt_tokens"] == 3


@on_loop
async def test_choices_start_with_the_first_ones_first_token(folder: Path) -> None:
    async with stage(make_config(folder, queue_timeout_s=9.0)) as (played, client):
        asked = client.ask(n=3, seed=40)
        leader = await played.unit.request()
        assert played.unit.requests.empty()
        await played.unit.step(leader, tokens_of("a"), LENGTH)
        followers = [await played.unit.request(), await played.unit.request()]
        for follower in followers:
            # When they start, their client has its first token: they are not in time or late.
            assert follower.deadline_s is None and follower.keys == leader.keys
            await played.unit.step(follower, tokens_of("b"), LENGTH)
        assert leader.deadline_s is not None
        seeds = [prompt_of(request).sampling.seed for request in (leader, *followers)]
        assert seeds == [40, 41, 42]
        assert (await asked)[0] == 200


@on_loop
async def test_followers_go_where_the_prompt_is_cached(folder: Path) -> None:
    config = make_config(folder, {"main": ["tiny"], "other": ["tiny"]})
    async with stage(config) as (played, client):
        asked = client.ask(n=2)
        unit = played.units["main"]
        leader = await unit.request()
        await unit.step(leader, tokens_of("a"))
        follower = await unit.request()
        for request in (leader, follower):
            await unit.step(request, tokens_of("b"), LENGTH)
        assert (await asked)[0] == 200


# -- streams ---------------------------------------------------------------------------------


@on_loop
async def test_a_stream(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = asyncio.create_task(_collect(client, stream=True))
        request = await played.unit.request()
        await played.unit.step(request, tokens_of("a"))
        await played.unit.step(request, tokens_of("b"), LENGTH)
        said = await asked
    assert said[-1] == "[DONE]" and all("usage" not in event for event in said[:-1])
    choices = [event["choices"][0] for event in said[:-1]]
    assert "".join(choice["text"] for choice in choices) == "ab"
    assert [choice["finish_reason"] for choice in choices][-1] == "length"
    assert len({event["id"] for event in said[:-1]}) == 1


async def _collect(client: Client, path: str = "/v1/completions", **fields: Any) -> list[Any]:
    async with client.post(path, **fields) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        return [event async for event in events(response)]


@pytest.mark.parametrize(("is_continuous", "expected"), [(False, ["b", "c"]), (True, [])])
@on_loop
async def test_the_middle_of_a_stream_takes_the_quick_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_continuous: bool, expected: list[str]
) -> None:
    quick, write_soon = [], EventStream.write_soon

    def note(stream: EventStream, data: bytes) -> None:
        quick.append(json.loads(data[6:])["choices"][0]["text"])
        write_soon(stream, data)

    monkeypatch.setattr(EventStream, "write_soon", note)
    fields = {"stream": True, "stream_options": {"continuous_usage_stats": is_continuous}}
    async with stage(make_config(folder)) as (played, client):
        asked = asyncio.ensure_future(client.post(**fields))
        request = await played.unit.request()
        await played.unit.step(request, tokens_of("a"))
        async with await asked as response:
            said = events(response)
            texts = [(await anext(said))["choices"][0]["text"]]
            for text in "bcd":
                await played.unit.step(request, tokens_of(text), LENGTH if text == "d" else None)
                texts.append((await anext(said))["choices"][0]["text"])
            assert await anext(said) == "[DONE]"
    assert (texts, quick) == (list("abcd"), expected)


@pytest.mark.parametrize("is_continuous", [False, True])
@on_loop
async def test_a_stream_can_tell_its_usage(folder: Path, is_continuous: bool) -> None:
    async with stage(make_config(folder)) as (played, client):
        options = {"include_usage": True, "continuous_usage_stats": is_continuous}
        asked = asyncio.create_task(_collect(client, stream=True, stream_options=options))
        request = await played.unit.request()
        await played.unit.step(request, tokens_of("a"))
        await played.unit.step(request, tokens_of("b"), LENGTH)
        *pieces, last, done = await asked
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert all((piece["usage"] is not None) == is_continuous for piece in pieces)


@on_loop
async def test_a_chat_stream_begins_with_the_role(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        body = {"messages": [{"role": "user", "content": "hi"}], "model": "tiny", "stream": True}
        asked = asyncio.ensure_future(client.http.post("/v1/chat/completions", json=body))
        request = await played.unit.request()
        await played.unit.step(request, tokens_of("a"))
        await played.unit.step(request, tokens_of("b"), LENGTH)
        async with await asked as response:
            said = [event async for event in events(response)]
    deltas = [event["choices"][0]["delta"] for event in said[:-1]]
    assert deltas[0]["role"] == "assistant" and all("role" not in d for d in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == "ab"
    assert said[0]["object"] == "chat.completion.chunk"


@on_loop
async def test_half_a_character_is_never_sent(folder: Path) -> None:
    text = "\U0001f600!"
    async with stage(make_config(folder)) as (played, client):
        asked = asyncio.create_task(_collect(client, stream=True))
        request = await played.unit.request()
        ids = tokens_of(text)
        assert len(ids) > 2
        for token in ids[:-1]:
            await played.unit.step(request, [token])
        await played.unit.step(request, ids[-1:], LENGTH)
        said = await asked
    pieces = [event["choices"][0]["text"] for event in said[:-1]]
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces)


@on_loop
async def test_a_stop_string_ends_the_sequence_in_its_unit(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask(stop=["lazy dog", "never"])
        request = await played.unit.request()
        for token in tokens_of("the lazy dog jumps"):
            await played.unit.step(request, [token])
        assert await played.unit.abort() == request.id
        _, _, answer = await asked
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("the ", "stop")


@on_loop
async def test_nothing_stops_before_min_tokens(folder: Path) -> None:
    ids = tokens_of("xxx")
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask(stop="x", min_tokens=len(ids))
        request = await played.unit.request()
        await played.unit.step(request, ids)
        await played.unit.abort()
        _, _, answer = await asked
    assert answer["choices"][0]["text"] == "xx"


# -- clients that leave ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
@on_loop
async def test_a_client_that_leaves_frees_its_sequence(
    folder: Path, stream: bool, has_begun: bool
) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask(stream=stream, n=2)
        request = await played.unit.request()
        aborted = {request.id}
        if has_begun:
            await played.unit.step(request, tokens_of("a"))
            aborted.add((await played.unit.request()).id)
        asked.cancel()
        assert {await played.unit.abort() for _ in aborted} == aborted
        assert played.server.dispatcher.check() and not len(played.server.dispatcher.ledger)
        # Late words about it disturb nobody.
        await played.unit.step(request, tokens_of("b"), LENGTH)
        asked = client.ask()
        await played.unit.step(await played.unit.request(), tokens_of("c"), LENGTH)
        assert (await asked)[0] == 200


# -- refusals --------------------------------------------------------------------------------


def is_error(body: Any, **fields: Any) -> bool:
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return all(error[key] == value for key, value in fields.items())


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"model": "none"}, 404, {"code": "model_not_found"}),
        ({"temperature": 9}, 400, {"param": "temperature", "type": "invalid_request_error"}),
        ({"tools": []}, 400, {"param": "tools"}),
        ({"prompt": [5000]}, 400, {"param": "prompt"}),
        ({"stop_token_ids": [5000]}, 400, {"param": "stop_token_ids"}),
        ({"logit_bias": {"5000": 1}}, 400, {"param": "logit_bias"}),
        ({"max_tokens": MAX_LEN}, 400, {"code": "context_length_exceeded", "param": "prompt"}),
        ({"prompt": [5] * MAX_LEN}, 400, {"code": "context_length_exceeded"}),
    ],
)
@on_loop
async def test_what_cannot_be_is_refused(
    folder: Path, fields: Any, status: int, error: Any
) -> None:
    async with stage(make_config(folder)) as (played, client):
        found, _, body = await client.ask(**fields)
        assert found == status and is_error(body, **error)
        assert played.unit.requests.empty()


@on_loop
async def test_an_overflow_tells_the_figures(folder: Path) -> None:
    async with stage(make_config(folder)) as (_, client):
        _, _, body = await client.ask(prompt=[5] * 60, max_tokens=7)
    assert (
        "holds 64 tokens; the prompt has 60 and the answer may need 7" in (body["error"]["message"])
    )


@pytest.mark.parametrize(
    ("method", "path", "data", "status", "code"),
    [
        ("GET", "/v1/nothing", b"", 404, "not_found"),
        ("GET", "/v1/completions", b"", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", b"", 404, "model_not_found"),
        ("POST", "/v1/completions", b"{", 400, None),
        ("POST", "/v1/chat/completions", b"", 400, None),
        ("POST", "/v1/completions", b"x" * 2000, 413, "body_too_large"),
    ],
)
@on_loop
async def test_every_error_is_openais(
    folder: Path, method: str, path: str, data: bytes, status: int, code: str | None
) -> None:
    config = make_config(folder, endpoint=Endpoint(port=0, max_body_bytes=1000))
    async with (
        stage(config) as (_, client),
        client.http.request(method, path, data=data) as response,
    ):
        assert response.status == status
        assert is_error(await response.json(), code=code)


@on_loop
async def test_keys_guard_what_costs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "sesame")
    config = make_config(folder, endpoint=Endpoint(port=0, api_keys=ApiKeys(env="KEYS")))
    async with stage(config) as (_, client):
        status, headers, body = await client.ask()
        assert status == 401 and is_error(body, code="invalid_api_key")
        assert headers["WWW-Authenticate"] == "Bearer"
        for path, expected in {
            "/v1/models": 401,
            "/health": 200,
            "/ready": 200,
            "/metrics": 200,
        }.items():
            async with client.http.get(path) as response:
                assert response.status == expected
        known = {"Authorization": "Bearer sesame"}
        async with client.http.get("/v1/models/tiny", headers=known) as response:
            assert (await response.json())["id"] == "tiny"


@pytest.mark.parametrize("salted", [False, True])
@on_loop
async def test_keys_can_keep_their_prompts_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch, salted: bool
) -> None:
    monkeypatch.setenv("KEYS", "ann,bob")
    keys_from = ApiKeys(env="KEYS", isolate=salted)
    config = make_config(folder, endpoint=Endpoint(port=0, api_keys=keys_from))
    async with stage(config) as (played, client):
        keys = []
        for name in ("ann", "bob", "ann"):
            headers = {"Authorization": f"Bearer {name}"}
            body = {"model": "tiny", "prompt": [5] * (BLOCK_TOKENS + 1)}
            asked = asyncio.ensure_future(
                client.http.post("/v1/completions", json=body, headers=headers)
            )
            request = await played.unit.request()
            keys.append(request.keys)
            await played.unit.step(request, [5], LENGTH)
            (await asked).release()
    assert keys[0] == keys[2] and (keys[0] != keys[1]) == salted


@on_loop
async def test_a_long_prompt_is_read_in_a_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, encode = [], ServedModel.encode

    def note(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return encode(*arguments)

    monkeypatch.setattr(ServedModel, "encode", note)
    async with stage(make_config(folder)) as (_, client):
        for prompt in ("the quick brown fox " * 1_000, "the quick brown fox " * 20):
            assert (await client.ask(prompt=prompt))[0] == 400  # longer than the context
    assert [thread is threading.main_thread() for thread in threads] == [False, True]


@on_loop
async def test_a_full_queue_says_when_to_come_back(folder: Path) -> None:
    async with stage(make_config(folder, max_queue=2)) as (played, client):
        first = client.ask(prompt=["a"] * 3)  # an empty queue takes any batch
        requests = [await played.unit.request() for _ in range(3)]
        status, headers, body = await client.ask()
        assert (status, headers["Retry-After"]) == (429, "1")
        assert is_error(body, type="rate_limit_error", code="overloaded")
        for request in requests:
            await played.unit.step(request, tokens_of("a"))
        async with asyncio.timeout(WAIT_S):
            while played.server.dispatcher.ledger.queued("tiny"):
                await asyncio.sleep(0)
        second = client.ask()  # what has a first token does not queue
        requests.append(await played.unit.request())
        for request in requests:
            await played.unit.step(request, tokens_of("a"), LENGTH)
        assert (await first)[0] == (await second)[0] == 200


@on_loop
async def test_a_refusal_of_the_unit_is_the_answer(folder: Path) -> None:
    async with stage(make_config(folder, queue_timeout_s=5.0)) as (played, client):
        asked = client.ask(prompt=["a", "b"], stream=True)
        late, other = await played.unit.request(), await played.unit.request()
        assert late.deadline_s == pytest.approx(late.arrived_s + 5.0)
        refusal = Refusal(429, "rate_limit_error", "too late", 2.5)
        output = Output(late.id, finish=FinishReason.DEADLINE, refusal=refusal)
        await played.unit.say(Step((output,)))
        status, headers, body = await asked
        assert (status, headers["Retry-After"]) == (429, "3")
        assert is_error(body, message="too late")
        assert await played.unit.abort() == other.id


# -- about the server ------------------------------------------------------------------------


@on_loop
async def test_models_are_listed(folder: Path) -> None:
    async with stage(make_config(folder, {"main": ["a/b", "c"]})) as (_, client):
        async with client.http.get("/v1/models") as response:
            listed = (await response.json())["data"]
        async with client.http.get("/v1/models/a/b") as response:
            shown = await response.json()
    assert [model["id"] for model in listed] == ["a/b", "c"]
    assert (shown["object"], shown["max_model_len"]) == ("model", MAX_LEN)


@on_loop
async def test_metrics_tell_what_happens(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask()
        request = await played.unit.request()
        text = await read_metrics(client)
        assert 'muxrt_requests_queued{model="tiny"} 1.0' in text
        assert "muxrt_blocks_used{" not in text
        await played.unit.step(request, tokens_of("a"))
        stats = ModelStats("tiny", 0, 1, 0, 5, 2, 8, 1, 3, 4, 6, 7, 9, 0)
        batches = (BatchStats("tiny", Phase.PREFILL, 3, 120, 0.5),)
        await played.unit.say(Stats("main", 16, 9, (stats,), batches))
        await played.unit.step(request, tokens_of("b"), LENGTH)
        await asked
        text = await read_metrics(client)
    for line in (
        'muxrt_requests_queued{model="tiny"} 0.0',
        'muxrt_blocks_used{model="tiny",unit="main"} 5.0',
        'muxrt_blocks_cached{model="tiny",unit="main"} 2.0',
        'muxrt_blocks_quota{model="tiny",unit="main"} 8.0',
        'muxrt_blocks_borrowed{model="tiny",unit="main"} 1.0',
        'muxrt_preemptions_total{kind="swap",model="tiny",unit="main"} 3.0',
        'muxrt_preemptions_total{kind="recompute",model="tiny",unit="main"} 4.0',
        'muxrt_prefix_hit_tokens_total{model="tiny",unit="main"} 6.0',
        'muxrt_batches_total{model="tiny",phase="prefill",unit="main"} 3.0',
        'muxrt_batch_tokens_total{model="tiny",phase="prefill",unit="main"} 120.0',
        'muxrt_batch_seconds_total{model="tiny",phase="prefill",unit="main"} 0.5',
        'muxrt_unit_blocks_free{unit="main"} 9.0',
        'muxrt_unit_restarts_total{unit="main"} 0.0',
        'muxrt_ttft_seconds_count{model="tiny"} 1.0',
        'muxrt_tpot_seconds_count{model="tiny"} 1.0',
        'muxrt_http_requests_total{model="tiny",status="200"} 1.0',
    ):
        assert line in text


async def read_metrics(client: Client) -> str:
    async with client.http.get("/metrics") as response:
        return await response.text()
