"""Simulation of instances that only decode, compiled.

Continuous batching, first come first served. A sequence holds what it will have at its end, so that
none is preempted.
"""

from math import inf
from typing import NamedTuple

import numpy as np

from muxrt.cost.compiled import compiled
from muxrt.planner.phase_steps import (
    NONE,
    Flags,
    Goal,
    Ints,
    Line,
    Requests,
    join,
    new_line,
    round_s,
)
from muxrt.planner.phase_tables import Costs, Floats


class Room(NamedTuple):
    """What an instance holds."""

    kv_tokens: float
    sequences: int
    reserves: bool  # a sequence holds its end from the start; otherwise what it has
    extra_rounds: int  # decode rounds of an answer beyond one per token after the first


class Running(NamedTuple):
    """Sequences that decode, by instance."""

    clock: Floats  # when its next step can begin
    held: Floats  # tokens of KV, with the ends that are reserved
    context: Floats  # tokens that the next round attends to
    waiting: Floats  # tokens of sequences in the line, with their ends
    batch: Ints
    rounds: Ints  # that were run
    soonest: Ints  # the round after which somebody is finished
    which: Ints  # [instances, sequences]
    ends: Ints  # likewise: after which round


@compiled
def new_running(num: int, sequences: int) -> Running:
    return Running(
        np.zeros(num),
        np.zeros(num),
        np.zeros(num),
        np.zeros(num),
        np.zeros(num, np.int64),
        np.zeros(num, np.int64),
        np.zeros(num, np.int64),
        np.zeros((num, sequences), np.int64),
        np.zeros((num, sequences), np.int64),
    )


@compiled
def add(
    state: Running, k: int, one: int, requests: Requests, room: Room, rounds_ahead: int
) -> None:
    """A sequence joins those that decode; its first round is the one after `rounds_ahead`."""
    slot = state.batch[k]
    end = state.rounds[k] + rounds_ahead + requests.outputs[one] - 1 + room.extra_rounds
    state.which[k, slot] = one
    state.ends[k, slot] = end
    if slot == 0 or end < state.soonest[k]:
        state.soonest[k] = end
    state.batch[k] += 1
    state.held[k] += requests.prompts[one] + requests.outputs[one]
    state.waiting[k] -= requests.prompts[one] + requests.outputs[one]
    state.context[k] += requests.prompts[one] + 1


@compiled
def is_full(state: Running, k: int, one: int, requests: Requests, room: Room) -> bool:
    """Whether a sequence has to wait; an instance without any takes it whatever its size."""
    if state.batch[k] == 0:
        return False
    need = requests.prompts[one] + (requests.outputs[one] if room.reserves else 1)
    taken = state.held[k] if room.reserves else state.context[k]
    full: bool = state.batch[k] == room.sequences or taken + need > room.kv_tokens
    return full


@compiled
def remove_ended(
    state: Running,
    k: int,
    requests: Requests,
    room: Room,
    goal: Goal,
    since: Floats,
    late: Flags,
    finish: Floats,
) -> int:
    """Sequences that are finished leave; how many of them missed a target."""
    missed, kept, next_end = 0, 0, np.int64(1 << 62)
    for slot in range(state.batch[k]):
        one, end = state.which[k, slot], state.ends[k, slot]
        if end > state.rounds[k]:
            state.which[k, kept] = one
            state.ends[k, kept] = end
            next_end = min(next_end, end)
            kept += 1
            continue
        turns = requests.outputs[one] - 1 + room.extra_rounds
        finish[one] = state.clock[k] if turns > 0 else since[one]
        state.held[k] -= requests.prompts[one] + requests.outputs[one]
        state.context[k] -= requests.prompts[one] + 1 + turns
        token_s = (finish[one] - since[one]) / max(turns, 1)
        missed += goal.first <= one < goal.last and (late[one] or token_s > goal.tpot_s)
    state.batch[k] = kept
    state.soonest[k] = next_end
    return missed


@compiled
def _run_decodes(
    costs: Costs,
    state: Running,
    line: Line,
    k: int,
    until: float,
    requests: Requests,
    room: Room,
    goal: Goal,
    ready: Floats,
    done: Floats,
    late: Flags,
    finish: Floats,
) -> int:
    """All rounds of one instance that start before `until`; how many missed a target."""
    missed = 0
    while line.head[k] != NONE or state.batch[k] > 0:
        if state.batch[k] == 0:
            state.clock[k] = max(state.clock[k], ready[line.head[k]])
        if state.clock[k] >= until:
            break
        while line.head[k] != NONE and ready[line.head[k]] <= state.clock[k]:
            one = line.head[k]
            if is_full(state, k, one, requests, room):
                break
            add(state, k, one, requests, room, 0)
            line.head[k] = line.follows[one]
        if state.soonest[k] > state.rounds[k]:
            state.clock[k] += round_s(costs, state.batch[k], state.context[k])
            state.context[k] += state.batch[k]
            state.rounds[k] += 1
        if state.rounds[k] >= state.soonest[k]:
            missed += remove_ended(state, k, requests, room, goal, done, late, finish)
            if missed > goal.most_missed:
                break
    return missed


@compiled
def decode_pool(
    costs: Costs,
    requests: Requests,
    order: Ints,
    ready: Floats,
    done: Floats,
    num: int,
    room: Room,
    goal: Goal,
    late: Flags,
    finish: Floats,
) -> int:
    """When each answer is finished; how many requests missed a target (`late`: the first one).

    `order` is that of `ready`, when a sequence can join; its token times count from `done`.
    """
    line, state = new_line(len(order), num), new_running(num, room.sequences)
    missed = 0
    for place in range(len(order) + 1):
        until = ready[order[place]] if place < len(order) else inf
        for k in range(num):
            missed += _run_decodes(
                costs, state, line, k, until, requests, room, goal, ready, done, late, finish
            )
        if place == len(order) or missed > goal.most_missed:
            break
        one, best = order[place], 0
        for k in range(num):
            if state.held[k] + state.waiting[k] < state.held[best] + state.waiting[best]:
                best = k
        state.waiting[best] += requests.prompts[one] + requests.outputs[one]
        join(line, best, one)
    return missed
