"""Splitwise's provisioning: which machines, and how many prompt and token machines, for a budget.

(ISCA 2024, section 5.) A design is a kind of machine for prompts and one for tokens; a baseline
has machines that do both, in mixed batches. Nine targets must hold: slowdowns of TTFT, TBT and E2E
at the 50th, 90th and 99th percentile against the same request alone on a DGX-A100 (its table 6).
What a machine costs and draws are the figures of its repository, per GPU and in its own units.

No machine changes its pool here: at high load the paper's mixed pool would help.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from math import floor
from typing import NamedTuple

import numpy as np

from muxrt.planner.colocated_pool import colocated_pool
from muxrt.planner.decode_pool import Room, decode_pool
from muxrt.planner.phase_steps import Goal, Requests, prefill_s
from muxrt.planner.phase_tables import Costs, Floats
from muxrt.planner.phases import EDGE, Traffic, largest_rate
from muxrt.planner.prefill_pool import Moves, prefill_pool

# Table 6: slowdowns at the 50th, 90th and 99th percentile.
PERCENTILES = (50, 90, 99)
SLOWDOWNS = {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}
BATCH_TOKENS = 2048  # of prompts in one batch
START_RPS, NEAR = 16.0, 1.2  # where a search of rates begins, and how far it looks from a guess
MIXED_FACTOR = 1.1  # splitwise-sim: what a batch of both phases costs more


class Budget(StrEnum):
    """What two clusters have in common."""

    POWER = "power"
    COST = "cost"


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind; `costs` are None where only its budget is asked."""

    name: str
    cost: float
    power: float
    costs: Costs | None = None

    def takes(self, budget: Budget) -> float:
        """Of a budget."""
        return self.power if budget is Budget.POWER else self.cost


# splitwise-sim: $ per GPU and hour, and power of a machine per GPU in its notebook's units.
A100 = Machine("A100", 2.21, 24.8)
H100 = Machine("H100", 4.76, 44.0)
H100_CAP = Machine("H100 capped", 4.76, 30.8)


