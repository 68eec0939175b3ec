"""Drawing tokens in Triton: a program per row goes over its logits a few times, sorting nothing.

The least weight that top-k or top-p keeps is found bit by bit: weights are floats in [0, 1], whose
bits order as they do, so 30 passes over a row (which lies in the cache) decide on one bit each.
"""

import triton
import triton.language as tl
from torch import Tensor

from muxrt.kernels.reference_sampling import BAD, FIRST, GAMMA, LEAST, SECOND, TINY

BLOCK = 4096  # logits at a time
WARPS = 16


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    rows, vocab = logits.shape
    block = min(BLOCK, triton.next_power_of_2(vocab))
    warps = max(1, min(WARPS, block // 256))
    columns = (temperatures, top_k, top_p, min_p, seeds, positions, out)
    _sample[(rows,)](
        logits,
        *columns,
        vocab,
        logits.stride(0),
        BAD,
        FIRST,
        SECOND,
        GAMMA,
        LEAST,
        TINY,
        block,
        num_warps=warps,
    )


@triton.jit
def _sample(
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    BAD: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    GAMMA: tl.constexpr,
    LEAST: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    top = tl.full([], float("-inf"), tl.float32)
    best = tl.full([], 0, tl.int32)
    nans = tl.full([], 0, tl.int32)
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        values = tl.load(line + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        is_nan = values != values
        nans += tl.sum(is_nan.to(tl.int32), axis=0)
        values = tl.where(is_nan, float("-inf"), values)
        highest = tl.max(values, axis=0)
        where = tl.min(tl.where(values == highest, ids, vocab), axis=0)
        best = tl.where(highest > top, where, best)
        top = tl.maximum(top, highest)
    temperature = tl.load(temperatures + row)
    if (nans > 0) | (top == float("inf")) | (top == float("-inf")):
        tl.store(out + row, BAD)
    elif temperature <= 0:
        tl.store(out + row, best)
    else:
        heat = tl.maximum(temperature, TINY).to(tl.float32)
        floor = tl.load(min_p + row).to(tl.float32)
        limit = tl.load(top_k + row)
        share = tl.load(top_p + row)
        mass = _mass(line, vocab, top, heat, 0.0, LEAST, BLOCK)
        if (limit > 0) & (limit < vocab):
            cut = _largest(line, vocab, top, heat, True, limit.to(tl.float64), LEAST, BLOCK)
            # Of those equal to the cut only as many count as make up the limit.
            above = _next(cut)
            rest = limit - _count(line, vocab, top, heat, above, LEAST, BLOCK)
            mass = _mass(line, vocab, top, heat, above, LEAST, BLOCK) + rest * cut.to(tl.float64)
            floor = tl.maximum(floor, cut)
        if share < 1:
            cut = _largest(line, vocab, top, heat, False, share * mass, LEAST, BLOCK)
            floor = tl.maximum(floor, cut)
        number = _uniform(tl.load(seeds + row), tl.load(positions + row), FIRST, SECOND, GAMMA)
        goal = number * _mass(line, vocab, top, heat, floor, LEAST, BLOCK)
        tl.store(out + row, _invert(line, vocab, top, heat, floor, goal, LEAST, BLOCK))


@triton.jit
def _weights(
    line: tl.tensor,
    ids: tl.tensor,
    vocab: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    LEAST: tl.constexpr,
) -> tl.tensor:
    """exp((logit - top) / heat), at most 1; 0 beyond the vocabulary. [BLOCK] float32"""
    values = tl.load(line + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    x = tl.div_rn(values - top, heat)
    return tl.where(x > LEAST, tl.exp(x), 0.0)


@triton.jit
def _mass(
    line: tl.tensor,
    vocab: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    floor: tl.tensor,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The sum of the weights that are not below `floor`."""
    mass = tl.full([], 0.0, tl.float64)
    for first in range(0, vocab, BLOCK):
        weights = _weights(line, first + tl.arange(0, BLOCK), vocab, top, heat, LEAST)
        kept = tl.where(weights >= floor, weights, 0.0)
        mass += tl.sum(kept.to(tl.float64), axis=0)
    return mass


@triton.jit
def _count(
    line: tl.tensor,
    vocab: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    floor: tl.tensor,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """How many weights are not below `floor`."""
    count = tl.full([], 0, tl.int64)
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        weights = _weights(line, ids, vocab, top, heat, LEAST)
        count += tl.sum(((weights >= floor) & (ids < vocab)).to(tl.int64), axis=0)
    return count


@triton.jit
def _largest(
    line: tl.tensor,
    vocab: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    COUNTED: tl.constexpr,
    goal: tl.tensor,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest floor that leaves weights of at least `goal`, in number (COUNTED) or in mass."""
    low = tl.full([], 0, tl.int32)  # enough are left
    high = tl.full([], 0x3F800001, tl.int32)  # the next float after 1: none are left
    while high - low > 1:
        middle = (low + high) // 2
        floor = middle.to(tl.float32, bitcast=True)
        if COUNTED:
            left = _count(line, vocab, top, heat, floor, LEAST, BLOCK).to(tl.float64)
        else:
            left = _mass(line, vocab, top, heat, floor, LEAST, BLOCK)
        if left >= goal:
            low = middle
        else:
            high = middle
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _next(x: tl.tensor) -> tl.tensor:
    """The least float above one that is not negative."""
    return (x.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)


@triton.jit
def _invert(
    line: tl.tensor,
    vocab: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    floor: tl.tensor,
    goal: tl.tensor,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The first token whose cumulated weight exceeds `goal`, else the last that has any."""
    mass = tl.full([], 0.0, tl.float64)
    found = vocab
    last = tl.full([], 0, tl.int32)
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        weights = _weights(line, ids, vocab, top, heat, LEAST)
        is_kept = (weights >= floor) & (weights > 0)
        cumulated = mass + tl.cumsum(tl.where(is_kept, weights, 0.0).to(tl.float64), axis=0)
        exceeding = tl.min(tl.where(is_kept & (cumulated > goal), ids, vocab), axis=0)
        found = tl.minimum(found, exceeding)
        last = tl.maximum(last, tl.max(tl.where(is_kept, ids, 0), axis=0))
        mass = tl.max(cumulated, axis=0)
    return tl.where(found < vocab, found, last)


@triton.jit
def _uniform(
    seed: tl.tensor,
    position: tl.tensor,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    GAMMA: tl.constexpr,
) -> tl.tensor:
    """A number in [0, 1): SplitMix64 (Steele, Lea, Flood 2014) of seed and position."""
    counter = _mix(seed.to(tl.uint64) + GAMMA, FIRST, SECOND)
    counter += (position.to(tl.uint64) + 1) * GAMMA
    return (_mix(counter, FIRST, SECOND) >> 11).to(tl.float64) * (2.0**-53)


@triton.jit
def _mix(x: tl.tensor, FIRST: tl.constexpr, SECOND: tl.constexpr) -> tl.tensor:
    x = (x ^ (x >> 30)) * FIRST
    x = (x ^ (x >> 27)) * SECOND
    return x ^ (x >> 31)
