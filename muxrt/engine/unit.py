"""The LLM unit: one scheduler, one executor, and the loop between them."""

from collections.abc import Callable, Mapping

from muxrt.core import FinishReason, Output, Refusal, Request, Result, Work
from muxrt.engine.executor import Executor
from muxrt.engine.messages import Extend, ModelStats, Stats
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
    ) -> None:
        self.name = name
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
        now = self.now()
        self._send(self.scheduler.commit(work, result, now) + self.scheduler.expire(now))
        self._note_peaks()
        self.pump()

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
        if self.scheduler.abort(request_id):
            self.pump()

    def drain(self) -> None:
        """Take nothing new from now on; what is here finishes."""
        self._is_draining = True

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

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
        if self.is_idle:
            return None
        times = [self.scheduler.deadlines.next_s(), self.scheduler.transfers.next_s()]
        if self._quota_period_s:
            times.append(self._next_adapt_s)
        return min((time for time in times if time is not None), default=None)

    def tick(self) -> None:
        """Refuse what is too late, move quotas, and see whether that lets work start."""
        self._send(self.scheduler.expire(self.now()))
        self.adapt_quotas()
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
            waiting=queue.num_waiting,
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
        )

    def _send(self, outputs: list[Output]) -> None:
        if outputs:
            self._emit(tuple(outputs))

    def check(self) -> bool:
        """All accounts of the unit add up. Costs time: for tests."""
        return self.scheduler.check()