def equal_count(machine: Machine, than: Machine, count: int, budget: Budget) -> int:
    """Machines that as much buys as `count` of `than`: 40 H100 are 70 A100 by power, 86 by cost."""
    return floor(count * than.takes(budget) / machine.takes(budget) + 1e-9)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Prompt and token machines; a baseline has the same machines for both."""

    prompt: Machine
    num_prompt: int
    token: Machine
    num_token: int

    def takes(self, budget: Budget) -> float:
        """Of a budget."""
        own = self.num_prompt * self.prompt.takes(budget)
        return own + self.num_token * self.token.takes(budget)


class Times(NamedTuple):
    """By request, seconds."""

    ttft: Floats
    tbt: Floats
    e2e: Floats


class Provisioner:
    """Throughput of clusters under one traffic, requests/s that meet all nine targets."""

    def __init__(
        self,
        traffic: Traffic,
        alone: Costs,
        alone_tbt: Callable[[int], float],
        room: Room,
        move_token_s: float,
    ) -> None:
        """`alone` is the DGX-A100; `alone_tbt` its time per token by the prompt, as the paper's."""
        self._traffic = traffic
        self._room = room
        self._moves = Moves(move_token_s, 1.0)
        prompts, outputs = traffic.prompts, traffic.outputs
        ttft = np.array([prefill_s(alone, float(p), float(p)) for p in prompts])
        tbt = np.array([alone_tbt(int(p)) for p in prompts])
        self._alone = Times(ttft, tbt, ttft + tbt * (outputs - 1))

    def split_rps(self, cluster: Cluster, guess_rps: float | None = None) -> float:
        """What prompt and token machines sustain; near `guess_rps` it is found sooner."""
        start_rps, factor = (START_RPS, 2.0) if not guess_rps else (guess_rps, NEAR)
        return largest_rate(lambda rate: self.keeps(self.split(cluster, rate)), start_rps, factor)

    def baseline_rps(self, machine: Machine, count: int) -> float:
        """What machines sustain that do both."""
        return largest_rate(lambda rate: self.keeps(self.baseline(machine, count, rate)), START_RPS)

    def split(self, cluster: Cluster, rate_rps: float) -> Times:
        """What each request sees."""
        assert cluster.prompt.costs is not None and cluster.token.costs is not None
        requests, goal = self._traffic.at(rate_rps), self._goal
        num = len(requests.arrivals)
        done, ready, finish = np.zeros(num), np.zeros(num), np.zeros(num)
        cap, held = float(BATCH_TOKENS), self._room.kv_tokens
        prompts = cluster.prompt.costs, requests, cluster.num_prompt
        prefill_pool(*prompts, cap, held, self._moves, goal, done, ready)
        order, late = np.argsort(ready, kind="stable"), np.zeros(num, np.bool_)
        tokens = cluster.token.costs, requests, order, ready, done, cluster.num_token
        decode_pool(*tokens, self._room, goal, late, finish)
        return _times(requests, done, finish)

    def baseline(self, machine: Machine, count: int, rate_rps: float) -> Times:
        """The same of machines that do both."""
        assert machine.costs is not None
        requests = self._traffic.at(rate_rps)
        first, finish = np.zeros(len(requests.arrivals)), np.zeros(len(requests.arrivals))
        both = machine.costs, requests, count, float(BATCH_TOKENS), MIXED_FACTOR
        colocated_pool(*both, self._room, self._goal, first, finish)
        return _times(requests, first, finish)

    @property
    def _goal(self) -> Goal:
        num = len(self._traffic.gaps)
        return Goal(0, num, np.inf, np.inf, num)

    def slowdowns(self, times: Times) -> dict[str, tuple[float, ...]]:
        """At the three percentiles, of the requests in the middle."""
        first = int(EDGE * len(times.ttft))
        middle = slice(first, len(times.ttft) - first)
        found = {}
        for name in SLOWDOWNS:
            ratio = getattr(times, name)[middle] / getattr(self._alone, name)[middle]
            found[name] = tuple(float(v) for v in np.percentile(ratio, PERCENTILES))
        return found

    def keeps(self, times: Times) -> bool:
        """Whether all nine targets hold."""
        found = self.slowdowns(times)
        return all(
            value < limit
            for name, limits in SLOWDOWNS.items()
            for value, limit in zip(found[name], limits, strict=True)
        )

    def best(self, prompt: Machine, token: Machine, budget: Budget, total: float) -> "Provisioned":
        """The counts with the most throughput that a budget buys.

        More prompt machines leave fewer token machines, and each side's limit moves one way, so
        the best is where they cross: found by thirds.
        """
        kept: dict[int, Provisioned] = {}
        best_rps = 0.0

        def at(num_prompt: int) -> Provisioned:
            nonlocal best_rps
            if num_prompt not in kept:
                left = total - num_prompt * prompt.takes(budget)
                cluster = Cluster(
                    prompt, num_prompt, token, floor(left / token.takes(budget) + 1e-9)
                )
                kept[num_prompt] = Provisioned(cluster, self.split_rps(cluster, best_rps))
                best_rps = max(best_rps, kept[num_prompt].rps)
            return kept[num_prompt]

        low, high = 1, floor((total - token.takes(budget)) / prompt.takes(budget) + 1e-9)
        while high - low > 3:
            third = (high - low) // 3
            left, right = low + third, high - third
            if at(left).rps < at(right).rps:
                low = left
            else:
                high = right
        for num_prompt in range(low, high + 1):
            at(num_prompt)
        return max(kept.values(), key=lambda one: one.rps)

    def least_baseline(self, machine: Machine, rate_rps: float, most: int) -> int | None:
        """The fewest machines that do both and keep that rate; None where `most` do not."""
        return _least(lambda count: self.keeps(self.baseline(machine, count, rate_rps)), most)

    def least(
        self, prompt: Machine, token: Machine, budget: Budget, rate_rps: float, most: int
    ) -> Cluster | None:
        """The cluster that keeps that rate on the least power or cost, at most `most` of a kind.

        From the fewest prompt machines that do on, with as few token machines as each lets;
        more prompt machines are tried until they alone take as much as the best.
        """

        def keeps(num_prompt: int, num_token: int) -> bool:
            cluster = Cluster(prompt, num_prompt, token, num_token)
            return self.keeps(self.split(cluster, rate_rps))

        num_prompt = _least(lambda count: keeps(count, most), most)
        best: Cluster | None = None
        while num_prompt is not None and num_prompt <= most:
            count = num_prompt
            least = best.num_token if best is not None else most
            num_token = _least(partial(keeps, count), least)
            if num_token is not None:
                found = Cluster(prompt, count, token, num_token)
                if best is None or found.takes(budget) < best.takes(budget):
                    best = found
            alone = (num_prompt + 1) * prompt.takes(budget) + token.takes(budget)
            if best is not None and alone >= best.takes(budget):
                break
            num_prompt += 1
        return best


def _least(keeps: Callable[[int], bool], most: int) -> int | None:
    """The smallest count up to `most` that keeps the targets; more are never worse."""
    if not keeps(most):
        return None
    low, enough = 0, most
    while enough - low > 1:
        middle = (low + enough) // 2
        low, enough = (low, middle) if keeps(middle) else (middle, enough)
    return enough


@dataclass(frozen=True, slots=True)
class Provisioned:
    """A cluster, and the requests/s that it sustains."""

    cluster: Cluster
    rps: float


def _times(requests: Requests, first: Floats, finish: Floats) -> Times:
    """TBT is per request and over all its tokens, as the paper's notebook has it."""
    whole = finish - requests.arrivals
    return Times(first - requests.arrivals, (finish - first) / requests.outputs, whole)
