"""What a client may ask, in OpenAI's words; everything else is refused by its name.

A field is honoured, or it is `NEUTRAL` at a value that asks for nothing, or it is an error: an
accepted and ignored field would be a lie.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from muxrt.core import SamplingParams
from muxrt.errors import BadRequest

Body = TypeVar("Body", bound="GenerateBody")

MAX_CHOICES = 128  # of one prompt, as OpenAI's n
MAX_SEQUENCES = 1024  # prompts x n of one HTTP request
MAX_STOPS, MAX_STOP_CHARS = 16, 1024
COMPLETION_TOKENS = 16  # what /v1/completions generates if nothing is said, as OpenAI

Count = Annotated[int, Meta(ge=0)]
TopCount = Annotated[int, Meta(ge=0, le=20)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
INT64 = 1 << 63
Seed = Annotated[int, Meta(ge=-INT64, le=INT64 - 1)]


@dataclass(frozen=True, slots=True)
class Neutral:
    """A field that is known but not supported: the values that ask for nothing."""

    values: tuple[Any, ...] = ()
    any_value: bool = False  # a label without effect on the answer, by its documentation


LABEL = Neutral(any_value=True)
NO_TOOLS = "tools are not supported"

# Beyond null, which never asks for anything.
NEUTRAL: dict[str, Neutral] = {
    "user": LABEL,
    "metadata": LABEL,
    "safety_identifier": LABEL,
    "prompt_cache_key": LABEL,
    "store": Neutral((False,)),
    "service_tier": Neutral(("auto", "default")),
    "use_beam_search": Neutral((False,)),
    "length_penalty": Neutral((1,)),
    "skip_special_tokens": Neutral((True,)),
    "spaces_between_special_tokens": Neutral((True,)),
    "include_stop_str_in_output": Neutral((False,)),
    "truncate_prompt_tokens": Neutral(),
    "priority": Neutral((0,)),
    "response_format": Neutral(({"type": "text"},)),
}
COMPLETION_NEUTRAL = NEUTRAL | {
    "suffix": Neutral(("",)),
    "add_special_tokens": Neutral((True,)),
}
CHAT_NEUTRAL = NEUTRAL | {
    "tools": Neutral(([],)),
    "tool_choice": Neutral(("none", "auto")),
    "parallel_tool_calls": Neutral((True, False)),
    "functions": Neutral(([],)),
    "function_call": Neutral(("none", "auto")),
    "modalities": Neutral((["text"],)),
    "audio": Neutral(),
    "prediction": Neutral(),
    "reasoning_effort": Neutral(("none",)),
    "verbosity": Neutral(("medium",)),
    "web_search_options": Neutral(),
    "prompt_cache_retention": Neutral(),
    "echo": Neutral((False,)),
    "add_generation_prompt": Neutral((True,)),
    "continue_final_message": Neutral((False,)),
    "add_special_tokens": Neutral((False,)),
    "chat_template": Neutral(),
    "chat_template_kwargs": Neutral(({},)),
}
# Answers that clients send back carry these.
MESSAGE_NEUTRAL: dict[str, Neutral] = {
    "tool_calls": Neutral(([],)),
    "function_call": Neutral(),
    "refusal": Neutral(),
    "audio": Neutral(),
    "annotations": Neutral(([],)),
    "reasoning_content": Neutral(("",)),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream tells besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both generating routes take."""

    model: str
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    min_tokens: Count = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = -1  # -1 and 0 = off, as in vLLM
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    logit_bias: dict[str, Bias] = {}
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    stop: str | list[str] = []
    stop_token_ids: list[Count] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None


