"""ADBS, adaptive batch scheduling (MuxServe section 3.3, Algorithm 3).

Prefill first, one at a time, models in turn; then fill the other lanes with decode steps of as
many models as there are lanes. What does not fit yet gets a reservation, so that decodes
do not eat its blocks for ever.
"""

from muxrt.core import Batch
from muxrt.sched.policies.turns import TimedTurns, Turns
from muxrt.sched.rotation import Rotation
from muxrt.sched.scheduler import Scheduler


class Adbs:
    """The paper's policy. On a unit of one lane, prefills alternate with rounds of decodes:

    there "beside the prefill" can only mean "before the next one", and without it a queue of
    prompts would stop every stream. Prefill turns go by time, not by batches (docs/decisions.md).
    """

    beside_share = 1.0

    def __init__(self, quota_period_s: float) -> None:
        self._period_s = quota_period_s
        self._prefills = TimedTurns()
        self._decodes = Turns()
        self._round: set[str] = set()  # one lane: models that decode before the next prefill
        self._reserved_until: dict[str, float] = {}

    def next_batch(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        """A prefill if none runs and one fits, else a decode step of the next model."""
        self._lapse(scheduler, now)
        if self._may_prefill(scheduler, lane):
            batch = self._prefill(scheduler, lane, now)
            if batch is not None:
                return batch
        return self._decode(scheduler, lane)

    def rotation(self, scheduler: Scheduler) -> Rotation | None:
        """Decodes take turns; not while a round is under way or something is reserved."""
        if self._round or self._reserved_until:
            return None
        return Rotation(tuple(self._decodes.order(scheduler.queues)))

    def rotated(self, last: str) -> None:
        """The others are before it now."""
        self._decodes.served(last)

    def _may_prefill(self, scheduler: Scheduler, lane: int) -> bool:
        if scheduler.prefills_in_flight():
            return False
        self._round = {model for model in self._round if scheduler.can_decode(model, lane)}
        return not self._round

    def _prefill(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        is_held = False
        for model in self._prefills.order(scheduler.queues):
            if not scheduler.wants_prefill(model, lane):
                continue
            # Who is held back keeps its turn: who started before it would use up the time it
            # needs. Prompts under way go on, or nobody might.
            if is_held and not scheduler.is_prefilling(model, lane):
                continue
            if not scheduler.may_prefill(model, lane, now):
                is_held = True
                continue
            batch = scheduler.prefill(model, lane, now)
            if batch is not None:
                self._prefills.served(model, scheduler.predicted_s(batch))
                self._reserved_until.pop(model, None)
                if scheduler.limits.num_lanes == 1:
                    self._round = set(scheduler.queues)
                return batch
            self._reserve(scheduler, model, now)
        return None

    def _decode(self, scheduler: Scheduler, lane: int) -> Batch | None:
        for model in self._decodes.order(scheduler.queues):
            batch = scheduler.decode(model, lane)
            self._round.discard(model)
            if batch is not None:
                self._decodes.served(model)
                return batch
        return None

    def _reserve(self, scheduler: Scheduler, model: str, now: float) -> None:
        """Keep free blocks for a prefill that does not fit yet: one at a time, for a while."""
        head = scheduler.queues[model].head()
        if head is None or head.in_flight or self._reserved_until:
            return
        self._reserved_until[model] = now + self._period_s
        scheduler.memory.reserved[model] = scheduler.memory.need(head)

    def _lapse(self, scheduler: Scheduler, now: float) -> None:
        """End reservations whose time is over, or that would leave every lane idle.

        For another period no new one is made, so that the decodes it held up can go on.
        """
        for model, until in list(self._reserved_until.items()):
            if now >= until or not scheduler.num_in_flight:
                scheduler.memory.reserved.pop(model, None)
            if now >= until + self._period_s or scheduler.queues[model].head() is None:
                del self._reserved_until[model]
