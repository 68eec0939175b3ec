"""Blocks kept free for a prefill that does not fit yet: one at a time, for a while."""

from muxrt.sched.scheduler import Scheduler


class Reservation:
    """Ends after a period; for another one no new one is made, so that decodes can go on."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._until_s: dict[str, float] = {}  # of the model that has it

    @property
    def is_held(self) -> bool:
        """There is one, or none may be made yet."""
        return bool(self._until_s)

    def make(self, scheduler: Scheduler, model: str, now: float) -> None:
        """Keep free blocks for the head of `model`, unless there is a reservation already."""
        head = scheduler.queues[model].head()
        if head is None or head.in_flight or self._until_s:
            return
        self._until_s[model] = now + self._period_s
        scheduler.memory.claims.setdefault(model, scheduler.memory.need(head))

    def drop(self, model: str) -> None:
        """It has started."""
        self._until_s.pop(model, None)

    def lapse(self, scheduler: Scheduler, now: float) -> None:
        """End what is over, or would leave every lane idle."""
        for model, until_s in list(self._until_s.items()):
            if now >= until_s or not scheduler.num_in_flight:
                scheduler.memory.claims.pop(model, None)
            if now >= until_s + self._period_s or scheduler.queues[model].head() is None:
                del self._until_s[model]
