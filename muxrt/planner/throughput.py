"""MuxServe's own estimator: steady-state throughput of a unit (ICML 2024, equation 3).

    tpt(m) = b_m / (sum over i of t_prefill,i(b_i) + output_m x t_decode,m(b_m))

Prefills of a unit run one after the other, decodes overlap perfectly, nothing ever waits. b_m is
the smallest batch that meets the rate, as far as its share of the KV memory and the largest
profiled batch allow; shares are in proportion to rate x bytes per token (the paper's fairness).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from muxrt.planner.workload import Problem

LARGEST_BATCH = 256  # per GPU: what was profiled
NUM_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Guest:
    """A model of a unit, with the share of SMs that its decodes get, in per cent."""

    model: str
    decode_pct: int


def throughput_rps(problem: Problem, pool: int, tp: int, guests: Sequence[Guest]) -> list[float]:
    """Requests/s of each guest, at most its rate. Empty memory or worse: zeros."""
    limits = _batch_limits(problem, pool, tp, guests)
    if min(limits, default=0) < 1:
        return [0.0] * len(guests)
    batches = [1] * len(guests)
    for _ in range(NUM_ROUNDS):
        before = list(batches)
        for index, guest in enumerate(guests):
            others_s = sum(
                _prefill_s(problem, pool, tp, other, batch)
                for k, (other, batch) in enumerate(zip(guests, batches, strict=True))
                if k != index
            )
            batches[index] = _smallest_batch(problem, pool, tp, guest, others_s, limits[index])
        if batches == before:
            break
    prefills_s = sum(
        _prefill_s(problem, pool, tp, guest, batch)
        for guest, batch in zip(guests, batches, strict=True)
    )
    return [
        min(
            batch / (prefills_s + _decodes_s(problem, pool, tp, guest, batch)),
            problem.demands[guest.model].rate_rps,
        )
        for guest, batch in zip(guests, batches, strict=True)
    ]


def _prefill_s(problem: Problem, pool: int, tp: int, guest: Guest, batch: int) -> float:
    prompt = problem.demands[guest.model].prompt.mean
    steps = problem.steps(guest.model, pool, tp, 1.0)
    return steps.mean_prefill_s(batch * prompt, batch * prompt * prompt)


def _decodes_s(problem: Problem, pool: int, tp: int, guest: Guest, batch: int) -> float:
    """All steps of one answer, at its mean context."""
    demand = problem.demands[guest.model]
    context = demand.prompt.mean + demand.output.mean / 2
    steps = problem.steps(guest.model, pool, tp, guest.decode_pct / 100)
    step_s = steps.decode_s(batch, batch * context) + problem.engine.control_s * batch
    return demand.output.mean * step_s


def _batch_limits(problem: Problem, pool: int, tp: int, guests: Sequence[Guest]) -> list[int]:
    room = problem.kv_bytes(pool, tp, tuple(guest.model for guest in guests))
    demands = [problem.demands[guest.model] for guest in guests]
    token_bytes = [problem.bytes(guest.model, tp).kv_per_token for guest in guests]
    weights = [d.rate_rps * size for d, size in zip(demands, token_bytes, strict=True)]
    return [
        min(
            LARGEST_BATCH * tp,
            int(room * weight / sum(weights) / (size * (d.prompt.mean + d.output.mean))),
        )
        for d, size, weight in zip(demands, token_bytes, weights, strict=True)
    ]


def _smallest_batch(
    problem: Problem, pool: int, tp: int, guest: Guest, others_s: float, limit: int
) -> int:
    """The smallest batch that meets the guest's rate; `limit` where none does."""
    rate = problem.demands[guest.model].rate_rps

    def meets(batch: int) -> bool:
        own_s = _prefill_s(problem, pool, tp, guest, batch)
        return batch >= rate * (others_s + own_s + _decodes_s(problem, pool, tp, guest, batch))

    low, high = 0, limit
    if not meets(high):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
