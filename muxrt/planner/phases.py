"""What instances of one phase sustain: the largest rate at which enough requests are in time.

`Judge` asks simulations of prefill-only, decode-only, split and colocated instances, always with
the same requests (common random numbers), at rates that are closed in on by halving. A simulation
ends as soon as too many requests are late.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np

from muxrt.config.placement import Slo
from muxrt.planner.colocated_pool import colocated_pool
from muxrt.planner.decode_pool import Room, decode_pool
from muxrt.planner.phase_steps import Flags, Goal, Ints, Requests
from muxrt.planner.phase_tables import Costs, Floats, Limits
from muxrt.planner.prefill_pool import Moves, prefill_pool
from muxrt.planner.workload import Lengths

# Of a simulation: at least so many, and at least so many times those that are there at once: it is
# about the steady state. At most what was drawn.
NUM_REQUESTS, TIMES_THERE, MOST_REQUESTS = 2000, 10.0, 40_000
EDGE = 0.1  # of the requests at either end load the system and do not count
PRECISION = 0.01  # of a rate
LINK_LOAD = 0.8  # of an instance's link: beyond it KV waits longer and longer
SMALLEST_RPS, LARGEST_RPS = 1e-3, 1e5
SATURATED = 0.9  # of the most prompt tokens/s of any length: what L_m is
# simdistserve decodes together what holds this many tokens, whatever the model and the GPU.
PAPER_CONTEXT = 50_000


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests to draw rates from."""

    gaps: Floats  # [requests], of mean 1
    prompts: Ints
    outputs: Ints

    def at(self, rate_rps: float, num: int | None = None) -> Requests:
        """They, or the first `num` of them, come at that rate."""
        arrivals = np.cumsum(self.gaps[:num]) / rate_rps
        return Requests(arrivals, self.prompts[:num], self.outputs[:num])


def draw(
    prompt: Lengths, output: Lengths, longest: int, num: int = MOST_REQUESTS, seed: int = 0
) -> Traffic:
    """Poisson arrivals; lengths are lognormal with these moments, cut so that both fit `longest`.

    Equal numbers for equal seeds, whatever the lengths' means.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(size=num)
    prompts, outputs = _lognormal(prompt, rng, num), _lognormal(output, rng, num)
    outputs = np.clip(outputs, 1, max(1, longest - 1))
    return Traffic(gaps, np.clip(prompts, 1, np.maximum(1, longest - outputs)), outputs)


def of_pairs(prompts: Ints, outputs: Ints, num: int = MOST_REQUESTS, seed: int = 0) -> Traffic:
    """Poisson arrivals; each request is one of those seen."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(size=num)
    which = rng.integers(len(prompts), size=num)
    return Traffic(gaps, prompts[which], outputs[which])


