"""Least slack first: prompts by when their first token is due, decodes by when their next one is.

Three ideas, none of which needs to know how long an answer will be:

* A prompt is due `ttft_s` after it came; prompts start in that order (Jackson 1955: earliest due
  date), whatever their model, as many beside each other as there are lanes. Admission lets one
  start only where no decode misses its pace by it that could keep it (sched/admission.py).
* Whoever can no longer be in time steps behind those who can, as in Moore's algorithm for the
  fewest late jobs (1968): under overload first come first served makes everybody late. A model
  most of whose requests are late gives way to the others.
* Decodes go by pace: a sequence's next token is due `tpot_s` after its last one was.

Nobody starves. While late requests wait, one prefill in `LATE_TURN` + 1 is for the oldest of
them, and whoever may not start yet keeps its turn, so a request with n late ones before it is
next after (n + 1) * (LATE_TURN + 1) prefills at most. A model whose sequences could take a step
on an idle lane gets it after `PATIENCE` launches of others, plus one for every model that waits
as long.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from muxrt.config.placement import Slo
from muxrt.core import Batch, Sequence, SequenceState
from muxrt.errors import ConfigError
from muxrt.sched.admission import HOPELESS_TOKENS, ROUND_SHARE
from muxrt.sched.queues import ModelQueue, ServedModel
from muxrt.sched.rotation import Rotation
from muxrt.sched.scheduler import LATENESS_MARGIN, Scheduler

# Prefills between two of late requests: in lasting overload these take a ninth of the work, and
# so cost at most a ninth of what could be in time.
LATE_TURN = 8
# Twice the ratio of a lax and a tight TPOT target that share a unit (0.3 and 0.035 s): paces
# decide, this only bounds.
PATIENCE = 16


class LeastSlack:
    """Every model has targets. What a decode did is remembered per model, not per sequence."""

    # A lane that only just keeps the pace lets nobody catch up. Under the other policies late
    # requests block those behind them, so that starting them at that cost still pays.
    beside_share = ROUND_SHARE

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        """Raises ConfigError for a model without targets: nothing of it would ever be due."""
        self._slos = {name: _targets(model) for name, model in models.items()}
        self._recalled: Sequence | None = None  # late, and its turn lasts until it starts
        self._num_passed = 0  # prefills since the last one of a late request
        self._due_s: dict[str, float] = {}  # the next token, by model that decodes
        self._skipped = Counter[str]()  # launches since each of these had one
        self._num_members = -1  # changes of who runs, when `_due_s` was found
        self._is_prefilling = True

    def next_batch(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        """The prompts that are due first, where that costs nobody his pace; else a decode step."""
        self._keep_pace(scheduler, now)
        starved = [name for name in self._due_s if self._skipped[name] >= PATIENCE]
        batch = self._decode(scheduler, lane, starved) if starved else None
        batch = batch or self._prefill(scheduler, lane, now)
        batch = batch or self._decode(scheduler, lane, self._due_s)
        if batch is None and not scheduler.num_in_flight:
            return self._whoever_can(scheduler, lane, now)
        return batch

    def rotation(self, scheduler: Scheduler) -> Rotation | None:
        """One model that decodes is alone; several go by pace, which no rotation is."""
        decoding = tuple(name for name, queue in scheduler.queues.items() if queue.decoding)
        is_known = not self._is_prefilling and tuple(self._due_s) == decoding
        return Rotation(decoding) if is_known and len(decoding) == 1 else None

    def rotated(self, last: str) -> None:
        """Nobody else was skipped; paces are compared when another one comes, and then anew."""
        self._skip(last)

    # -- prompts -----------------------------------------------------------------------------

    def _prefill(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        """Prompts that can be in time, by when they are due; late ones in their turn."""
        self._recall(scheduler)
        due = []
        for name, queue in scheduler.queues.items():
            if not queue.is_waitless:
                self._step_behind(scheduler, queue, now)
                first = _first(scheduler, queue, lane)
                if first is not None:
                    due_s = first.request.arrived_s + self._slos[name].ttft_s
                    due.append((self._gives_way(queue, first), due_s, name))
        late = [queue for queue in scheduler.queues.values() if queue.late]
        if not due:
            return self._prefill_late(scheduler, late, lane, now)
        batch = self._first_that_may(scheduler, [name for _, _, name in sorted(due)], lane, now)
        if batch is not None and late:
            self._num_passed += 1
        return batch

    def _gives_way(self, queue: ModelQueue, first: Sequence) -> bool:
        """Its model asks for more than there is: most of its requests are late already.

        So a flood of one model makes the others' requests late only if those, too, are too many.
        """
        if first.slot is not None or first is self._recalled:
            return False
        return len(queue.late) > len(queue.waiting) + len(queue.running)

    def _prefill_late(
        self, scheduler: Scheduler, late: list[ModelQueue], lane: int, now: float
    ) -> Batch | None:
        """Nobody else waits: late requests, those of the oldest one's model first."""
        for queue in sorted(late, key=_oldest_late):
            queue.turn_around()
            may_start = queue.may_start
            batch = self._first_that_may(scheduler, [queue.name] * may_start, lane, now)
            queue.turn_around()
            if batch is not None:
                self._num_passed = 0
                return batch
        return None

    def _whoever_can(self, scheduler: Scheduler, lane: int, now: float) -> Batch | None:
        """Nothing runs and what should come next cannot: it may wait for blocks of the others."""
        for queue in scheduler.queues.values():
            if batch := scheduler.prefill(queue.name, lane, now):
                return batch
            queue.turn_around()
            batch = scheduler.prefill(queue.name, lane, now)
            queue.turn_around()
            if batch is not None:
                return batch
        return None

    def _first_that_may(
        self, scheduler: Scheduler, names: list[str], lane: int, now: float
    ) -> Batch | None:
        """A prefill of the first model that may have one.

        Who may not keeps its turn, or those behind it would use up the time that it waits for.
        Prompts under way go on, or nobody might.
        """
        is_held = False
        for name in names:
            if is_held and not scheduler.is_prefilling(name, lane):
                continue
            if not scheduler.may_prefill(name, lane, now):
                is_held = True
                continue
            batch = scheduler.prefill(name, lane, now)
            if batch is not None:
                self._skip(None)
                return batch
        return None

    def _recall(self, scheduler: Scheduler) -> None:
        """After enough others the oldest late request is next, until it has started."""
        held = self._recalled
        if held is not None and (held.slot is not None or held.state is SequenceState.FINISHED):
            self._recalled = held = None
        late = [queue for queue in scheduler.queues.values() if queue.late]
        if late and held is None and self._num_passed >= LATE_TURN:
            self._recalled = min(late, key=_oldest_late).recall()
            self._num_passed = 0

    def _step_behind(self, scheduler: Scheduler, queue: ModelQueue, now: float) -> None:
        """Those at the head of a queue whose first token cannot come in time.

        Blocks that are kept for it are not kept any longer: it would not come for them.
        """
        ttft_s = self._slos[queue.name].ttft_s
        while queue.waiting and queue.waiting[0] is not self._recalled:
            request = queue.waiting[0].request
            if now + LATENESS_MARGIN * scheduler.prompt_s(request) <= request.arrived_s + ttft_s:
                return
            queue.step_behind()
            scheduler.memory.disclaim(queue.name)

    # -- decode steps ------------------------------------------------------------------------

    def _decode(self, scheduler: Scheduler, lane: int, names: Iterable[str]) -> Batch | None:
        for name in sorted(names, key=self._due_s.__getitem__):
            batch = scheduler.decode(name, lane)
            if batch is not None:
                self._due_s[name] += self._slos[name].tpot_s
                self._skip(name)
                return batch
        return None

    def _skip(self, served: str | None) -> None:
        """A batch was launched: a decode step of `served`, or a prefill."""
        for name in self._due_s:
            self._skipped[name] = 0 if name == served else self._skipped[name] + 1

    def _keep_pace(self, scheduler: Scheduler, now: float) -> None:
        """Look at the sequences when others run than before; in between steps are counted.

        So that runs of steps in which nobody comes or goes can be folded (sim/folding.py).
        """
        num_members = sum([queue.num_changes for queue in scheduler.queues.values()])
        was_prefilling, is_prefilling = self._is_prefilling, scheduler.prefills_in_flight() > 0
        if num_members == self._num_members and not is_prefilling and not was_prefilling:
            return
        self._num_members, self._is_prefilling = num_members, is_prefilling
        self._due_s = {
            name: _next_token_s(queue, self._slos[name].tpot_s, now)
            for name, queue in scheduler.queues.items()
            if queue.decoding
        }
        self._skipped = Counter({name: self._skipped[name] for name in self._due_s})


def _targets(model: ServedModel) -> Slo:
    if model.slo is None:
        raise ConfigError(
            f"the policy slo needs targets: found none for {model.name}, expected"
            " slo: {ttft_s: ..., tpot_s: ...}"
        )
    return model.slo


def _oldest_late(queue: ModelQueue) -> int:
    return queue.late[0].order


def _first(scheduler: Scheduler, queue: ModelQueue, lane: int) -> Sequence | None:
    """Whose prompt a prefill of this model would begin with; None if none may."""
    if scheduler.is_prefilling(queue.name, lane):
        return queue.prefilling[0]
    return queue.head() if queue.may_start else None


def _next_token_s(queue: ModelQueue, tpot_s: float, now: float) -> float:
    """When the first of a model's sequences needs its next token to keep its pace.

    Who is hopelessly behind waits for nobody, but nobody waits for it.
    """
    hopeless_s = now - HOPELESS_TOKENS * tpot_s
    return min(
        (
            due_s
            for sequence in queue.decoding
            if sequence.first_token_s is not None
            and (due_s := sequence.first_token_s + tpot_s * sequence.outputs_scheduled) > hopeless_s
        ),
        default=now + tpot_s,
    )
