"""First come, first served: the paper's temporal-multiplexing ablation."""

from muxrt.core import Batch
from muxrt.sched.rotation import Rotation
from muxrt.sched.scheduler import Scheduler


class Fcfs:
    """The model whose oldest unfinished request came first has the lane: prefill, then decode."""

    beside_share = 1.0

    def next_batch(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        """The next batch of the first model in arrival order that can run at all."""
        for model in _by_arrival(scheduler):
            batch = scheduler.prefill(model, lane, now) or scheduler.decode(model, lane)
            if batch is not None:
                return batch
        return None

    def rotation(self, scheduler: Scheduler) -> Rotation:
        """Whoever came first goes first, every time."""
        return Rotation(tuple(_by_arrival(scheduler)), turns=False)

    def rotated(self, last: str) -> None:
        """It remembers nothing."""


def _by_arrival(scheduler: Scheduler) -> list[str]:
    oldest = {
        name: queue.oldest_order for name, queue in scheduler.queues.items() if not queue.is_empty
    }
    return sorted(oldest, key=oldest.__getitem__)
