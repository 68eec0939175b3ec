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

from muxrt.planner.draft import Draft, Group
from muxrt.planner.tables import Table, Tables
from muxrt.planner.workload import Problem

GOOD = 0.95  # attainment from which on nothing is refused
LOADS = (0.85, 0.7, 0.55, 0.4, 0.25, 0.1)
LOAD_STEP, LOAD_PRECISION = 0.15, 0.02
MAX_ROUNDS, TOLERANCE = 40, 0.005
# Decodes of this many sequences, on average, are as good as always there.
ALWAYS_THERE = 4.0
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

    def __init__(self, problem: Problem, tables: Tables | None = None) -> None:
        """`tables` may be those of the same problem at other rates."""
        self.problem = problem
        self.tables = tables or Tables(problem)
        self._kept: dict[tuple[object, ...], GroupScore] = {}

    def __call__(self, draft: Draft) -> Score:
        return Score(tuple(self.group(group) for group in draft))

    def scaled(self, factors: dict[str, float]) -> "QueueingJudge":
        """A judge of the same problem with rates multiplied."""
        return QueueingJudge(self.problem.scaled(factors), self.tables)

    def group(self, group: Group) -> GroupScore:
        """The score of one group."""
        likes, demands = self.problem.likes, self.problem.demands
        rated = sorted(
            (likes[part.model], demands[part.model].rate_rps * part.traffic, part.model)
            for part in group.parts
        )
        alike = tuple((like, f"{rate:.4g}") for like, rate, _ in rated)
        key = (group.pool, group.size, group.prefill_pct, alike)
        names = [model for _, _, model in rated]
        if key not in self._kept:
            self._kept[key] = self._fresh(group, names, [rate for _, rate, _ in rated])
        kept = self._kept[key]
        return kept if [part.model for part in kept.parts] == names else _renamed(kept, names)

    def at_rate(self, group: Group, rate_rps: float) -> GroupScore:
        """The score of a group of one model at some other rate."""
        return self._fresh(group, [group.parts[0].model], [rate_rps])

    def _fresh(self, group: Group, names: list[str], rates: list[float]) -> GroupScore:
        """Goodput under SLO, admitting as much of the traffic as serves it best."""
        mesh = (group.pool, group.size)
        tables = [self.tables.of(name, mesh, group.prefill_pct) for name in names]
        capacity = float(self.problem.kv_bytes(*mesh, tuple(names)))
        return _best_load(_Unit(names, tables, rates, group.prefill_pct is not None, capacity))


def _renamed(kept: GroupScore, names: list[str]) -> GroupScore:
    """The score of a group that is like the kept one but for the names."""
    parts = tuple(
        PartScore(m, p.rate_rps, p.admitted_rps, p.attainment, p.ttft_s, p.tpot_s, p.batch)
        for m, p in zip(names, kept.parts, strict=True)
    )
    return GroupScore(parts, kept.prefill_busy, kept.kv_bytes, kept.kv_capacity_bytes)


def _best_load(unit: "_Unit") -> GroupScore:
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


@dataclass(frozen=True, slots=True)
class _Prefills:
    """How prefills do: the share of time they take, and the wait."""

    busy: float
    wait_s: float
    own_s: tuple[float, ...]
    work_squared: float  # sum over models of rate x mean square of a prefill


_Rounds = list[tuple[float, float]]  # per model: time per token, sequences that run


