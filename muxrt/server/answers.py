"""What a client is answered, in OpenAI's words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from muxrt.core import TokenLogprobs
from muxrt.server.generation import Delta, Scored
from muxrt.server.tokenizer import Tokenizer

# JSON knows no infinity; OpenAI writes this for what cannot be drawn.
LEAST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"
# Stands where the text goes in an event that is to be split there.
NUL = Delta("\0", None, None)


class CachedTokens(msgspec.Struct, frozen=True):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one HTTP request, all choices together; each prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one item per token; None where the first token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """A choice, whole or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    """A token that came, and those that could have."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """`choices[].logprobs` of a chat."""

    content: list[ChatLogprob]
    refusal: None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A chat message, or what a chunk adds to it."""

    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """A whole choice of a chat."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of a choice of a chat."""

    index: int
    delta: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None


AnyChoice = CompletionChoice | ChatChoice | ChatChunkChoice


class Answer(msgspec.Struct, frozen=True):
    """A whole answer, or the chunk that carries only the usage."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[AnyChoice]
    usage: Usage | None


class Chunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """A chunk of a stream whose client did not ask for usage: the field is absent."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[AnyChoice]


class Dialect(Protocol):
    """How one of the two routes words its answers."""

    @property
    def prefix(self) -> str:
        """Of ids."""

    @property
    def whole(self) -> str:
        """`object` of an answer."""

    @property
    def chunk(self) -> str:
        """`object` of a piece of it."""

    def choice(self, index: int, whole: Delta) -> AnyChoice:
        """A choice that has ended."""

    def piece(self, index: int, delta: Delta) -> AnyChoice:
        """What a stream adds to a choice."""


class CompletionDialect:
    """POST /v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def choice(self, index: int, whole: Delta) -> AnyChoice:
        return self.piece(index, whole)

    def piece(self, index: int, delta: Delta) -> AnyChoice:
        return CompletionChoice(index, delta.text, self._logprobs(delta.scored), delta.finish)

    def _logprobs(self, scored: Sequence[Scored] | None) -> CompletionLogprobs | None:
        if scored is None:
            return None
        return CompletionLogprobs(
            tokens=[self._show(entry.token) for entry in scored],
            token_logprobs=[
                None if entry.logprobs is None else _finite(entry.logprobs.logprob)
                for entry in scored
            ],
            top_logprobs=[self._tops(entry.logprobs) for entry in scored],
            text_offset=[entry.offset for entry in scored],
        )

    def _tops(self, entry: TokenLogprobs | None) -> dict[str, float] | None:
        """The most probable tokens and the chosen one, if it is not among them."""
        if entry is None:
            return None
        tops = dict(zip(entry.top_tokens, entry.top_logprobs, strict=True))
        tops.setdefault(entry.token, entry.logprob)
        return {self._show(token): _finite(logprob) for token, logprob in tops.items()}

    def _show(self, token: int) -> str:
        """The token as text; one that is no whole character as OpenAI spells bytes."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatDialect:
    """POST /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def choice(self, index: int, whole: Delta) -> AnyChoice:
        message = Message("assistant", whole.text)
        return ChatChoice(index, message, self._logprobs(whole.scored), whole.finish)

    def piece(self, index: int, delta: Delta) -> AnyChoice:
        message = Message("assistant" if delta.is_first else None, delta.text)
        return ChatChunkChoice(index, message, self._logprobs(delta.scored), delta.finish)

    def _logprobs(self, scored: Sequence[Scored] | None) -> ChatLogprobs | None:
        if scored is None:
            return None
        entries = [entry.logprobs for entry in scored if entry.logprobs is not None]
        return ChatLogprobs([self._logprob(entry) for entry in entries])

    def _logprob(self, entry: TokenLogprobs) -> ChatLogprob:
        chosen = self._top(entry.token, entry.logprob)
        pairs = zip(entry.top_tokens, entry.top_logprobs, strict=True)
        tops = [self._top(token, logprob) for token, logprob in pairs]
        return ChatLogprob(chosen.token, chosen.logprob, chosen.bytes, tops)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        data = self._tokenizer.token_bytes(token)
        return TopLogprob(data.decode(errors="replace"), _finite(logprob), list(data))


class Writer:
    """Writes the answers to one HTTP request."""

    def __init__(self, dialect: Dialect, answer_id: str, created: int, model: str) -> None:
        self._dialect = dialect
        self._id = f"{dialect.prefix}-{answer_id}"
        self._created = created  # seconds since 1970
        self._model = model

    def whole(self, choices: Sequence[Delta], usage: Usage) -> bytes:
        """The answer to a request that does not stream, choices in order."""
        worded = [self._dialect.choice(index, whole) for index, whole in enumerate(choices)]
        return msgspec.json.encode(
            Answer(self._id, self._dialect.whole, self._created, self._model, worded, usage)
        )

    def event(self, index: int, delta: Delta) -> bytes:
        """What a stream tells of a choice, to a client that did not ask for usage."""
        pieces = [self._dialect.piece(index, delta)]
        return _event(Chunk(self._id, self._dialect.chunk, self._created, self._model, pieces))

    def usage_event(self, usage: Usage | None, index: int = 0, delta: Delta | None = None) -> bytes:
        """The same with a `usage` field; without a delta it tells the usage only."""
        pieces = [] if delta is None else [self._dialect.piece(index, delta)]
        return _event(
            Answer(self._id, self._dialect.chunk, self._created, self._model, pieces, usage)
        )


def count_usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """The usage of one HTTP request."""
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens, completion_tokens, total, CachedTokens(cached_tokens))


@dataclass(frozen=True, slots=True)
class Frame:
    """An event around its text."""

    before: bytes
    after: bytes


def split_event(event: bytes) -> Frame:
    """The frame of an event whose text is `NUL`: the last string of it that a user can choose."""
    before, _, after = event.rpartition(msgspec.json.encode(NUL.text)[1:-1])
    return Frame(before, after)


def _event(chunk: Answer | Chunk) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _finite(logprob: float) -> float:
    return max(LEAST_LOGPROB, logprob)
