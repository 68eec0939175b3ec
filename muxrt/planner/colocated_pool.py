"""Simulation of instances that do both phases, compiled: what disaggregation is compared with.

Prefills go first, whole: alone (vLLM 0.2, DistServe's baseline), or in one batch with a token for
each running sequence (Orca, Splitwise's baseline).
"""

from math import inf

import numpy as np

from muxrt.cost.compiled import compiled
from muxrt.planner.decode_pool import Room, Running, add, is_full, new_running, remove_ended
from muxrt.planner.phase_steps import (
    NONE,
    Flags,
    Goal,
    Line,
    Requests,
    join,
    kv_s,
    new_line,
    prefill_s,
    round_s,
)
from muxrt.planner.phase_tables import Costs, Floats


@compiled
def _take_prompts(
    state: Running,
    line: Line,
    k: int,
    requests: Requests,
    room: Room,
    allowed: float,
    rounds_ahead: int,
) -> float:
    """Waiting prompts that fit become the end of the instance's batch; their tokens."""
    tokens = 0.0
    while line.head[k] != NONE and requests.arrivals[line.head[k]] <= state.clock[k]:
        one = line.head[k]
        if is_full(state, k, one, requests, room):
            break
        if tokens > 0 and tokens + requests.prompts[one] > allowed:
            break
        add(state, k, one, requests, room, rounds_ahead)
        tokens += requests.prompts[one]
        line.head[k] = line.follows[one]
    return tokens


@compiled
def _step(
    costs: Costs,
    state: Running,
    k: int,
    requests: Requests,
    before: int,
    context: float,
    mixed_factor: float,
) -> float:
    """Seconds of a step with the prompts that joined after `before` sequences."""
    tokens = squares = 0.0
    for slot in range(before, state.batch[k]):
        prompt = float(requests.prompts[state.which[k, slot]])
        tokens += prompt
        squares += prompt * prompt
    if tokens == 0:
        return round_s(costs, before, context)
    more_s = costs.stage_s + costs.first_s + costs.first_token_s * tokens
    if mixed_factor == 0:
        return prefill_s(costs, tokens, squares / tokens) + more_s
    every = tokens + before
    mixed_s = mixed_factor * prefill_s(costs, every, squares / every) + kv_s(costs, before, context)
    return max(mixed_s + more_s, round_s(costs, before, context) if before else 0.0)


@compiled
def _run_colocated(
    costs: Costs,
    state: Running,
    line: Line,
    k: int,
    until: float,
    requests: Requests,
    token_cap: float,
    mixed_factor: float,
    room: Room,
    goal: Goal,
    late: Flags,
    first: Floats,
    finish: Floats,
) -> int:
    """All steps of one instance that start before `until`; how many missed a target."""
    missed = 0
    while line.head[k] != NONE or state.batch[k] > 0:
        if state.batch[k] == 0:
            state.clock[k] = max(state.clock[k], requests.arrivals[line.head[k]])
        if state.clock[k] >= until:
            break
        before, context = state.batch[k], state.context[k]
        allowed = token_cap - before if mixed_factor > 0 else token_cap
        # A mixed step is a round for those that run: the new ones' rounds come after it.
        ahead = 1 if mixed_factor > 0 and before > 0 else 0
        tokens = _take_prompts(state, line, k, requests, room, allowed, ahead)
        state.clock[k] += _step(costs, state, k, requests, before, context, mixed_factor)
        if before > 0 and (tokens == 0 or mixed_factor > 0):
            state.context[k] += before
            state.rounds[k] += 1
        for slot in range(before, state.batch[k]):
            one = state.which[k, slot]
            first[one] = state.clock[k]
            late[one] = first[one] - requests.arrivals[one] > goal.ttft_s
        if state.rounds[k] >= state.soonest[k]:
            missed += remove_ended(state, k, requests, room, goal, first, late, finish)
            if missed > goal.most_missed:
                break
    return missed


@compiled
def colocated_pool(
    costs: Costs,
    requests: Requests,
    num: int,
    token_cap: float,
    mixed_factor: float,
    room: Room,
    goal: Goal,
    first: Floats,
    finish: Floats,
) -> int:
    """When each request has its `first` token and its last; how many missed a target.

    `mixed_factor` 0: prefills run alone. Otherwise a batch of prompts also gives each running
    sequence a token, and takes that factor of a prefill of all its tokens.
    """
    count = len(requests.arrivals)
    line, state = new_line(count, num), new_running(num, room.sequences)
    late = np.zeros(count, np.bool_)
    missed = 0
    for one in range(count + 1):
        until = requests.arrivals[one] if one < count else inf
        for k in range(num):
            missed += _run_colocated(
                costs,
                state,
                line,
                k,
                until,
                requests,
                token_cap,
                mixed_factor,
                room,
                goal,
                late,
                first,
                finish,
            )
        if one == count or missed > goal.most_missed:
            break
        best = 0
        for k in range(num):
            if state.waiting[k] + state.batch[k] < state.waiting[best] + state.batch[best]:
                best = k
        state.waiting[best] += requests.prompts[one] + requests.outputs[one]
        join(line, best, one)
    return missed
