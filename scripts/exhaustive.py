"""The best of all placements of a small problem, to hold a search against.

Every way to cut the GPUs of one node into meshes of 1, 2 and 4, every subset of the models on each
mesh, every choice of lanes, and every split of a model's traffic into parts of 1 / `parts`. What
meshes can serve together is a (max, +) convolution over what share of each model's traffic they
take, so all of it is looked at without being listed.
"""

from itertools import product

import numpy as np
import numpy.typing as npt

from muxrt.planner.draft import Group, Part
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.workload import PREFILL_PCTS, Problem

Floats = npt.NDArray[np.float64]

MAX_STATES = 3200  # (parts + 1) ** models: convolutions take its square
WAYS = {2: ((2,), (1, 1)), 3: ((2, 1), (1, 1, 1)), 4: ((4,), (2, 2), (2, 1, 1), (1, 1, 1, 1))}


def best_goodput_rps(problem: Problem) -> float:
    """The most goodput of any placement, as the queueing estimator sees it."""
    models = tuple(problem.demands)
    parts = max(2, int(MAX_STATES ** (1 / len(models))) - 1)
    shape = (parts + 1,) * len(models)
    states = np.array(list(product(range(parts + 1), repeat=len(models))))  # [states, models]
    ways = WAYS[problem.num_gpus]
    served = {size: _one_mesh(problem, size, states, parts) for way in ways for size in way}
    best = -np.inf
    for first, *rest in ways:
        total = served[first]
        for size in rest:
            total = _together(total, served[size], states, shape)
        best = max(best, float(total[-1]))  # the last state: all traffic of all models
    return best


def _one_mesh(problem: Problem, size: int, states: npt.NDArray[np.int64], parts: int) -> Floats:
    """Goodput of one mesh that takes `states` parts of each model's traffic; -inf: does not fit."""
    judge, models = QueueingJudge(problem), tuple(problem.demands)
    found = np.full(len(states), -np.inf)
    for index, state in enumerate(states.tolist()):
        guests = tuple(Part(m, n / parts) for m, n in zip(models, state, strict=True) if n)
        if not guests:
            found[index] = 0.0
        elif problem.fits(0, size, tuple(part.model for part in guests)):
            groups = (Group(0, size, guests, pct) for pct in PREFILL_PCTS)
            found[index] = max(map(judge.goodput_rps, groups))
    return found


def _together(
    left: Floats, right: Floats, states: npt.NDArray[np.int64], shape: tuple[int, ...]
) -> Floats:
    """The most that two sets of meshes serve, for each state that they share between them."""
    found = np.full(len(states), -np.inf)
    strides = np.array([int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))])
    for index, state in enumerate(states):
        if left[index] == -np.inf:
            continue
        fits = (states + state < shape[0]).all(axis=1)
        sums = (states[fits] + state) @ strides
        np.maximum.at(found, sums, left[index] + right[fits])
    return found
