"""The LLM unit: one scheduler, one executor, and the loop between them."""

from collections.abc import Callable, Mapping
from math import inf

from muxrt.core import FinishReason, Load, Output, Refusal, Request, Result, Sleep, Work
from muxrt.engine.executor import Executor
from muxrt.engine.messages import Extend, ModelStats, Stats
from muxrt.engine.mover import Mover
from muxrt.errors import BadRequest, MuxrtError, Unavailable, UnknownModel
from muxrt.sched.memory import Preempt
from muxrt.sched.quota import Usage, adapt
from muxrt.sched.scheduler import Scheduler

Emit = Callable[[tuple[Output, ...]], None]


class Unit:
    """The brain of one unit. Everything happens on one thread; nothing blocks, nothing sleeps.

    `now` is a monotonic clock in seconds (virtual in the simulator). `emit` gets the outputs of
    each step, all sequences together, and never an empty tuple.
    """

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        executor: Executor,
        now: Callable[[], float],
        emit: Emit,
        quota_period_s: float,
        mover: Mover | None = None,
    ) -> None:
        """`mover` puts models to sleep and wakes them; None: all are always awake."""
        self.name = name
        self.mover = mover
        self.scheduler = scheduler
        self.executor = executor
        self.now = now
        self._emit = emit
        self._quota_period_s = quota_period_s
        self._next_adapt_s = now() + quota_period_s
        self._peak_blocks = dict.fromkeys(scheduler.queues, 0)
        self._is_draining = False

    # -- the hot loop ------------------------------------------------------------------------

    def pump(self) -> None:
        """Launch every piece of work that fits now."""
        while (work := self.scheduler.schedule(self.now())) is not None:
            self.executor.launch(work, self._done)

    def _done(self, work: Work, result: Result) -> None:
        assert not isinstance(work, Load | Sleep), "they are done in `_moved`"
        now = self.now()
        self._send(self.scheduler.commit(work, result, now) + self.scheduler.expire(now))
        self._note_peaks()
        if self.mover is not None:
            self.mover.used(work.model, now)
            self._move_models(self.mover)
        self.pump()

    # -- models that sleep -------------------------------------------------------------------

    def _move_models(self, mover: Mover) -> None:
        """Launch what lets models fall asleep and wake."""
        for move in mover.moves(self.now()):
            self.executor.launch(move, self._moved)

    def _moved(self, work: Work, result: Result) -> None:
        assert self.mover is not None and isinstance(work, Load | Sleep)
        self._send(self.mover.moved(work, result, self.now()))
        self._move_models(self.mover)
        self.pump()

    def set_awake(self, model: str, is_awake: bool) -> None:
        """Wake a model, or put it to sleep once what it runs is done; where models can sleep."""
        if self.mover is None or model not in self.scheduler.queues:
            return
        change = self.mover.wake if is_awake else self.mover.sleep
        change(model, self.now())
        self._move_models(self.mover)
        self.pump()

    def forget(self, model: str) -> None:
        """Nobody will ask for a model again: it sleeps as soon as it is idle, and for good."""
        if self.mover is None or model not in self.scheduler.queues:
            return
        self.mover.residency.models[model].leave()
        self._move_models(self.mover)
        self.pump()

    def state_of(self, model: str) -> str:
        """Whether the model is awake (`sched.residency.State`)."""
        return "awake" if self.mover is None else self.mover.residency.models[model].state.value

    # -- requests ----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a request, or refuse it with an output that says why."""
        try:
            self._admit(request)
        except MuxrtError as error:
            refusal = Refusal(error.status, error.kind, error.message, error.retry_after_s)
            end = FinishReason.ERROR
            self._send([Output(request.id, finish=end, refusal=refusal, attempt=request.attempt)])
            return
        if self.mover is not None and self.mover.hold(request, self.now()):
            self._move_models(self.mover)
        else:
            self.scheduler.add(request)
        self._send(self.scheduler.expire(self.now()))
        self.pump()

    def extend(self, more: Extend) -> None:
        """More of a sequence that comes from another unit is there; who wants it no more, left."""
        order = (more.request_id, more.piece, more.payload, more.num_outputs)
        if self.scheduler.transfers.extend(*order):
            self.pump()

    def abort(self, request_id: int) -> None:
        """The client left: free everything of the request. Unknown ids are late, not wrong."""
        if self.mover is not None and self.mover.abort(request_id):
            return
        if self.scheduler.abort(request_id):
            if self.mover is not None:
                self._move_models(self.mover)
            self.pump()

    def drain(self) -> None:
        """Take nothing new from now on; what is here finishes."""
        self._is_draining = True

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle and (self.mover is None or self.mover.is_idle)

    def _admit(self, request: Request) -> None:
        if self._is_draining:
            raise Unavailable(f"unit {self.name} is draining", retry_after_s=1.0)
        queue = self.scheduler.queues.get(request.model)
        if queue is None:
            raise UnknownModel(f"unit {self.name} does not serve the model {request.model}")
        total = request.prompt_tokens + request.max_tokens
        if request.prompt_tokens < 1 or request.max_tokens < 0:
            raise BadRequest(f"a request needs at least one prompt token: {request.prompt_tokens}")
        if total > queue.model.max_model_len:
            raise BadRequest(
                f"{request.prompt_tokens} prompt tokens + {request.max_tokens} output tokens exceed"
                f" the {queue.model.max_model_len} tokens that {request.model} can hold"
            )

    # -- time --------------------------------------------------------------------------------

    def next_timer(self) -> float | None:
        """When `tick` has something to do, on the clock of `now`; None while nothing waits."""
        times: list[float | None] = []
        if self.mover is not None:
            times.append(self.mover.next_s(self.now()))
        if not self.scheduler.is_idle:
            times += [self.scheduler.deadlines.next_s(), self.scheduler.transfers.next_s()]
            if self._quota_period_s:
                times.append(self._next_adapt_s)
        return min((time for time in times if time is not None and time < inf), default=None)

    def tick(self) -> None:
        """Refuse what is too late, move quotas, and see whether that lets work start."""
        self._send(self.scheduler.expire(self.now()))
        self.adapt_quotas()
        if self.mover is not None:
            self._send(self.mover.expire(self.now()))
            self._move_models(self.mover)
        self.pump()

    def adapt_quotas(self) -> None:
        """Move quotas, if it is time."""
        if not self._quota_period_s or self.now() < self._next_adapt_s:
            return
        pool = self.scheduler.memory.pool
        for name, blocks in adapt({n: self._usage(n) for n in self.scheduler.queues}).items():
            pool.accounts[name].quota = blocks
            self._peak_blocks[name] = pool.accounts[name].used
        self._next_adapt_s = self.now() + self._quota_period_s

    def _usage(self, model: str) -> Usage:
        queue, memory = self.scheduler.queues[model], self.scheduler.memory
        wanted = sum(
            memory.need(sequence) for sequence in (*queue.preempted, *queue.waiting, *queue.late)
        )
        quota = memory.pool.accounts[model].quota
        return Usage(quota, queue.model.floor_blocks, self._peak_blocks[model], wanted)

    def _note_peaks(self) -> None:
        for name, account in self.scheduler.memory.pool.accounts.items():
            if account.used > self._peak_blocks[name]:
                self._peak_blocks[name] = account.used

    def held(self, blocks: Mapping[str, int]) -> None:
        """Models held so many blocks at once, though nobody looked: `_note_peaks` for a run."""
        for name, used in blocks.items():
            self._peak_blocks[name] = max(self._peak_blocks[name], used)

    # -- reports -----------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Gauges and counters of every model of the unit."""
        pool = self.scheduler.memory.pool
        models = tuple(self._model_stats(name) for name in self.scheduler.queues)
        return Stats(self.name, pool.num_blocks, pool.num_free, models)

    def _model_stats(self, name: str) -> ModelStats:
        queue, counters = self.scheduler.queues[name], self.scheduler.counters[name]
        memory = self.scheduler.memory
        account = memory.pool.accounts[name]
        return ModelStats(
            model=name,
            waiting=queue.num_waiting + (self.mover.num_waiting(name) if self.mover else 0),
            running=len(queue.running),
            preempted=len(queue.preempted),
            blocks_used=account.used,
            blocks_cached=account.cached,
            blocks_quota=account.quota,
            blocks_borrowed=account.borrowed,
            preemptions_swap=memory.num_preempted.get((name, Preempt.SWAP), 0),
            preemptions_recompute=memory.num_preempted.get((name, Preempt.RECOMPUTE), 0),
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            refused=counters.refused,
            state=self.state_of(name),
            moves=self.mover.num_moves[name] if self.mover else 0,
        )

    def _send(self, outputs: list[Output]) -> None:
        if outputs:
            self._emit(tuple(outputs))

    def check(self) -> bool:
        """All accounts of the unit add up. Costs time: for tests."""
        return self.scheduler.check() and (self.mover is None or self.mover.check())
