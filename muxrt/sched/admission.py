"""Who may start without costing those that run their time per output token (TPOT).

A prefill costs running sequences twice: they wait while it runs, and from then on every decode
step is longer. So a sequence starts only where

* the decode steps of all models, newcomers included, still come round within the tightest TPOT
  target, by the latency the unit has measured, and
* the prefill ends before anybody falls behind its pace. A sequence that was faster than its
  target has time to spare; a new one has not. What does not fit whole goes in chunks.

Who may not start waits, and at its deadline it is refused. Models without an SLO are held back for
the others' sake, but nobody for theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from muxrt.cost.latency import BatchShape, Latency, attention_work
from muxrt.sched.queues import ModelQueue

ROUND_SHARE = 0.9  # of the tightest TPOT target that the decode steps of all models may take
STEPS = 8  # in which a prefill's token budget is lowered until it fits the time
NEVER = -1  # a version that no queue has
HOPELESS_TOKENS = 10  # who is further behind its pace than this is not waited for


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a prefill may have now."""

    tokens: int  # 0 = nothing
    sequences: int  # that may start


@dataclass(frozen=True, slots=True)
class Need:
    """The prompt that comes next."""

    tokens: int  # still to be computed
    deadline_s: float | None  # of its first token


@dataclass(frozen=True, slots=True)
class _Load:
    """What the sequences of one model ask of the unit."""

    version: int  # of the queue when this was computed
    step_s: float = 0.0  # a decode step of all of them
    joining_s: float = 0.0  # what one more adds to it
    target_s: float = inf  # the model's TPOT target, if it can be met at all
    behind_at_s: float = inf  # when the first of them falls behind its pace


@dataclass(frozen=True, slots=True)
class _UnitLoad:
    """The loads of all models that run, together."""

    version: int
    step_s: float = 0.0  # a decode step of every model
    longest_s: float = 0.0  # the longest of them
    target_s: float = inf
    behind_at_s: float = inf

    def round_s(self, num_lanes: int) -> float:
        """Seconds until every model had a decode step, on that many lanes."""
        return max(self.step_s / num_lanes, self.longest_s)


class Admission:
    """Asked before a prefill starts. Keeps no state of its own but what it has computed."""

    def __init__(
        self,
        queues: Mapping[str, ModelQueue],
        latency: Latency,
        num_lanes: int,
        prefill_tokens: int,
        beside_share: float = 1.0,
    ) -> None:
        """`beside_share`: of the tightest TPOT target that the decode steps of all models may take
        on the lanes that a prefill leaves to them, or it has to end before somebody is behind.
        """
        self._queues = queues
        self._latency = latency
        self._num_lanes = num_lanes
        self._beside_share = beside_share
        self._full = Allowance(prefill_tokens, sum(q.model.max_sequences for q in queues.values()))
        self._has_targets = any(queue.model.slo for queue in queues.values())
        self._loads = {name: _Load(NEVER) for name in queues}
        self._unit = _UnitLoad(NEVER)

    def allowance(self, model: str, need: Need, now: float) -> Allowance:
        """What a prefill of `model` may have now; no tokens if it could not have what it needs."""
        if not self._has_targets:
            return self._full
        unit, joining = self._unit_load(now), self._load(self._queues[model], now)
        target_s = min(unit.target_s, joining.target_s)
        if not unit.step_s or target_s == inf:
            return self._full
        spare_s = max(0.0, ROUND_SHARE * target_s - unit.round_s(self._num_lanes))
        sequences = self._full.sequences
        if spare_s * self._num_lanes < sequences * joining.joining_s:
            sequences = int(spare_s * self._num_lanes / joining.joining_s)
        seconds = self._seconds(unit, target_s, now)
        return Allowance(self._tokens(model, need, seconds, now), sequences)

    def _seconds(self, unit: _UnitLoad, target_s: float, now: float) -> float:
        """How long a prefill may take before somebody falls behind."""
        others = self._num_lanes - 1
        round_s = unit.round_s(max(1, others))
        if others and round_s <= self._beside_share * target_s:
            return inf  # the other lanes keep the pace meanwhile
        # What they cannot keep is lost. Between the two bounds nothing is, but who is behind would
        # stay so: a prompt waits unless nobody would fall behind even if nobody decoded meanwhile.
        loss = 1 - target_s / round_s if others and round_s > target_s else 1.0
        return (unit.behind_at_s - now - round_s) / loss

    def _tokens(self, model: str, need: Need, seconds: float, now: float) -> int:
        """The largest prefill that takes at most `seconds`; 0 if not even the next prompt does.

        Nor is it so large that the next prompt would be late because of those behind it.
        """
        tokens = self._full.tokens
        needed = min(tokens, need.tokens)
        if self._prefill_s(model, needed) > seconds:
            return 0
        if need.deadline_s is not None:
            seconds = min(seconds, need.deadline_s - now)
        step = -(-tokens // STEPS)
        while tokens > needed and self._prefill_s(model, tokens) > seconds:
            tokens = max(needed, tokens - step)
        return tokens

    def _prefill_s(self, model: str, tokens: int) -> float:
        shape = BatchShape(tokens, attention_work(0, tokens))
        return self._latency.predict(model, shape) or 0.0

    def _unit_load(self, now: float) -> _UnitLoad:
        version = sum([queue.version for queue in self._queues.values()])
        if self._unit.version != version:
            loads = [self._load(queue, now) for queue in self._queues.values() if queue.running]
            self._unit = _UnitLoad(
                version,
                sum(load.step_s for load in loads),
                max((load.step_s for load in loads), default=0.0),
                min((load.target_s for load in loads), default=inf),
                min((load.behind_at_s for load in loads), default=inf),
            )
        return self._unit

    def _load(self, queue: ModelQueue, now: float) -> _Load:
        load = self._loads[queue.name]
        if load.version != queue.version:
            load = self._loads[queue.name] = self._find_load(queue, now)
        return load

    def _find_load(self, queue: ModelQueue, now: float) -> _Load:
        name, num_running = queue.name, len(queue.running)
        context = sum(sequence.num_scheduled for sequence in queue.running)
        mean = context // num_running if num_running else 0
        step_s = self._latency.predict(name, BatchShape(num_running, context))
        more_s = self._latency.predict(name, BatchShape(num_running + 1, context + mean))
        alone_s = self._latency.predict(name, BatchShape(1, mean))
        if step_s is None or more_s is None or alone_s is None:
            return _Load(queue.version)
        joining_s = more_s - (step_s if num_running else 0.0)
        slo = queue.model.slo
        # A target that one sequence alone would miss binds nobody.
        if slo is None or alone_s > ROUND_SHARE * slo.tpot_s:
            return _Load(queue.version, step_s, joining_s)
        behind_at_s = _behind_at_s(queue, slo.tpot_s, now)
        return _Load(queue.version, step_s, joining_s, slo.tpot_s, behind_at_s)


def _behind_at_s(queue: ModelQueue, tpot_s: float, now: float) -> float:
    """When the first sequence that can still keep its pace falls behind it."""
    hopeless_s = now - HOPELESS_TOKENS * tpot_s
    return min(
        (
            behind_at_s
            for sequence in queue.decoding
            if sequence.first_token_s is not None
            and (behind_at_s := sequence.first_token_s + tpot_s * sequence.outputs_committed)
            > hopeless_s
        ),
        default=inf,
    )
