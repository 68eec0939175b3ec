"""A discrete-event loop: callbacks at points in time, in one repeatable order."""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf

# At equal times, finish work before letting more arrive, and plan last.
FINISH, ARRIVE, PLAN = range(3)


@dataclass(eq=False, slots=True)
class Event:
    """What is to happen at a point in time."""

    at_s: float
    callback: Callable[[], None] | None
    number: int  # in order of being asked for

    def cancel(self) -> None:
        """It will not happen; cancelling twice or too late does no harm."""
        self.callback = None


class EventLoop:
    """Time moves only in `step`. Equal times run by priority, then first come first served."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._seq = count()
        # Tuples, because they are compared without a call: (time, priority, number, event).
        self._heap: list[tuple[float, int, int, Event]] = []

    def after(self, delay_s: float, callback: Callable[[], None], priority: int = PLAN) -> Event:
        """Call `callback` in `delay_s` seconds."""
        if delay_s < 0:
            raise ValueError(f"an event cannot be in the past: delay_s={delay_s}")
        return self.at(self.now_s + delay_s, callback, priority)

    def at(self, at_s: float, callback: Callable[[], None], priority: int = PLAN) -> Event:
        """Call `callback` at `at_s`; a time that has passed means now."""
        event = Event(at_s if at_s > self.now_s else self.now_s, callback, next(self._seq))
        heappush(self._heap, (event.at_s, priority, event.number, event))
        return event

    @property
    def has_events(self) -> bool:
        """Something is still to happen."""
        return self.next_s() < inf

    def next_s(self) -> float:
        """When something happens next; inf where nothing will."""
        while self._heap and self._heap[0][3].callback is None:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else inf

    def step(self) -> bool:
        """Run the next event; False when none is left."""
        while self._heap:
            event = heappop(self._heap)[3]
            if event.callback is not None:
                self.now_s = event.at_s
                event.callback()
                return True
        return False
