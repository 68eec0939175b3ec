"""What simulations of one phase have in common: who asks, what counts, who waits, what steps take.

A request joins the shortest queue when it comes. Instances know only what has come: they are run
up to the next arrival, then it is dealt. Everything is compiled: a search runs thousands of them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from muxrt.cost.compiled import compiled
from muxrt.planner.phase_tables import Costs, Floats

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

NONE = -1


class Goal(NamedTuple):
    """Which requests count, when they are late, and how many of them may be.

    A simulation ends as soon as there are more: the rest would not change the answer.
    """

    first: int  # of the requests, the first that counts
    last: int  # and the one after the last
    ttft_s: float
    tpot_s: float
    most_missed: int


class Requests(NamedTuple):
    """By request, in order of arrival."""

    arrivals: Floats
    prompts: Ints
    outputs: Ints


class Line(NamedTuple):
    """Who waits where: a linked list per instance, NONE at its end."""

    follows: Ints  # by request
    head: Ints  # by instance
    tail: Ints


@compiled
def prefill_s(costs: Costs, tokens: float, length: float) -> float:
    """A prefill on the whole model; `length` is its mean length, weighted by tokens."""
    at, along = tokens / costs.token_step, length / costs.length_step
    row = min(int(at), costs.prefill_s.shape[0] - 2)
    column = min(int(along), costs.prefill_s.shape[1] - 2)
    down, right = at - row, along - column
    upper = costs.prefill_s[row, column] * (1 - right) + costs.prefill_s[row, column + 1] * right
    lower = (
        costs.prefill_s[row + 1, column] * (1 - right)
        + costs.prefill_s[row + 1, column + 1] * right
    )
    found: float = upper * (1 - down) + lower * down
    return found


@compiled
def kv_s(costs: Costs, batch: int, context: float) -> float:
    """The part of a decode round that depends on what its sequences hold."""
    at = context / costs.pp / costs.context_step
    row = min(int(at), len(costs.context_s) - 2)
    rise = costs.context_s[row + 1] - costs.context_s[row]
    found: float = costs.context_scale[batch] * (costs.context_s[row] + (at - row) * rise)
    return found


@compiled
def round_s(costs: Costs, batch: int, context: float) -> float:
    """A token for each of `batch` sequences that attend to `context` tokens in all."""
    found: float = costs.batch_s[batch] + kv_s(costs, batch, context) + costs.round_s
    return found


@compiled
def join(line: Line, k: int, one: int) -> None:
    """Queue a request at an instance."""
    if line.head[k] == NONE:
        line.head[k] = one
    if line.tail[k] != NONE:
        line.follows[line.tail[k]] = one
    line.tail[k] = one


@compiled
def new_line(count: int, num: int) -> Line:
    return Line(np.full(count, NONE), np.full(num, NONE), np.full(num, NONE))
