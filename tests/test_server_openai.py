"""What clients may ask: every field is honoured, neutral, or refused by its name."""

import json
from typing import Any

import pytest

from muxrt.errors import BadRequest
from muxrt.server.openai import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    MAX_SEQUENCES,
    Ask,
    parse_chat,
    parse_completion,
)

HELLO = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> Ask:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def chat(**fields: Any) -> Ask:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO, **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ("hi",)),
        ("", ("",)),
        (["hi", "ho"], ("hi", "ho")),
        ([1, 2], ([1, 2],)),
        ([[1], [2, 3]], ([1], [2, 3])),
        (["hi", [1]], ("hi", [1])),
    ],
)
def test_prompts_come_in_many_shapes(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [True], [-1], [1.5], {}, 3, [[1], [None]]])
def test_other_shapes_are_refused(prompt: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_sampling_is_carried_over() -> None:
    sampling = completion(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[9],
        logprobs=3,
    ).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.presence_penalty) == (0.1, 1)
    assert (sampling.frequency_penalty, sampling.repetition_penalty) == (-1, 1.1)
    assert (sampling.logit_bias, sampling.min_tokens) == ({5: -100}, 2)
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (9,))
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, None)


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_can_be_off(top_k: int) -> None:
    assert completion(top_k=top_k).sampling.top_k is None


def test_limits_have_two_names() -> None:
    assert completion().max_tokens == 16
    assert chat().max_tokens is None
    assert chat(max_tokens=3).max_tokens == chat(max_completion_tokens=3).max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=3).max_tokens == 3


def test_echo_may_ask_for_nothing_else() -> None:
    ask = completion(echo=True, max_tokens=0, logprobs=1)
    assert (ask.echo, ask.max_tokens, ask.sampling.prompt_logprobs) == (True, 0, 1)


def test_chat_logprobs_are_a_switch_and_a_number() -> None:
    assert chat(logprobs=True, top_logprobs=2).sampling.logprobs == 2
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=False).sampling.logprobs is None


def test_null_is_as_good_as_absent() -> None:
    fields = dict.fromkeys(["temperature", "stop", "seed", "max_tokens", "logprobs", "n", "tools"])
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("min_tokens", 17),
        ("n", 0),
        ("n", 129),
        ("best_of", 2),
        ("logprobs", 21),
        ("logprobs", True),
        ("seed", 1 << 63),
        ("seed", "x"),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 1025),
        ("stop", 3),
        ("stop_token_ids", 3),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("stream_options", {"include_usage": True}),  # without stream
        ("suffix", "end"),
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("service_tier", "flex"),
        ("tempature", 1),
        ("guided_json", {}),
        ("skip_special_tokens", False),
        ("model", None),
        ("prompt", None),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(**{field: value})
    assert caught.value.status == 400
    assert caught.value.param == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("echo", True),
        ("continue_final_message", True),
        ("chat_template", "x"),
        ("chat_template_kwargs", {"a": 1}),
        ("top_logprobs", 2),  # without logprobs
        ("logprobs", 2),
        ("max_tokens", 0),
        ("messages", []),
        ("messages", "hello"),
        ("prompt", "hello"),
    ],
)
def test_a_wrong_field_of_a_chat_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**{field: value})
    assert caught.value.param == field
    assert field in caught.value.message


@pytest.mark.parametrize("name", CHAT_NEUTRAL)
def test_every_neutral_value_of_a_chat_is_taken(name: str) -> None:
    rule = CHAT_NEUTRAL[name]
    for value in (None, *rule.values, *(["label"] if rule.any_value else [])):
        assert chat(**{name: value}) == chat()


@pytest.mark.parametrize("name", COMPLETION_NEUTRAL)
def test_every_neutral_value_of_a_completion_is_taken(name: str) -> None:
    for value in (None, *COMPLETION_NEUTRAL[name].values):
        assert completion(**{name: value}) == completion()


def test_a_number_is_no_truth_value() -> None:
    with pytest.raises(BadRequest, match="store"):
        chat(store=0)


def test_a_typo_gets_a_hint() -> None:
    with pytest.raises(BadRequest, match="did you mean max_tokens"):
        chat(max_token=3)


def test_two_limits_that_differ_are_refused() -> None:
    with pytest.raises(BadRequest, match="differs from max_completion_tokens"):
        chat(max_tokens=3, max_completion_tokens=4)


def test_a_batch_has_a_bound() -> None:
    with pytest.raises(BadRequest, match=f"expected <= {MAX_SEQUENCES}"):
        completion(prompt=["a"] * (MAX_SEQUENCES // 2 + 1), n=2)
    assert completion(prompt=["a"] * 8, n=2).num_sequences == 16


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"\xff{}", b"null"])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest, match=r"JSON"):
        parse_chat(data)


# -- messages --------------------------------------------------------------------------------


def messages(*raw: Any) -> tuple[Any, ...]:
    return chat(messages=list(raw)).messages


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"role": "user", "content": parts}) == ({"role": "user", "content": "ab"},)


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
    answer |= {"annotations": [], "audio": None, "function_call": None}
    assert messages(answer) == ({"role": "assistant", "content": ""},)


def test_developers_are_systems_and_names_stay() -> None:
    said = messages({"role": "developer", "content": "x", "name": "ann"})
    assert said == ({"role": "system", "content": "x", "name": "ann"},)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages[0].tool_call_id"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
            "messages[0].content[0].cache_control",
        ),
        ({"role": "user", "content": "x", "name": 3}, "messages[0].name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(message: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        messages(message)
    assert caught.value.param == param
