"""Puts models to sleep and wakes them: requests, blocks and work around `sched.residency`.

What the weights of a sleeping model leave of their budget becomes blocks at the end of the arena.
Nobody is entitled to those, so they can always be called back: before a model wakes they are
retired, the sequences on them are preempted, and its `Load` is launched when the last one is free.
"""

from collections import deque
from collections.abc import Callable, Iterator
from math import inf

from muxrt.core import FinishReason, Load, Output, Refusal, Request, Result, Sleep
from muxrt.errors import Unavailable
from muxrt.sched.residency import Event, Residency, Resident, State
from muxrt.sched.scheduler import Scheduler

RETRY_S = 1.0

Move = Load | Sleep
Entitle = Callable[[frozenset[str]], dict[str, int]]


class Mover:
    """Holds back requests for models that are not awake, and says what is to be launched."""

    def __init__(
        self, residency: Residency, scheduler: Scheduler, block_bytes: int, entitle: Entitle
    ) -> None:
        """`entitle` gives the quotas of all models where these are awake, or soon will be."""
        self.residency = residency
        self._scheduler = scheduler
        self._pool = scheduler.memory.pool
        self._block_bytes = block_bytes
        self._entitle = entitle
        self._first_spare = self._end = self._pool.num_blocks
        self._waiting: dict[str, deque[Request]] = {name: deque() for name in residency.models}
        self._extents: dict[str, tuple[int, int]] = {}  # of those that wake: blocks to be had first
        self._moving: set[str] = set()  # by a work that was launched
        self.num_moves = dict.fromkeys(residency.models, 0)  # that are done
        self._grow()

    # -- requests ----------------------------------------------------------------------------

    def hold(self, request: Request, now: float) -> bool:
        """Keep a request whose model is not awake, and wake it; False: it can be scheduled."""
        resident = self.residency.models[request.model]
        resident.used_s = now
        if resident.state is State.AWAKE:
            return False
        self._waiting[request.model].append(request)
        self.residency.want(request.model, now)
        return True

    def abort(self, request_id: int) -> bool:
        """Forget a request that waits here; False if none does."""
        for waiting in self._waiting.values():
            for request in waiting:
                if request.id == request_id:
                    waiting.remove(request)
                    return True
        return False

    def num_waiting(self, model: str) -> int:
        """Requests of a model that is not awake."""
        return len(self._waiting[model])

    def expire(self, now: float) -> list[Output]:
        """Refuse who has waited for too long."""
        outputs = []
        for name, waiting in self._waiting.items():
            late = [request for request in waiting if self._due_s(request) <= now]
            for request in late:
                waiting.remove(request)
                outputs.append(self._refuse(request, f"{name} did not wake in time", now))
        return outputs

    def _due_s(self, request: Request) -> float:
        patience_s = self.residency.models[request.model].habits.wake_timeout_s
        deadline_s = inf if request.deadline_s is None else request.deadline_s
        return min(request.arrived_s + patience_s, deadline_s)

    def _refuse(self, request: Request, why: str, now: float) -> Output:
        # Who waited for so long in vain will not have it in less.
        retry_after_s = max(RETRY_S, now - request.arrived_s)
        refusal = Refusal(Unavailable.status, Unavailable.kind, why, retry_after_s)
        return Output(request.id, finish=FinishReason.DEADLINE, refusal=refusal)

    # -- orders ------------------------------------------------------------------------------

    def used(self, model: str, now: float) -> None:
        """Something of the model was computed."""
        self.residency.models[model].used_s = now

    def wake(self, model: str, now: float) -> None:
        """It is to be awake, though nobody asks for it."""
        self.residency.want(model, now)

    def sleep(self, model: str, now: float) -> None:
        """It is to be asleep, whatever its residency; a wish that it wakes comes after that."""
        resident = self.residency.models[model]
        if resident.state is State.AWAKE and not resident.habits.pin:
            resident.on(Event.EVICTED, now)

    # -- moving ------------------------------------------------------------------------------

    def moves(self, now: float) -> Iterator[Move]:
        """What is to be launched now."""
        for resident in self.residency.decide(now, self._is_busy):
            if resident.state is State.WAKING:
                self._reserve(resident)
        self._scheduler.memory.vacate()
        for resident in self.residency.holding:
            if resident.name not in self._moving and self._may_move(resident):
                self._moving.add(resident.name)
                yield self._move(resident)

    def _may_move(self, resident: Resident) -> bool:
        if resident.state is State.DRAINING:
            return not self._is_busy(resident.name)
        return resident.state is State.WAKING and not self._pool.num_leaving

    def _move(self, resident: Resident) -> Move:
        number, lane = next(self._scheduler.work_ids), self._scheduler.limits.copy_lane
        name, num_bytes = resident.name, resident.habits.num_bytes
        if resident.state is State.DRAINING:
            return Sleep(number, lane, name, num_bytes, bool(self.residency.wanted))
        return Load(number, lane, name, num_bytes, *self._extents.pop(name))

    def _reserve(self, resident: Resident) -> None:
        """Take blocks out of the pool for the weights of one that wakes."""
        end = min(self._end, self._wanted_end())
        self._pool.retire(range(end, self._end))
        self._extents[resident.name] = (end, self._end)
        self._end = end
        self._set_quotas()

    def _wanted_end(self) -> int:
        """Where the arena ends if it has what weights leave of their budget."""
        return self._first_spare + self.residency.free_bytes // self._block_bytes

    def _grow(self) -> None:
        """What nobody's weights need becomes blocks."""
        end = self._wanted_end()
        is_free = not self._pool.num_leaving and not self.residency.wanted
        if is_free and end > self._end and self._scheduler.memory.may_borrow:
            self._pool.grow(range(self._end, end))
            self._end = end

    def _set_quotas(self) -> None:
        names = frozenset(resident.name for resident in self.residency.holding)
        for name, blocks in self._entitle(names).items():
            self._pool.accounts[name].quota = blocks

    def moved(self, work: Move, result: Result, now: float) -> list[Output]:
        """A work is done; the refusals that come of it."""
        resident = self.residency.models[work.model]
        self._moving.discard(work.model)
        self.num_moves[work.model] += 1
        outputs: list[Output] = []
        if isinstance(work, Sleep):
            resident.on(Event.SLEPT, now)
            self._set_quotas()
        elif result.error is not None:
            resident.on(Event.FAILED, now)
            self._set_quotas()
            waiting, self._waiting[work.model] = self._waiting[work.model], deque()
            why = f"{work.model} cannot wake: {result.error}"
            outputs = [self._refuse(request, why, now) for request in waiting]
        else:
            resident.on(Event.LOADED, now)
            waiting, self._waiting[work.model] = self._waiting[work.model], deque()
            for request in waiting:
                self._scheduler.add(request)
        self._grow()
        return outputs

    # -- time --------------------------------------------------------------------------------

    def _is_busy(self, model: str) -> bool:
        return not self._scheduler.queues[model].is_empty

    @property
    def is_idle(self) -> bool:
        """Nobody waits, nothing moves."""
        return not (self._moving or self._extents or any(self._waiting.values()))

    def next_s(self, now: float) -> float:
        """When there is something to do though nothing happens; inf: never."""
        due = [self._due_s(request) for waiting in self._waiting.values() for request in waiting]
        return min(self.residency.next_s(now, self._is_busy), *due, inf)

    def check(self) -> bool:
        """Blocks and weights do not add up to more than there is. Costs time: for tests."""
        self.residency.check()
        exist = self._pool.num_blocks - self._first_spare
        used_bytes = exist * self._block_bytes
        assert used_bytes <= max(0, self.residency.free_bytes), "blocks where weights lie"
        return True
