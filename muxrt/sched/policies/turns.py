"""Whose turn it is: round robin over models that come and go."""

from collections.abc import Iterable


class Turns:
    """Remembers who was served last and orders the others after it."""

    def __init__(self) -> None:
        self._last: str | None = None

    def order(self, models: Iterable[str]) -> list[str]:
        """The models, the one after the last served first."""
        names = list(models)
        if self._last not in names:
            return names
        after = names.index(self._last) + 1
        return names[after:] + names[:after]

    def served(self, model: str) -> None:
        """`model` had its turn."""
        self._last = model
