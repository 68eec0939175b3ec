"""Drawing tokens for numba: one pass over a row's logits, no sorting of vocabularies.

What top-k and top-p keep is found through a histogram over the leading bits of the probabilities:
only the bucket that the cut falls into is sorted.
"""

from typing import Any

import numpy as np

from muxrt.kernels.cpu_math import exp
from muxrt.kernels.jit import bits_of_float, inlined, kernel

Array = Any  # numba's view: a numpy array

SHIFT = 18  # leaves the exponent and 5 bits of the fraction
BUCKETS = (0x3F80_0000 >> SHIFT) + 1  # up to 1.0
BAD = -1  # instead of a token: the logits are not finite


@inlined
def _best(logits: Array) -> int:
    """The first of the largest; BAD where anything is NaN or the largest is infinite."""
    best, top, is_bad = 0, logits[0], False
    for i in range(len(logits)):
        is_bad |= logits[i] != logits[i]
        top = max(top, logits[i])
    if is_bad or not np.isfinite(top):
        return BAD
    while logits[best] != top:
        best += 1
    return best


@inlined
def _cut(
    weights: Array, counts: Array, masses: Array, limit: int, goal: float
) -> tuple[Any, float]:
    """(the weight at which, from the largest on, `limit` are counted or `goal` is reached, mass).

    The histogram (`counts`, `masses` per bucket) is that of `weights`.
    """
    count, mass, bucket = 0, 0.0, BUCKETS - 1
    while bucket > 0 and count + counts[bucket] < limit and mass + masses[bucket] < goal:
        count += counts[bucket]
        mass += masses[bucket]
        bucket -= 1
    inside = np.empty(counts[bucket], np.float32)
    num = 0
    for i in range(len(weights)):
        if bits_of_float(weights[i]) >> np.uint32(SHIFT) == bucket:
            inside[num] = weights[i]
            num += 1
    inside.sort()
    value: Any = np.float32(0)
    for i in range(num):
        value = inside[num - 1 - i]
        mass += value
        if count + i + 1 >= limit or mass >= goal:
            break
    return value, mass


@inlined
def _threshold(weights: Array, top_k: int, top_p: float, total: Any) -> Any:
    """The least weight that stays. Top-p counts the mass of what top-k left."""
    counts, masses = np.zeros(BUCKETS, np.int32), np.zeros(BUCKETS, np.float64)
    for i in range(len(weights)):
        bucket = bits_of_float(weights[i]) >> np.uint32(SHIFT)
        counts[bucket] += 1
        masses[bucket] += weights[i]
    limit = len(weights)
    cut: Any = np.float32(0)
    if 0 < top_k < limit:
        limit = top_k
        cut, total = _cut(weights, counts, masses, limit, np.inf)
    if top_p < 1:
        cut, _ = _cut(weights, counts, masses, limit, top_p * total)
    return cut


@inlined
def _invert(weights: Array, floor: Any, number: float) -> int:
    """The first token whose cumulated weight exceeds number x mass, of those not below `floor`."""
    mass: Any = 0.0
    for i in range(len(weights)):
        mass += weights[i] if weights[i] >= floor else np.float32(0)
    goal, mass, token = number * mass, 0.0, 0
    for i in range(len(weights)):
        if weights[i] >= floor and weights[i] > 0:
            mass += weights[i]
            token = i  # a number so near to 1 that the product rounds up means the last token
            if mass > goal:
                break
    return token


@kernel(error_model="numpy")
def draw(
    begin: int,
    end: int,
    logits: Array,
    temperatures: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    numbers: Array,
    tokens: Array,
) -> None:
    """Tokens of rows [begin, end): the best at temperature 0, else by the row's uniform number.

    logits [N, vocab] float32; the others [N], see `muxrt.kernels.sample`.
    """
    weights = np.empty(logits.shape[1], np.float32)
    for row in range(begin, end):
        line = logits[row]
        best = _best(line)
        tokens[row] = best
        if best == BAD or temperatures[row] <= 0:
            continue
        # The best token's exponent becomes 0: a tiny temperature gives 0 for others, never +inf.
        top, heat = line[best], np.float32(max(temperatures[row], 1e-30))
        total = 0.0
        for i in range(len(line)):
            x = (line[i] - top) / heat
            weights[i] = exp(x) if x > np.float32(-87) else np.float32(0)
        for i in range(len(line)):
            total += weights[i]
        floor = np.float32(min_p[row])  # of the best one's weight, which is 1
        if top_k[row] > 0 or top_p[row] < 1:
            floor = max(floor, _threshold(weights, top_k[row], top_p[row], total))
        tokens[row] = _invert(weights, floor, numbers[row])