class _Unit:
    """One group at any load."""

    def __init__(
        self,
        names: list[str],
        tables: list[Table],
        rates: list[float],
        is_split: bool,
        capacity_bytes: float,
    ) -> None:
        self._names = names
        self._tables = tables
        self._rates = rates
        self._split = is_split
        self._capacity = capacity_bytes
        self._most_prompts = max(len(table.prefills) for table in tables)
        self.offered_rps = sum(rates)

    def at(self, load: float) -> GroupScore:
        """The score when `load` of the traffic is admitted."""
        rates = [rate * load for rate in self._rates]
        prefills = self._prefills(rates, 1.0 if self._split else 0.0)
        rounds = self._rounds(rates, prefills)
        running = sum(batch for _, batch in rounds) if rounds else 0.0
        if self._split and rounds and running < ALWAYS_THERE:  # often nothing is beside a prefill
            prefills = self._prefills(rates, 1 - exp(-running))
            rounds = self._rounds(rates, prefills)
        if rounds is None or prefills.busy >= 1:
            return self._nothing()
        return self._score(rates, prefills, rounds)

    def _prefills(self, rates: list[float], beside: float) -> _Prefills:
        """Prefills in batches of the size that makes the mean TTFT shortest."""
        best = self._prefills_of(rates, beside, 0)
        for size in range(1, self._most_prompts):
            found = self._prefills_of(rates, beside, size)
            if _mean_ttft(found) < _mean_ttft(best):
                best = found
            elif best.busy < 1:
                break
        return best

    def _prefills_of(self, rates: list[float], beside: float, size: int) -> _Prefills:
        busy = work = residual_s = 0.0
        own = []
        for table, rate in zip(self._tables, rates, strict=True):
            times = table.prefills[min(size, len(table.prefills) - 1)]
            mean_s, square = times.moments(beside, table.demand.prompt.variance)
            busy += rate / times.batch * mean_s
            residual_s += rate / times.batch * square / 2
            work += rate / times.batch * square
            own.append(mean_s)
        wait_s = residual_s / (1 - busy) if busy < 1 else float("inf")
        return _Prefills(busy, wait_s, tuple(own), work)

    def _rounds(self, rates: list[float], prefills: _Prefills) -> _Rounds | None:
        """None where sequences pile up."""
        if prefills.busy >= 1:
            return None
        left = 1.0 if self._split else 1 - prefills.busy
        beside = prefills.busy if self._split else 0.0
        wanted = [
            rate * table.demand.output.mean for rate, table in zip(rates, self._tables, strict=True)
        ]
        batches = [0.0] * len(rates)
        before = times = batches
        for number in range(MAX_ROUNDS):
            older, before = before, times
            times = self._round(batches, beside, left)
            if number % 3 == 2:
                times = _ahead(older, before, times)
            if self._is_hopeless(times):
                return None
            batches = [want * time for want, time in zip(wanted, times, strict=True)]
            if number % 3 < 2 and _is_settled(before, times):
                break
        return list(zip(times, batches, strict=True))

    def _round(self, batches: list[float], beside: float, left: float) -> list[float]:
        """The time per token of each model, when so many sequences run on average."""
        total_s, waits = 0.0, []
        for table, batch in zip(self._tables, batches, strict=True):
            there = 1 - exp(-batch)  # the probability that any of them runs
            step_s = table.decode_s(batch / there if there > 1e-9 else 1.0, beside) / left
            total_s += there * step_s
            waits.append((1 - there) * step_s)
        return [total_s + wait_s for wait_s in waits]

    def _is_hopeless(self, times: list[float]) -> bool:
        for table, time in zip(self._tables, times, strict=True):
            if time <= HOPELESS * table.demand.slo.tpot_s:
                return False
        return True

    def _score(self, rates: list[float], prefills: _Prefills, rounds: _Rounds) -> GroupScore:
        used, fit = self._memory(rounds)
        spread_s = self._spread_s(prefills, rounds)
        longest_step_s = 0.0 if self._split else max(time for time, _ in rounds)
        parts = []
        for index, (table, rate, (tpot_s, batch)) in enumerate(
            zip(self._tables, rates, rounds, strict=True)
        ):
            slo, output = table.demand.slo, table.demand.output
            own_s = prefills.own_s[index] + longest_step_s / 2
            on_time = _below(slo.ttft_s - own_s, prefills)
            noise = spread_s**2
            if not self._split:  # prefills come in between, more or fewer of them
                noise += prefills.work_squared * tpot_s / output.mean / (1 - prefills.busy)
            fast = _normal((slo.tpot_s - tpot_s) / max(sqrt(noise), 1e-6))
            parts.append(
                PartScore(
                    self._names[index],
                    self._rates[index],
                    rate,
                    on_time * fast * fit,
                    prefills.wait_s + own_s,
                    tpot_s,
                    batch,
                )
            )
        return GroupScore(tuple(parts), prefills.busy, used, self._capacity)

    def _memory(self, rounds: _Rounds) -> tuple[float, float]:
        """Bytes used on average, and the share of the time in which all fit."""
        used = spread = 0.0
        for table, (_, batch) in zip(self._tables, rounds, strict=True):
            used += table.sequence_bytes * batch
            spread += table.square_bytes * batch
        return used, _normal((self._capacity - used) / max(sqrt(spread), 1.0))

    def _spread_s(self, prefills: _Prefills, rounds: _Rounds) -> float:
        """Standard deviation of a request's time per token: its companions come and go."""
        left = 1.0 if self._split else 1 - prefills.busy
        beside = prefills.busy if self._split else 0.0
        total = 0.0
        for table, (_, batch) in zip(self._tables, rounds, strict=True):
            more_s = table.decode_s(batch + sqrt(batch), beside)
            total += ((more_s - table.decode_s(batch, beside)) / left) ** 2
        # A request lives about as long as its companions: half of their variance averages out.
        return sqrt(total / 2)

    def _nothing(self) -> GroupScore:
        parts = tuple(
            PartScore(name, rate, 0.0, 0.0, float("inf"), float("inf"), 0.0)
            for name, rate in zip(self._names, self._rates, strict=True)
        )
        return GroupScore(parts, 1.0, 0.0, self._capacity)


def _ahead(older: list[float], before: list[float], times: list[float]) -> list[float]:
    """Where a sequence that converges is going (Aitken's delta squared), not too boldly."""
    found = []
    for first, second, third in zip(older, before, times, strict=True):
        last, step = second - first, third - second
        ratio = step / last if last > 0 else 0.0
        found.append(third + step * min(ratio / (1 - ratio), 10.0) if 0 < ratio < 1 else third)
    return found


def _is_settled(before: list[float], times: list[float]) -> bool:
    return all(abs(b - t) <= TOLERANCE * t for b, t in zip(before, times, strict=True))


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
