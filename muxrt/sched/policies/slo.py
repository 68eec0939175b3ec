"""Least slack first: prompts by the deadline of their first token, decodes by their pace."""

from dataclasses import dataclass
from math import inf

from muxrt.core import Batch
from muxrt.cost.latency import BatchShape, attention_work
from muxrt.sched.policies.reservation import Reservation
from muxrt.sched.queues import ModelQueue
from muxrt.sched.scheduler import Scheduler

LATE_TURN = 8  # prefill batches of which one goes to a request whose first token is late anyway
LATENESS_MARGIN = 2.0


class LeastSlack:
    def __init__(self, quota_period_s: float) -> None:
        self._reservation = Reservation(quota_period_s)
        self._passed = 0  # prefills since one of a late request
        self._due_s: dict[str, float] = {}
        self._members = -1
        self._saw_prefills = True

    def next_batch(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        self._reservation.lapse(scheduler, now)
        self._pace(scheduler, now)
        batch = self._prefill(scheduler, lane, now)
        return batch or self._decode(scheduler, lane)

    def is_steady(self) -> bool:
        return not self._reservation.is_held and not self._saw_prefills

    # -- prefills

    def _prefill(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        asking = []
        late = []
        for name, queue in scheduler.queues.items():
            if queue.is_waitless:
                continue
            self._step_behind(scheduler, queue, now)
            first = self._first(scheduler, queue, lane)
            if first is not None:
                asking.append((first, name))
            if queue.late:
                late.append((queue.late[0].order, name))
        asking.sort()
        late.sort()
        if late and (self._passed >= LATE_TURN or not asking):
            for _, name in late if not asking else late[:1]:
                batch = self._prefill_late(scheduler, name, lane, now)
                if batch is not None:
                    self._passed = 0
                    return batch
        is_held = False
        for _, name in asking:
            if is_held and not scheduler.is_prefilling(name, lane):
                continue
            if not scheduler.may_prefill(name, lane, now):
                is_held = True
                continue
            batch = scheduler.prefill(name, lane, now)
            if batch is not None:
                self._passed += bool(late)
                self._reservation.drop(name)
                return batch
            self._reservation.make(scheduler, name, now)
        return None

    def _prefill_late(self, scheduler, name, lane, now):
        queue = scheduler.queues[name]
        swapped = not queue.waiting
        if swapped:
            queue.waiting, queue.late = queue.late, queue.waiting
        else:
            queue.waiting.appendleft(queue.late.popleft())
        batch = None
        if scheduler.may_prefill(name, lane, now):
            batch = scheduler.prefill(name, lane, now)
            if batch is None:
                self._reservation.make(scheduler, name, now)
            else:
                self._reservation.drop(name)
        if swapped:
            queue.waiting, queue.late = queue.late, queue.waiting
        elif batch is None:
            queue.late.appendleft(queue.waiting.popleft())
        return batch

    def _first(self, scheduler, queue: ModelQueue, lane: int) -> float | None:
        """Deadline of the prompt that is next."""
        ttft = queue.model.slo.ttft_s
        arrived = [s.request.arrived_s for s in queue.prefilling[:1] if scheduler.is_prefilling(queue.name, lane)]
        if queue.preempted:
            if queue.may_start:
                arrived.append(queue.preempted[0].request.arrived_s)
        elif queue.waiting and queue.may_start:
            arrived.append(queue.waiting[0].request.arrived_s)
        return min(arrived) + ttft if arrived else None

    def _step_behind(self, scheduler, queue: ModelQueue, now: float) -> None:
        ttft = queue.model.slo.ttft_s
        while queue.waiting:
            request = queue.waiting[0].request
            tokens = request.prompt_tokens
            shape = BatchShape(tokens, attention_work(0, tokens))
            seconds = scheduler.latency.predict(queue.name, shape) or 0.0
            if now + LATENESS_MARGIN * seconds <= request.arrived_s + ttft:
                return
            queue.late.append(queue.waiting.popleft())

    # -- decodes

    def _pace(self, scheduler: Scheduler, now: float) -> None:
        members = sum([queue.members for queue in scheduler.queues.values()])
        is_prefilling = scheduler.prefills_in_flight() > 0
        if members == self._members and not is_prefilling and not self._saw_prefills:
            return
        self._members, self._saw_prefills = members, is_prefilling
        self._due_s = {
            name: _due_s(queue, now) for name, queue in scheduler.queues.items() if queue.decoding
        }

    def _decode(self, scheduler: Scheduler, lane: int) -> Batch | None:
        for name in sorted(self._due_s, key=self._due_s.__getitem__):
            batch = scheduler.decode(name, lane)
            if batch is not None:
                self._due_s[name] += scheduler.queues[name].model.slo.tpot_s
                return batch
        return None


def _due_s(queue: ModelQueue, now: float) -> float:
    pace_s = queue.model.slo.tpot_s
    hopeless_s = now - 10 * pace_s
    return min(
        (
            due
            for s in queue.decoding
            if s.first_token_s is not None
            and (due := s.first_token_s + pace_s * s.outputs_scheduled) > hopeless_s
        ),
        default=now + pace_s,
    )
