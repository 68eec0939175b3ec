"""Tokens to text while they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from muxrt.server.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence, piece by piece; time is linear in its length."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_half = False  # of a character, in the decoder

    def push(self, token: int) -> str:
        """The text that `token` completes: "" for a special token or half a character."""
        if self._tokenizer.is_special(token):
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token))
        self._has_half = bool(self._decoder.getstate()[0])
        return text

    def push_json(self, tokens: Sequence[int]) -> bytes | None:
        """`push` of all `tokens`, as JSON less the quotes.

        None, and nothing was pushed, unless each is text by itself, as most are.
        """
        if self._has_half:
            return None
        if len(tokens) == 1:
            return self._tokenizer.json_text(tokens[0])
        texts = [self._tokenizer.json_text(token) for token in tokens]
        return None if None in texts else b"".join(text for text in texts if text)

    def flush(self) -> str:
        """What is left at the end: half a character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class _Matcher:
    """Knuth, Morris and Pratt: how much of one stop string the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._shorter = _borders(stop)

    def feed(self, char: str) -> bool:
        """Take one character; True when it completes the stop string."""
        while self.matched and char != self.stop[self.matched]:
            self.matched = self._shorter[self.matched - 1]
        self.matched += char == self.stop[self.matched]
        return self.matched == len(self.stop)


def _borders(word: str) -> list[int]:
    """For each prefix of `word`, the length of its longest proper prefix that is its suffix."""
    borders, length = [0] * len(word), 0
    for index in range(1, len(word)):
        while length and word[index] != word[length]:
            length = borders[length - 1]
        length += word[index] == word[length]
        borders[index] = length
    return borders


class StopScanner:
    """Cuts a text before the stop string that is completed first, however it is dealt in pieces.

    Of several completed by the same character, the longest cuts. Only what could be the beginning
    of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """What of the text so far is safe to show now; "" once stopped."""
        if not self._matchers or self.is_stopped:
            return "" if self.is_stopped else text
        text, start = self._held + text, len(self._held)
        for index in range(start, len(text)):
            done = [matcher for matcher in self._matchers if matcher.feed(text[index])]
            if done:
                self.is_stopped, self._held = True, ""
                return text[: index + 1 - max(len(matcher.stop) for matcher in done)]
        keep = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held
