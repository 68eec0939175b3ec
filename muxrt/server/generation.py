"""One choice of an answer: from what its unit says to what its client sees."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from muxrt.core import FinishReason, Output, Refusal, TokenLogprobs
from muxrt.errors import MuxrtError, Unavailable
from muxrt.metrics import Timing, tpot_s
from muxrt.server.detokenize import Detokenizer, StopScanner
from muxrt.server.tokenizer import Tokenizer

STOP, LENGTH = "stop", "length"
FINISH = {FinishReason.STOP: STOP, FinishReason.LENGTH: LENGTH}


class Refused(MuxrtError):
    """A unit's refusal, as the error it was there."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message, retry_after_s=refusal.retry_after_s)
        self.status, self.kind = refusal.status, refusal.kind


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its probability and its place."""

    token: int
    offset: int  # characters of the choice's text before it
    logprobs: TokenLogprobs | None  # None for the first token of a prompt


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step, or all of them, added to a choice."""

    text: str
    scored: tuple[Scored, ...] | None  # None where nobody asked for probabilities
    finish: str | None
    is_first: bool = False

    @property
    def is_empty(self) -> bool:
        """Nothing that a client could see."""
        return not (self.text or self.scored or self.finish or self.is_first)


def merge(deltas: Sequence[Delta]) -> Delta:
    """All deltas of a choice that has ended, as one."""
    scored = [delta.scored for delta in deltas if delta.scored is not None]
    return Delta(
        "".join(delta.text for delta in deltas),
        tuple(entry for part in scored for entry in part) if scored else None,
        deltas[-1].finish,
        is_first=True,
    )


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt to be shown in front of its answer."""

    text: str
    tokens: Sequence[int]


class Choice:
    """A sequence on its way to a client. Times are of the caller's monotonic clock."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        is_scored: bool = False,
        echo: Echo | None = None,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finish: str | None = None
        self.first_s: float | None = None
        self.last_s = 0.0
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self._min_tokens = min_tokens
        self._is_scored = is_scored
        self._echo = echo
        self._prompt_logprobs: list[TokenLogprobs] = []
        # Nothing may stop it early, and no place in the text has to be known.
        self._is_plain = not stops and not is_scored
        self._num_chars = 0
        self._has_begun = False

    def take(self, output: Output, now: float) -> Delta:
        """What `output` adds. Raises MuxrtError where the unit refuses to go on."""
        if output.refusal is not None:
            raise Refused(output.refusal)
        if output.finish not in (None, *FINISH):
            raise Unavailable("the generation was ended by the server", retry_after_s=1.0)
        self._prompt_logprobs += output.prompt_logprobs or ()
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if not output.tokens and output.finish is None:
            return Delta("", None, None)
        if output.tokens:
            self.first_s = now if self.first_s is None else self.first_s
            self.last_s = now
        is_first, self._has_begun = not self._has_begun, True
        text, scored = self._begin() if is_first else ("", [])
        text += self._read(output, scored)
        return Delta(text, tuple(scored) if self._is_scored else None, self.finish, is_first)

    def take_plain(self, output: Output, now: float) -> bytes | None:
        """`take` of an output in the middle of a stream that needs no care.

        The JSON of its text, less the quotes; None, and nothing was taken, for every other output.
        """
        if not (self._is_plain and self._has_begun and _is_plain(output)):
            return None
        text = self._text.push_json(output.tokens)
        if text is not None:
            self.num_tokens += len(output.tokens)
            self.last_s = now
            self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        return text

    def timing(self, arrived_s: float) -> Timing:
        """How long it took a client that had asked at `arrived_s`."""
        if self.first_s is None:
            return Timing(None, None)
        rate = tpot_s(self.first_s, self.last_s, self.num_tokens)
        return Timing(self.first_s - arrived_s, rate)

    def _read(self, output: Output, scored: list[Scored]) -> str:
        """The text of the output's tokens, cut where a stop string says."""
        text = ""
        entries = output.logprobs or (None,) * len(output.tokens)
        for left, (token, logprobs) in enumerate(zip(output.tokens, entries, strict=True), 1):
            scored.append(Scored(token, self._num_chars, logprobs))
            is_end = output.finish is FinishReason.STOP and left == len(output.tokens)
            text += self._push(token, is_end)
            if self._scanner.is_stopped:
                self.finish = STOP
                return text
        if output.finish is not None:
            text += self._scanner.feed(self._text.flush()) + self._scanner.flush()
            self.finish = FINISH[output.finish]
        return text

    def _push(self, token: int, is_end: bool) -> str:
        """The text that may be shown now that `token` came; a stop token itself has none."""
        self.num_tokens += 1
        text = "" if is_end else self._text.push(token)
        self._num_chars += len(text)
        # Before the minimum is reached nothing stops, so nothing needs to be held back.
        return text if self.num_tokens < self._min_tokens else self._scanner.feed(text)

    def _begin(self) -> tuple[str, list[Scored]]:
        """The prompt, where the client wants to see it."""
        if self._echo is None:
            return "", []
        scored = list(self._score_prompt(self._echo)) if self._is_scored else []
        self._num_chars = len(self._echo.text)
        return self._echo.text, scored

    def _score_prompt(self, echo: Echo) -> Iterable[Scored]:
        text, offset = Detokenizer(self._tokenizer), 0
        # The first token comes from nowhere: it has no probability.
        for token, logprobs in zip(echo.tokens, [None, *self._prompt_logprobs], strict=True):
            yield Scored(token, offset, logprobs)
            offset += len(text.push(token))


def _is_plain(output: Output) -> bool:
    """Some tokens, and nothing else to be told."""
    return bool(output.tokens) and not (
        output.finish or output.logprobs or output.prompt_logprobs or output.refusal
    )
