"""How a unit does under random arrivals: the estimator that judges drafts.

A unit is a prefill server and a decode server, on two lanes or in turns on one:

* Prefills wait as in M/G/1 (Pollaczek-Khinchine), in batches of the size that makes the wait
  shortest; the wait's tail is exponential with that mean. TTFT = wait + the batch's prefill.
* Decodes go round: each model's running batch takes one step per round, so a token takes the
  round. A model's batch is rate x output tokens x time per token (Little's law), which makes the
  round a fixed point; near saturation there is none, and the unit cannot keep up.
* KV: the sequences that run are Poisson in number; those that do not fit miss their TTFT.

An overloaded unit admits the share of its traffic that gives the most goodput and refuses the rest,
as its scheduler does. What is not modelled: bursts beyond Poisson, prefix reuse, preemption.
"""

from dataclasses import dataclass
from math import erf, exp, sqrt

from muxrt.cost.steps import Steps
from muxrt.planner.draft import Draft, Group, Part
from muxrt.planner.workload import Demand, Problem

GOOD = 0.95  # attainment from which on nothing is refused
LOADS = (0.85, 0.7, 0.55, 0.4, 0.25, 0.1)
LOAD_STEP, LOAD_PRECISION = 0.15, 0.02
MAX_ROUNDS, TOLERANCE = 40, 0.005
HOPELESS = 3.0  # times the target: no use in finding out how late exactly


@dataclass(frozen=True, slots=True)
class PartScore:
    """One model in one group; rates are requests/s, times are means of what is admitted."""

    model: str
    rate_rps: float
    admitted_rps: float
    attainment: float
    ttft_s: float
    tpot_s: float
    batch: float  # sequences that decode at the same time

    @property
    def goodput_rps(self) -> float:
        return self.admitted_rps * self.attainment


@dataclass(frozen=True, slots=True)
class GroupScore:
    """One group under its traffic."""

    parts: tuple[PartScore, ...]
    prefill_busy: float  # share of the time
    kv_bytes: float  # per GPU, used on average
    kv_capacity_bytes: float

    @property
    def goodput_rps(self) -> float:
        return sum(part.goodput_rps for part in self.parts)


@dataclass(frozen=True, slots=True)
class Score:
    """A whole draft."""

    groups: tuple[GroupScore, ...]

    @property
    def goodput_rps(self) -> float:
        return sum(group.goodput_rps for group in self.groups)


