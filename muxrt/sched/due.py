"""When requests are due, soonest first; who is no longer waited for falls out by itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush


@dataclass(slots=True)
class DueTimes:
    """Points in time, each of one request."""

    counts: Callable[[int], bool]  # whether the request still waits for its time
    _heap: list[tuple[float, int]] = field(default_factory=list)

    def add(self, at_s: float, request_id: int) -> None:
        """The request is due then, unless it does not count by then."""
        heappush(self._heap, (at_s, request_id))

    def next_s(self) -> float | None:
        """When the next one is due; None while nobody waits."""
        while self._heap and not self.counts(self._heap[0][1]):
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> int | None:
        """Who is due by now, soonest first; None if nobody is."""
        next_s = self.next_s()
        return None if next_s is None or next_s > now else heappop(self._heap)[1]