class CompletionBody(GenerateBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    best_of: Count | None = None
    echo: bool = False
    logprobs: TopCount | None = None


class ChatBody(GenerateBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    logprobs: bool = False
    top_logprobs: TopCount | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that makes sense, before anything is known of the model but its name."""

    model: str
    sampling: SamplingParams
    seed: int | None
    max_tokens: int | None  # None = as many as fit
    n: int
    stops: tuple[str, ...]
    stream: bool
    options: StreamOptions
    prompts: tuple[str | list[int], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()  # chat, ready for the template
    echo: bool = False

    @property
    def num_sequences(self) -> int:
        """How many choices the answer has."""
        return self.n * (1 if self.messages else len(self.prompts))


def parse_completion(data: bytes) -> Ask:
    """The body of POST /v1/completions. Raises BadRequest."""
    body = _parse(data, CompletionBody, COMPLETION_NEUTRAL)
    if body.best_of not in (None, body.n):
        _refuse("best_of", f"found {body.best_of}, expected n ({body.n}): nothing is ranked here")
    prompts = _prompts(body.prompt)
    if len(prompts) * body.n > MAX_SEQUENCES:
        _refuse("prompt", f"prompts x n is {len(prompts) * body.n}, expected <= {MAX_SEQUENCES}")
    max_tokens = _max_tokens(body, least=0 if body.echo else 1)
    return _ask(
        body,
        COMPLETION_TOKENS if max_tokens is None else max_tokens,
        body.logprobs,
        prompts=prompts,
        echo=body.echo,
    )


def parse_chat(data: bytes) -> Ask:
    """The body of POST /v1/chat/completions. Raises BadRequest."""
    body = _parse(data, ChatBody, CHAT_NEUTRAL)
    if body.top_logprobs is not None and not body.logprobs:
        _refuse("top_logprobs", "needs logprobs: true")
    messages = tuple(_message(index, raw) for index, raw in enumerate(body.messages))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _ask(body, _max_tokens(body, least=1), logprobs, messages=messages)


def _ask(body: GenerateBody, max_tokens: int | None, logprobs: int | None, **rest: Any) -> Ask:
    if body.stream_options is not None and not body.stream:
        _refuse("stream_options", "needs stream: true")
    if max_tokens is not None and body.min_tokens > max_tokens:
        _refuse("min_tokens", f"found {body.min_tokens}, more than max_tokens ({max_tokens})")
    return Ask(
        model=body.model,
        sampling=_sampling(body, logprobs),
        seed=body.seed,
        max_tokens=max_tokens,
        n=body.n,
        stops=_stops(body.stop),
        stream=body.stream,
        options=body.stream_options or StreamOptions(),
        **rest,
    )


def _sampling(body: GenerateBody, logprobs: int | None) -> SamplingParams:
    echo = isinstance(body, CompletionBody) and body.echo
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k if body.top_k > 0 else None,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias={_token(key): bias for key, bias in body.logit_bias.items()},
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=tuple(body.stop_token_ids),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
    )


def _token(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        _refuse("logit_bias", f"found the key {key!r}, expected a token id")
    return int(key)


def _max_tokens(body: GenerateBody, least: int) -> int | None:
    """The limit under either of its names; None where none is given."""
    given = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(given) > 1:
        _refuse("max_tokens", "differs from max_completion_tokens: send one of them")
    limit = next(iter(given), None)
    if limit is not None and limit < least:
        _refuse("max_tokens", f"found {limit}, expected at least {least}")
    return limit


def _stops(stop: str | list[str]) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        _refuse("stop", f"found {len(stops)} strings, expected at most {MAX_STOPS}")
    if not all(0 < len(text) <= MAX_STOP_CHARS for text in stops):
        _refuse("stop", f"expected strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _prompts(prompt: str | list[Any]) -> tuple[str | list[int], ...]:
    """One prompt or many, each text or token ids."""
    if isinstance(prompt, str) or _is_tokens(prompt):
        return (prompt,)
    if not prompt or not all(isinstance(item, str) or _is_tokens(item) for item in prompt):
        _refuse("prompt", "expected text, a list of token ids, or a list of either; none empty")
    return tuple(prompt)


def _is_tokens(item: Any) -> bool:
    # type(), not isinstance(): true is no token.
    return isinstance(item, list) and bool(item) and all(type(t) is int and t >= 0 for t in item)


def _message(index: int, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """One message as templates know it: role, text, and a name if there is one."""
    at = f"messages[{index}]"
    known = {key: value for key, value in raw.items() if key not in MESSAGE_NEUTRAL}
    _check_neutral(raw, MESSAGE_NEUTRAL, prefix=f"{at}.")
    for key in known.keys() - {"role", "content", "name"}:
        _refuse(f"{at}.{key}", "not supported")
    role = known.get("role")
    if not isinstance(role, str) or role not in ROLES:
        _refuse(f"{at}.role", f"found {role!r}, expected one of {', '.join(ROLES)}")
    content = _content(at, known.get("content"), role)
    name = known.get("name")
    if name is None:
        return {"role": ROLES[role], "content": content}
    if not isinstance(name, str):
        _refuse(f"{at}.name", "expected text")
    return {"role": ROLES[role], "content": content, "name": name}


def _content(at: str, content: Any, role: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        _refuse(f"{at}.content", "expected text or a list of text parts")
    return "".join(_part(f"{at}.content[{index}]", part) for index, part in enumerate(content))


def _part(at: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        found = part.get("type") if isinstance(part, dict) else type(part).__name__
        _refuse(at, f"found a part of type {found!r}, expected text: others are not supported")
    for key in part.keys() - {"type", "text"}:
        _refuse(f"{at}.{key}", "not supported")
    text = part.get("text")
    if not isinstance(text, str):
        _refuse(f"{at}.text", "expected text")
    return text


def _parse(data: bytes, target: type[Body], neutral: Mapping[str, Neutral]) -> Body:
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadRequest("the body must be a JSON object")
    fields = target.__struct_fields__
    for key in raw:
        if key not in fields and key not in neutral:
            _refuse(key, "not supported" + _hint(key, [*fields, *neutral]))
    _check_neutral(raw, neutral)
    asked = {key: raw[key] for key in fields if raw.get(key) is not None}
    try:
        return msgspec.convert(asked, target)
    except msgspec.ValidationError as error:
        raise _readable(error) from None


def _check_neutral(
    raw: Mapping[str, Any], neutral: Mapping[str, Neutral], prefix: str = ""
) -> None:
    """Refuse the known but unsupported fields of `raw` that ask for something."""
    for key, rule in neutral.items():
        value = raw.get(key)
        if value is None or rule.any_value or _is_among(value, rule.values):
            continue
        fits = ", ".join(["null", *(msgspec.json.encode(fit).decode() for fit in rule.values)])
        _refuse(prefix + key, f"not supported; the only values taken are {fits}")


def _is_among(value: Any, values: Sequence[Any]) -> bool:
    # In Python 1 == True; in JSON a number is no truth value.
    return any(value == fit and isinstance(value, bool) == isinstance(fit, bool) for fit in values)


_AT = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)
_FIELD = re.compile(r"(.*) field `(.*)`")


def _readable(error: msgspec.ValidationError) -> BadRequest:
    """msgspec's words, with the field in front instead of a JSON path behind."""
    text, at = str(error), None
    if match := _AT.fullmatch(text):
        text, at = match[1], match[2] and match[2].replace("[...]", "")  # some key of an object
    if (named := _FIELD.fullmatch(text)) is not None:
        at = f"{at}.{named[2]}" if at else named[2]
        text = "is required" if named[1].endswith("missing required") else "not supported"
    text = text[:1].lower() + text[1:]
    return BadRequest(f"{at}: {text}" if at else text, param=at)


def _hint(key: str, known: Sequence[str]) -> str:
    close = get_close_matches(key, known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _refuse(param: str, why: str) -> NoReturn:
    raise BadRequest(f"{param}: {why}", param=param)