class QueueingJudge:
    """Scores drafts of one problem; groups that hold the same are computed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._kept: dict[tuple[object, ...], GroupScore] = {}

    def __call__(self, draft: Draft) -> Score:
        return Score(tuple(self.group(group) for group in draft))

    def group(self, group: Group) -> GroupScore:
        """The score of one group."""
        likes, demands = self.problem.likes, self.problem.demands
        rated = [(likes[p.model], demands[p.model].rate_rps * p.traffic, p) for p in group.parts]
        rated.sort(key=lambda item: item[:2])
        alike = tuple((like, f"{rate:.4g}") for like, rate, _ in rated)
        key = (group.pool, group.size, group.prefill_pct, alike)
        if key not in self._kept:
            self._kept[key] = score_group(self.problem, group)
        kept = self._kept[key]
        names = tuple(sorted(part.model for part in group.parts))
        if tuple(sorted(part.model for part in kept.parts)) == names:
            return kept
        return _renamed(kept, [part.model for _, _, part in rated], self.problem)


def _renamed(kept: GroupScore, models: list[str], problem: Problem) -> GroupScore:
    """The score of a group that is like the kept one but for the names."""
    order = sorted(kept.parts, key=lambda part: (problem.likes[part.model], part.rate_rps))
    parts = tuple(
        PartScore(m, p.rate_rps, p.admitted_rps, p.attainment, p.ttft_s, p.tpot_s, p.batch)
        for m, p in zip(models, order, strict=True)
    )
    return GroupScore(parts, kept.prefill_busy, kept.kv_bytes, kept.kv_capacity_bytes)


def score_group(problem: Problem, group: Group) -> GroupScore:
    """Goodput under SLO of one group, admitting as much of its traffic as serves it best."""
    unit = _Unit(problem, group)
    best = unit.at(1.0)
    if all(part.attainment >= GOOD for part in best.parts):
        return best
    best_load = 1.0
    for load in LOADS:
        if best.goodput_rps >= load * unit.offered_rps:
            break  # less traffic than what is already served well
        score = unit.at(load)
        if score.goodput_rps > best.goodput_rps:
            best, best_load = score, load
    step = LOAD_STEP
    while step > LOAD_PRECISION:
        step /= 2
        for load in (best_load + step, best_load - step):
            score = unit.at(load) if 0 < load <= 1 else best
            if score.goodput_rps > best.goodput_rps:
                best, best_load = score, load
                break
    return best


class _Served:
    """What the estimator needs of one model in one group."""

    def __init__(self, problem: Problem, group: Group, part: Part) -> None:
        self.demand: Demand = problem.demands[part.model]
        self.rate_rps = self.demand.rate_rps * part.traffic
        self.whole = problem.steps(part.model, group.pool, group.size, 1.0)
        self.control_s = problem.engine.control_s
        kv = problem.bytes(part.model, group.size).kv_per_token
        self.sequence_bytes = kv * self.demand.context
        spread = self.demand.output.variance / self.demand.output.mean**2
        self.square_bytes = self.sequence_bytes**2 * (1 + spread)
        budget = problem.engine.memory.prefill_tokens
        self.largest_batch = max(1, int(budget / self.demand.prompt.mean))
        split = group.prefill_pct is not None
        first = (group.prefill_pct or 100) / 100
        self.prefill = problem.steps(part.model, group.pool, group.size, first)
        rest = 1 - first if split else 1.0
        self.decode = problem.steps(part.model, group.pool, group.size, rest)

    def prefill_moments(self, batch: int, beside: float, slower: float) -> tuple[float, float]:
        """Mean and mean square of a prefill of `batch` prompts, when decodes run so often."""
        prompt = self.demand.prompt
        tokens, squares = batch * prompt.mean, batch * prompt.mean_square
        mean_s = _mix(self.prefill, self.whole, beside, slower, tokens, squares)
        longer_s = _mix(self.prefill, self.whole, beside, slower, 1.25 * tokens, 1.25 * squares)
        per_token_s = (longer_s - mean_s) / (0.25 * tokens)
        return mean_s, mean_s**2 + per_token_s**2 * batch * prompt.variance

    def decode_s(self, batch: float, beside: float, slower: float) -> float:
        """One step of `batch` sequences, when a prefill runs beside it so often."""
        context = batch * self.demand.context
        alone_s = self.whole.decode_s(batch, context)
        if beside and self.decode is not self.whole:
            shared_s = self.decode.decode_s(batch, context) * slower
            alone_s = beside * shared_s + (1 - beside) * alone_s
        return alone_s + self.control_s * batch


def _mix(
    shared: Steps, whole: Steps, beside: float, slower: float, tokens: float, squares: float
) -> float:
    alone_s = whole.prefill_s(tokens, squares)
    if shared is whole:
        return alone_s
    return beside * slower * shared.prefill_s(tokens, squares) + (1 - beside) * alone_s


@dataclass(frozen=True, slots=True)
class _Prefills:
    """How prefills do: the share of time they take, and the wait."""

    busy: float
    wait_s: float
    own_s: tuple[float, ...]
    work_squared: float  # sum over models of rate x mean square of a prefill


class _Unit:
    """One group at any load."""

    def __init__(self, problem: Problem, group: Group) -> None:
        self._served = [_Served(problem, group, part) for part in group.parts]
        self._split = group.prefill_pct is not None
        self._slower = 1 + problem.engine.interference if self._split else 1.0
        self._capacity = float(problem.kv_bytes(group.pool, group.size, group.models))
        self.offered_rps = sum(served.rate_rps for served in self._served)

    def at(self, load: float) -> GroupScore:
        """The score when `load` of the traffic is admitted."""
        rates = [served.rate_rps * load for served in self._served]
        beside = 1.0 if self._split else 0.0
        prefills = self._prefills(rates, beside)
        rounds = self._rounds(rates, prefills)
        if self._split and rounds is not None:  # decodes are not always there to be beside
            prefills = self._prefills(rates, 1 - exp(-sum(batch for _, batch in rounds)))
            rounds = self._rounds(rates, prefills)
        if rounds is None or prefills.busy >= 1:
            return self._nothing()
        return self._score(rates, prefills, rounds)

    def _prefills(self, rates: list[float], beside: float) -> _Prefills:
        best: _Prefills | None = None
        size = 1
        largest = max(served.largest_batch for served in self._served)
        while size <= largest or best is None:
            found = self._prefills_of(rates, beside, size)
            if best is None or _mean_ttft(found) < _mean_ttft(best):
                best = found
            elif best.busy < 1:
                break
            size *= 2
        return best

    def _prefills_of(self, rates: list[float], beside: float, size: int) -> _Prefills:
        busy = work = residual_s = 0.0
        own = []
        for served, rate in zip(self._served, rates, strict=True):
            batch = min(size, served.largest_batch)
            mean_s, square = served.prefill_moments(batch, beside, self._slower)
            busy += rate / batch * mean_s
            residual_s += rate / batch * square / 2
            work += rate / batch * square
            own.append(mean_s)
        wait_s = residual_s / (1 - busy) if busy < 1 else float("inf")
        return _Prefills(busy, wait_s, tuple(own), work)

    def _rounds(self, rates: list[float], prefills: _Prefills) -> list[tuple[float, float]] | None:
        """(time per token, sequences that run) of each model; None where they pile up."""
        if prefills.busy >= 1:
            return None
        left = 1.0 if self._split else 1 - prefills.busy
        beside = prefills.busy if self._split else 0.0
        batches = [0.0] * len(rates)
        times = [0.0] * len(rates)
        for _ in range(MAX_ROUNDS):
            present = [1 - exp(-batch) for batch in batches]
            steps = [
                served.decode_s(batch / there if there > 1e-9 else 1.0, beside, self._slower) / left
                for served, batch, there in zip(self._served, batches, present, strict=True)
            ]
            round_s = sum(there * step for there, step in zip(present, steps, strict=True))
            before, times = (
                times,
                [round_s + (1 - there) * step for there, step in zip(present, steps, strict=True)],
            )
            if self._is_hopeless(times):
                return None
            batches = [
                rate * served.demand.output.mean * time
                for served, rate, time in zip(self._served, rates, times, strict=True)
            ]
            if all(abs(b - t) <= TOLERANCE * t for b, t in zip(before, times, strict=True)):
                break
        return list(zip(times, batches, strict=True))

    def _is_hopeless(self, times: list[float]) -> bool:
        return all(
            time > HOPELESS * served.demand.slo.tpot_s
            for served, time in zip(self._served, times, strict=True)
        )

    def _score(
        self, rates: list[float], prefills: _Prefills, rounds: list[tuple[float, float]]
    ) -> GroupScore:
        used, fit = self._memory([batch for _, batch in rounds])
        spread = self._spread(prefills, [batch for _, batch in rounds])
        longest_step_s = 0.0 if self._split else max(time for time, _ in rounds)
        parts = []
        for index, (served, rate, (tpot_s, batch)) in enumerate(
            zip(self._served, rates, rounds, strict=True)
        ):
            demand = served.demand
            own_s = prefills.own_s[index] + longest_step_s / 2
            on_time = _below(demand.slo.ttft_s - own_s, prefills)
            noise = spread**2
            if not self._split:  # prefills come in between, more or fewer of them
                noise += prefills.work_squared * tpot_s / demand.output.mean / (1 - prefills.busy)
            fast = _normal((demand.slo.tpot_s - tpot_s) / max(sqrt(noise), 1e-6))
            parts.append(
                PartScore(
                    demand.model,
                    served.rate_rps,
                    rate,
                    on_time * fast * fit,
                    prefills.wait_s + own_s,
                    tpot_s,
                    batch,
                )
            )
        return GroupScore(tuple(parts), prefills.busy, used, self._capacity)

    def _memory(self, batches: list[float]) -> tuple[float, float]:
        """Bytes used on average, and the share of the time in which all fit."""
        pairs = list(zip(self._served, batches, strict=True))
        used = sum(served.sequence_bytes * batch for served, batch in pairs)
        spread = sqrt(sum(served.square_bytes * batch for served, batch in pairs))
        return used, _normal((self._capacity - used) / max(spread, 1.0))

    def _spread(self, prefills: _Prefills, batches: list[float]) -> float:
        """Standard deviation of a request's time per token: its companions come and go."""
        left = 1.0 if self._split else 1 - prefills.busy
        beside = prefills.busy if self._split else 0.0
        total = 0.0
        for served, batch in zip(self._served, batches, strict=True):
            more_s = served.decode_s(batch + sqrt(batch) + 1e-9, beside, self._slower)
            total += ((more_s - served.decode_s(batch, beside, self._slower)) / left) ** 2
        # A request lives about as long as its companions: half of their variance averages out.
        return sqrt(total / 2)

    def _nothing(self) -> GroupScore:
        parts = tuple(
            PartScore(s.demand.model, s.rate_rps, 0.0, 0.0, float("inf"), float("inf"), 0.0)
            for s in self._served
        )
        return GroupScore(parts, 1.0, 0.0, self._capacity)


def _mean_ttft(prefills: _Prefills) -> float:
    return prefills.wait_s + max(prefills.own_s)


def _below(slack_s: float, prefills: _Prefills) -> float:
    """The probability that the wait is within `slack_s`."""
    if slack_s < 0:
        return 0.0
    if prefills.wait_s <= 0:
        return 1.0
    return 1 - prefills.busy * exp(-slack_s * prefills.busy / prefills.wait_s)


def _normal(deviations: float) -> float:
    """The standard normal distribution function."""
    return (1 + erf(deviations / sqrt(2))) / 2
