"""Prompts of real text, about as long as asked."""

from random import Random

PROBE_CHARS = 400  # long enough for a stable ratio, short enough for any model


class PromptText:
    """Python's own reference manual, which ships inside every CPython."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        self._text = " ".join(" ".join(topics.values()).split())

    def cut(self, num_chars: int, rng: Random) -> str:
        """`num_chars` of text from a random place, from the start of a word where one is near."""
        begin = rng.randrange(max(1, len(self._text) - num_chars))
        begin = self._text.find(" ", begin, begin + 40) + 1 or begin
        piece = self._text[begin : begin + num_chars]
        while len(piece) < num_chars:  # longer than the manual itself: once more from the top
            piece += " " + self._text[: num_chars - len(piece)]
        return piece[:num_chars]
