"""Whose turn it is: fair orders of models that come and go."""

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


class TimedTurns:
    """Whoever had the least time comes first; among equals it is round robin.

    Start-time fair queueing: who was away has saved nothing up.
    """

    def __init__(self) -> None:
        self._turns = Turns()
        self._spent_s: dict[str, float] = {}
        self._start_s = 0.0  # of the last turn, on the scale of `_spent_s`

    def order(self, models: Iterable[str]) -> list[str]:
        """The models, who had the least time first."""
        return sorted(self._turns.order(models), key=self._next_start_s)

    def served(self, model: str, seconds: float) -> None:
        """`model` had a turn that took so long."""
        self._turns.served(model)
        self._start_s = self._next_start_s(model)
        self._spent_s[model] = self._start_s + seconds

    def _next_start_s(self, model: str) -> float:
        return max(self._start_s, self._spent_s.get(model, 0.0))
