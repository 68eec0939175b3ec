"""Simulation of instances that only prefill (DistServe, section 4), compiled.

First come first served, as many whole prompts together as `token_cap` holds (near L_m, where the
GPU is saturated), through `pp` stages. Their KV stays until it has been moved, layer by layer while
the next one computes, on one link of the instance.
"""

from math import inf
from typing import NamedTuple

import numpy as np

from muxrt.cost.compiled import compiled
from muxrt.planner.phase_steps import NONE, Goal, Ints, Line, Requests, join, new_line, prefill_s
from muxrt.planner.phase_tables import Costs, Floats


class Moves(NamedTuple):
    """How KV leaves a prefill instance."""

    token_s: float  # of the link, for the KV of one token; 0: it takes no time
    layers: float  # it is moved in so many parts; the last one when the prefill is done


class Prefilling(NamedTuple):
    """Instances that prefill."""

    free: Floats  # [instances, stages]: when they are
    link_free: Floats
    used: Floats  # tokens of KV
    queued: Floats  # tokens of prompts
    running: Floats  # likewise, of the last batch
    oldest: Ints  # the first request whose KV is still there


@compiled
def _make_room(
    state: Prefilling, line: Line, k: int, requests: Requests, kv_tokens: float, ready: Floats
) -> float:
    """When the next prompt can start: its KV must fit beside what has not been moved yet."""
    one = line.head[k]
    start: float = max(state.free[k, 0], requests.arrivals[one])
    while state.oldest[k] != NONE:
        oldest = state.oldest[k]
        if ready[oldest] > start and state.used[k] + requests.prompts[one] <= kv_tokens:
            break
        start = max(start, ready[oldest])
        state.used[k] -= requests.prompts[oldest]
        after = line.follows[oldest]
        state.oldest[k] = after if after != one else NONE
    state.free[k, 0] = max(state.free[k, 0], start)  # what was waited for stays waited for
    return start


@compiled
def _through_stages(
    costs: Costs, state: Prefilling, k: int, start: float, tokens: float, squares: float
) -> float:
    """When a batch leaves the last stage."""
    stage_s = prefill_s(costs, tokens, squares / tokens) / costs.pp + costs.stage_s
    at: float = start
    for stage in range(costs.pp):
        more_s = costs.first_s + costs.first_token_s * tokens if stage == 0 else 0.0
        at = max(at, state.free[k, stage]) + stage_s + more_s
        state.free[k, stage] = at
    return at


@compiled
def _run_prefills(
    costs: Costs,
    state: Prefilling,
    line: Line,
    k: int,
    until: float,
    requests: Requests,
    token_cap: float,
    kv_tokens: float,
    moves: Moves,
    goal: Goal,
    done: Floats,
    ready: Floats,
) -> int:
    """All batches of one instance that start before `until`; how many were late."""
    arrivals, prompts, late = requests.arrivals, requests.prompts, 0
    while line.head[k] != NONE:
        start = _make_room(state, line, k, requests, kv_tokens, ready)
        if start >= until:
            break
        one = end = line.head[k]
        tokens = squares = 0.0
        while end != NONE and arrivals[end] <= start:
            more = tokens + prompts[end]
            if tokens > 0 and (more > token_cap or state.used[k] + more > kv_tokens):
                break
            tokens = more
            squares += float(prompts[end]) * prompts[end]
            end = line.follows[end]
        at = _through_stages(costs, state, k, start, tokens, squares)
        if state.oldest[k] == NONE:
            state.oldest[k] = one
        line.head[k] = end
        state.used[k] += tokens
        state.queued[k] -= tokens
        state.running[k] = tokens
        while one != end:
            moved_s = prompts[one] * moves.token_s
            state.link_free[k] = max(state.link_free[k], start) + moved_s
            done[one] = at
            ready[one] = max(at + moved_s / moves.layers, state.link_free[k])
            late += goal.first <= one < goal.last and at - arrivals[one] > goal.ttft_s
            one = line.follows[one]
    return late


@compiled
def prefill_pool(
    costs: Costs,
    requests: Requests,
    num: int,
    token_cap: float,
    kv_tokens: float,
    moves: Moves,
    goal: Goal,
    done: Floats,
    ready: Floats,
) -> int:
    """When each prompt is `done` and its KV `ready` on the other side; how many were late."""
    arrivals, prompts = requests.arrivals, requests.prompts
    line = new_line(len(arrivals), num)
    zeros = np.zeros((4, num))
    state = Prefilling(
        np.zeros((num, costs.pp)), zeros[0], zeros[1], zeros[2], zeros[3], np.full(num, NONE)
    )
    late = 0
    for index in range(len(arrivals) + 1):
        until = arrivals[index] if index < len(arrivals) else inf
        for k in range(num):
            late += _run_prefills(
                costs,
                state,
                line,
                k,
                until,
                requests,
                token_cap,
                kv_tokens,
                moves,
                goal,
                done,
                ready,
            )
        if index == len(arrivals) or late > goal.most_missed:
            break
        best, least = 0, inf
        for k in range(num):
            running = state.running[k] if state.free[k, costs.pp - 1] > until else 0.0
            if state.queued[k] + running < least:
                best, least = k, state.queued[k] + running
        state.queued[best] += prompts[index]
        join(line, best, index)
    return late
