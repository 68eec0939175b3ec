"""The official `openai` client against the endpoint and real unit processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from real_server import RealServer, real_config, real_server
from tiny_folder import BOS, SHAPE, byte_level

from muxrt.config.serve import ApiKeys

KEY = "sesame"
PROMPT = "the quick brown fox jumps over the lazy dog; a server serves many models"
HELLO: Any = [{"role": "user", "content": "how are you?"}]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TEST_KEYS", f"other,{KEY}")
    config = real_config(
        tmp_path_factory.mktemp("models"),
        {"main": ["one", "two"]},
        api_keys=ApiKeys(env="TEST_KEYS"),
    )
    with real_server(config) as server:
        yield server
    patch.undo()


@pytest.fixture(scope="module")
def client(endpoint: RealServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_leaks(endpoint: RealServer) -> Iterator[None]:
    yield
    endpoint.check_nothing_leaked()


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    """Greedy and exactly `max_tokens` long, unless asked otherwise."""
    asked = {"model": "one", "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields
    asked["extra_body"] = {"ignore_eos": True} | asked.get("extra_body", {})
    return client.completions.create(**asked)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": "one", "messages": HELLO, "max_tokens": 12, "temperature": 0} | fields
    asked["extra_body"] = {"ignore_eos": True} | asked.get("extra_body", {})
    return client.chat.completions.create(**asked)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["one", "two"]
    assert client.models.retrieve("two").owned_by == "muxrt"


def test_a_completion_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].text
    assert answer.usage.prompt_tokens == len(byte_level().encode(PROMPT).ids)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (
        12,
        12 + answer.usage.prompt_tokens,
    )


def test_models_differ(client: openai.OpenAI) -> None:
    assert complete(client).choices[0].text != complete(client, model="two").choices[0].text


def test_a_prompt_that_was_seen_is_cached(client: openai.OpenAI) -> None:
    prompt = "a prompt that nobody else sends " * 3
    first, second = complete(client, prompt=prompt), complete(client, prompt=prompt)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 16
    assert first.choices[0].text == second.choices[0].text


def test_a_chat(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    whole = complete(client).choices[0].text
    pieces = [chunk.choices[0].text for chunk in complete(client, stream=True)]
    assert "".join(pieces) == whole and len(pieces) > 3


def test_a_chat_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12


def test_usage_in_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 12


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3).choices[0]
    scored = choice.logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == 12
    # Greedy: the chosen token is the most probable one.
    for chosen, tops in zip(scored.token_logprobs, scored.top_logprobs, strict=True):
        assert chosen <= 0 and max(tops.values()) == pytest.approx(chosen)
    assert scored.text_offset[0] == 0 and scored.text_offset == sorted(scored.text_offset)


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 12 and all(len(entry.top_logprobs) == 2 for entry in entries)
    core = byte_level()
    specials = [token.content for token in core.get_added_tokens_decoder().values()]
    data = b"".join(bytes(e.bytes) for e in entries if e.token not in specials)
    assert data.decode(errors="replace") == choice.message.content


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI) -> None:
    whole = complete(client, logprobs=1).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=1, stream=True)]
    tokens = [token for scored in chunks if scored for token in scored.tokens]
    offsets = [offset for scored in chunks if scored for offset in scored.text_offset]
    assert (tokens, offsets) == (whole.tokens, whole.text_offset)


def test_a_prompt_can_be_scored(client: openai.OpenAI) -> None:
    generated = complete(client, logprobs=1, max_tokens=8).choices[0].logprobs
    ids = byte_level().encode(PROMPT).ids
    answer = complete(client, prompt=ids, echo=True, max_tokens=0, logprobs=1)
    scored = answer.choices[0].logprobs
    assert answer.choices[0].text == PROMPT and answer.usage.completion_tokens == 0
    assert scored.tokens[0] == BOS and scored.token_logprobs[0] is None
    assert len(scored.tokens) == len(ids) and scored.text_offset[2] == len(scored.tokens[1])
    # What was generated scores the same when it is a prompt.
    again = complete(client, echo=True, max_tokens=8, logprobs=1).choices[0].logprobs
    assert again.tokens[len(ids) :] == generated.tokens
    assert again.token_logprobs[len(ids) :] == pytest.approx(generated.token_logprobs, abs=1e-4)


def test_a_seed_fixes_the_answer_whatever_else_runs(client: openai.OpenAI) -> None:
    sampled = {"temperature": 1.0, "max_tokens": 16}
    several = complete(client, n=3, seed=7, **sampled).choices
    alone = [complete(client, seed=7 + i, **sampled).choices[0].text for i in range(3)]
    assert [choice.text for choice in several] == alone
    assert [choice.index for choice in several] == [0, 1, 2] and len(set(alone)) > 1


def test_a_batch_is_answered_like_its_prompts(client: openai.OpenAI) -> None:
    prompts = ["the quick", "brown fox", "lazy dog"]
    several = complete(client, prompt=prompts)
    alone = [complete(client, prompt=prompt) for prompt in prompts]
    assert [c.text for c in several.choices] == [answer.choices[0].text for answer in alone]
    assert several.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)


def test_token_ids_are_as_good_as_text(client: openai.OpenAI) -> None:
    ids = byte_level().encode(PROMPT).ids
    assert complete(client, prompt=[ids]).choices[0].text == complete(client).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text(client: openai.OpenAI, stream: bool) -> None:
    whole = complete(client, max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    answer = complete(client, max_tokens=24, stop=[stop, "never said"], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == whole[: whole.find(stop)]
    assert choices[-1].finish_reason == "stop"


def test_a_stop_token_ends_the_text(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=0).choices[0].logprobs
    core = byte_level()
    token = next(i for i in range(320) if core.decode([i]) == logprobs.tokens[3])
    answer = complete(client, extra_body={"stop_token_ids": [token]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 4


def test_bias_decides(client: openai.OpenAI) -> None:
    token = byte_level().encode("q", add_special_tokens=False).ids[0]
    answer = complete(client, logit_bias={str(token): 100}, max_tokens=4)
    assert answer.choices[0].text == "qqqq"


def test_a_context_can_be_filled_to_the_last_token(client: openai.OpenAI) -> None:
    length = SHAPE["max_position_embeddings"]
    answer = complete(client, prompt=[5] * (length - 3), max_tokens=3)
    assert answer.usage.total_tokens == length


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "none"}, openai.NotFoundError, "model_not_found", None),
        ({"temperature": 3}, openai.BadRequestError, None, "temperature"),
        ({"best_of": 2}, openai.BadRequestError, None, "best_of"),
        (
            {"prompt": [5] * 256, "max_tokens": 1},
            openai.BadRequestError,
            "context_length_exceeded",
            "prompt",
        ),
        ({"extra_body": {"mirostat": 2}}, openai.BadRequestError, None, "mirostat"),
    ],
)
def test_errors_are_the_clients_own_classes(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str | None,
    param: str | None,
) -> None:
    with pytest.raises(error) as caught:
        complete(client, **fields)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="guess").models.list()
    assert caught.value.code == "invalid_api_key"


def test_leaving_a_stream_frees_its_blocks(client: openai.OpenAI, endpoint: RealServer) -> None:
    stream = complete(client, max_tokens=150, stream=True)
    next(iter(stream))
    stream.close()
    endpoint.check_nothing_leaked()
    complete(client)  # its report, which `nothing_leaks` waits for, is younger than the abort


def test_the_folder_is_what_was_written(tmp_path: Path) -> None:
    """The tests above rest on it: the same seed gives the same weights."""
    one, two = real_config(tmp_path / "a", {"u": ["m"]}), real_config(tmp_path / "b", {"u": ["m"]})
    files = [Path(c.models[0].path) / "model.safetensors" for c in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()
