"""Round robin over models, a prefill before a decode: the paper's second ablation."""

from muxrt.core import Batch
from muxrt.sched.policies.turns import Turns
from muxrt.sched.rotation import Rotation
from muxrt.sched.scheduler import Scheduler


class RoundRobin:
    """Every model in turn gets one batch."""

    beside_share = 1.0

    def __init__(self) -> None:
        self._turns = Turns()

    def next_batch(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        """One batch of the next model that has something to run."""
        for model in self._turns.order(scheduler.queues):
            batch = scheduler.prefill(model, lane, now) or scheduler.decode(model, lane)
            if batch is not None:
                self._turns.served(model)
                return batch
        return None

    def rotation(self, scheduler: Scheduler) -> Rotation:
        """Models take turns, whatever they do."""
        return Rotation(tuple(self._turns.order(scheduler.queues)))

    def rotated(self, last: str) -> None:
        """The others are before it now."""
        self._turns.served(last)