def _lognormal(lengths: Lengths, rng: np.random.Generator, num: int) -> Ints:
    sigma = sqrt(np.log1p(lengths.variance / lengths.mean**2))
    drawn = lengths.mean * np.exp(sigma * rng.standard_normal(num) - sigma**2 / 2)
    return np.maximum(1, np.rint(drawn)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a simulation looks at. The defaults are ours; `COMPAT` is DistServe's simulator."""

    moves: bool = True  # KV takes its time on the link, and its room until it has been moved
    keeps: bool = True  # decodes have the instance's memory; else 50,000 tokens, for all
    joint: bool = True  # a request keeps both targets; else 90 % keep each
    saturates: bool = True  # prefills are batched up to L_m; else while KV holds them
    extra_rounds: int = 0  # decode rounds of an answer beyond one per token after the first


# Sections 8 and 9 of what is known of it: no transfer, no KV that stays, 50,000 tokens for every
# model and tp, 90th percentiles of TTFT and TPOT apart, one decode round too many.
COMPAT = Rules(moves=False, keeps=False, joint=False, saturates=False, extra_rounds=1)


@dataclass(frozen=True, slots=True)
class Link:
    """How KV gets from a prefill to a decode instance."""

    token_s: float = 0.0
    layers: int = 1

    @property
    def moves(self) -> Moves:
        return Moves(self.token_s, float(self.layers))


@dataclass(frozen=True, slots=True)
class Instance:
    """One copy of a model on `tp` x `pp` GPUs."""

    tp: int
    pp: int
    costs: Costs
    limits: Limits
    saturating_tokens: int  # L_m
    link: Link = Link()  # by which KV leaves it, or comes

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    @property
    def name(self) -> str:
        return f"tp {self.tp}" if self.pp == 1 else f"tp {self.tp} x pp {self.pp}"


def saturating_tokens(prefill_s: Callable[[float, float], float], longest: int) -> int:
    """L_m: the shortest prompt that is prefilled at 90 % of the best tokens/s of any length."""
    lengths = range(16, max(17, longest + 1), 16)
    speeds = np.array([length / prefill_s(length, length**2) for length in lengths])
    return lengths[int(np.argmax(speeds >= SATURATED * speeds.max()))]


@dataclass(frozen=True, slots=True)
class Seen:
    """What requests saw at one rate; means."""

    attainment: float
    ttft_s: float
    tpot_s: float


class Judge:
    """Goodput of instances under one traffic; rates are of the whole pool, requests/s."""

    def __init__(
        self, traffic: Traffic, slo: Slo, attainment: float = 0.9, rules: Rules | None = None
    ) -> None:
        self.traffic = traffic
        self.slo = slo
        self.attainment = attainment
        self.rules = rules or Rules()

    def prefill_rps(self, instance: Instance, num: int = 1) -> float:
        """What `num` instances prefill in time."""
        return largest_rate(lambda rate: self.keeps_prefills(instance, num, rate))

    def decode_rps(self, instance: Instance, num: int = 1) -> float:
        """What `num` instances decode in time, of prompts that come at random."""
        return largest_rate(lambda rate: self.keeps_decodes(instance, num, rate))

    def split_rps(
        self,
        prefill: Instance,
        num_prefill: int,
        decode: Instance,
        num_decode: int,
    ) -> float:
        """What prefill and decode instances sustain together."""
        return largest_rate(
            lambda rate: self.keeps_split(prefill, num_prefill, decode, num_decode, rate)
        )

    def colocated_rps(self, instance: Instance, num: int = 1, mixed_factor: float = 0.0) -> float:
        """What instances sustain that do both, prefills first (`colocated_pool`)."""
        return largest_rate(lambda rate: self.keeps_colocated(instance, num, mixed_factor, rate))

    def _requests(self, rate_rps: float) -> Requests:
        """As many as a simulation at that rate needs."""
        stay_s = self.slo.ttft_s + self.slo.tpot_s * float(np.mean(self.traffic.outputs))
        there = rate_rps * stay_s
        return self.traffic.at(rate_rps, max(NUM_REQUESTS, int(TIMES_THERE * there)))

    def _goal(self, requests: Requests, attainment: float) -> Goal:
        first = int(EDGE * len(requests.arrivals))
        last = len(requests.arrivals) - first
        most = int((1 - attainment) * (last - first) + 1e-9)
        return Goal(first, last, self.slo.ttft_s, self.slo.tpot_s, most)

    @property
    def _alone(self) -> float:
        """What one phase must attain for both to attain the goal, were they independent."""
        return sqrt(self.attainment) if self.rules.joint else self.attainment

    def _room(self, decode: Instance) -> Room:
        kept = decode.limits.kv_tokens if self.rules.keeps else PAPER_CONTEXT
        rules = self.rules
        return Room(float(kept), decode.limits.sequences, rules.keeps, rules.extra_rounds)

    def _prefill(
        self, instance: Instance, num: int, requests: Requests, goal: Goal
    ) -> tuple[int, Floats, Floats]:
        done, ready = np.zeros(len(requests.arrivals)), np.zeros(len(requests.arrivals))
        kv_tokens = float(instance.limits.kv_tokens)
        cap = float(instance.saturating_tokens) if self.rules.saturates else kv_tokens
        moves = instance.link.moves if self.rules.moves else Link().moves
        args = (instance.costs, requests, num, cap, kv_tokens, moves, goal, done, ready)
        return prefill_pool(*args), done, ready

    def keeps_prefills(self, instance: Instance, num: int, rate_rps: float) -> bool:
        """Whether as many prefills are in time as the goal needs, and the links carry their KV."""
        requests = self._requests(rate_rps)
        sent_s = instance.link.token_s * float(np.mean(self.traffic.prompts)) * rate_rps
        if self.rules.moves and sent_s > LINK_LOAD * num:
            return False
        goal = self._goal(requests, self._alone)
        late, _, _ = self._prefill(instance, num, requests, goal)
        return late <= goal.most_missed

    def keeps_decodes(self, instance: Instance, num: int, rate_rps: float) -> bool:
        """Whether as many decodes are in time as the goal needs."""
        requests = self._requests(rate_rps)
        goal = self._goal(requests, self._alone)
        tail_s = instance.link.token_s / instance.link.layers if self.rules.moves else 0.0
        ready = requests.arrivals + tail_s * requests.prompts
        return self._decode(instance, num, requests, requests.arrivals, ready, goal, None)

    def _decode(
        self,
        instance: Instance,
        num: int,
        requests: Requests,
        done: Floats,
        ready: Floats,
        goal: Goal,
        late: Flags | None,
    ) -> bool:
        missed = np.zeros(len(done), np.bool_) if late is None else late
        found, _ = self._finish(instance, num, requests, done, ready, goal, missed)
        return found <= goal.most_missed

    def _finish(
        self,
        instance: Instance,
        num: int,
        requests: Requests,
        done: Floats,
        ready: Floats,
        goal: Goal,
        late: Flags,
    ) -> tuple[int, Floats]:
        """How many miss a target, and when answers are finished."""
        order = np.argsort(ready, kind="stable")
        finish = np.zeros(len(done))
        room = self._room(instance)
        args = (instance.costs, requests, order, ready, done, num, room, goal, late, finish)
        return decode_pool(*args), finish

    def keeps_split(
        self,
        prefill: Instance,
        num_prefill: int,
        decode: Instance,
        num_decode: int,
        rate_rps: float,
    ) -> bool:
        """Whether the goal is kept at that rate."""
        requests = self._requests(rate_rps)
        goal = self._goal(requests, self.attainment)
        found = self._prefill(prefill, num_prefill, requests, goal)
        num_late, done, ready = found
        if num_late > goal.most_missed:
            return False
        late = done - requests.arrivals > self.slo.ttft_s if self.rules.joint else None
        return self._decode(decode, num_decode, requests, done, ready, goal, late)

    def see_split(
        self,
        prefill: Instance,
        num_prefill: int,
        decode: Instance,
        num_decode: int,
        rate_rps: float,
    ) -> Seen:
        """Attainment of both targets, and mean times, at that rate."""
        requests = self._requests(rate_rps)
        goal = self._goal(requests, 0.0)  # nobody is too late: every request runs to its end
        _, done, ready = self._prefill(prefill, num_prefill, requests, goal)
        late = np.zeros(len(done), np.bool_)
        finish = self._finish(decode, num_decode, requests, done, ready, goal, late)[1]
        ttft_s = done - requests.arrivals
        turns = requests.outputs - 1 + self.rules.extra_rounds
        tpot_s = (finish - done) / np.maximum(turns, 1)
        kept = (ttft_s <= self.slo.ttft_s) & (tpot_s <= self.slo.tpot_s)
        means = [float(np.mean(x[goal.first : goal.last])) for x in (kept, ttft_s, tpot_s)]
        return Seen(*means)

    def keeps_colocated(
        self, instance: Instance, num: int, mixed_factor: float, rate_rps: float
    ) -> bool:
        """Whether the goal is kept at that rate."""
        requests = self._requests(rate_rps)
        goal = self._goal(requests, self.attainment)
        first, finish = np.zeros(len(requests.arrivals)), np.zeros(len(requests.arrivals))
        cap = float(
            instance.saturating_tokens if self.rules.saturates else instance.limits.kv_tokens
        )
        room = self._room(instance)
        args = (instance.costs, requests, num, cap, mixed_factor, room, goal, first, finish)
        return colocated_pool(*args) <= goal.most_missed


def largest_rate(
    keeps: Callable[[float], bool], start_rps: float = 1.0, factor: float = 2.0
) -> float:
    """The largest rate that `keeps`, to one per cent; 0 where not even a trickle does.

    More traffic is taken to be never better. `factor` is how far it looks at once: little where
    `start_rps` is a good guess.
    """
    low, high = 0.0, start_rps
    while keeps(high):
        low, high = high, factor * high
        if high > LARGEST_RPS:
            return low
    while low == 0:
        if high < SMALLEST_RPS:
            return 0.0
        if keeps(high / factor):
            low = high / factor
        else:
            high /= factor
            factor = min(2.0, factor**2)
    while high > (1 + PRECISION) * low:
        middle = sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
