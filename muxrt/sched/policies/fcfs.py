"""First come, first served: the paper's temporal-multiplexing ablation."""

from muxrt.core import Batch
from muxrt.sched.scheduler import Scheduler


class Fcfs:
    """The model whose oldest unfinished request came first has the lane: prefill, then decode."""

    def next_batch(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        """The next batch of the first model in arrival order that can run at all."""
        for model in _by_arrival(scheduler):
            batch = scheduler.prefill(model, lane, now) or scheduler.decode(model, lane)
            if batch is not None:
                return batch
        return None

    def is_steady(self) -> bool:
        """It remembers nothing of prefills."""
        return True


def _by_arrival(scheduler: Scheduler) -> list[str]:
    oldest = {
        name: queue.oldest_order for name, queue in scheduler.queues.items() if not queue.is_empty
    }
    return sorted(oldest, key=oldest.__getitem__)
