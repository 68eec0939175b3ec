"""DistServe's instances of OPT on A100-80G, as its repository describes them."""

from functools import cache
from math import floor
from pathlib import Path

import numpy as np

from muxrt.cost.coefficients import LinearSteps, read_coefficients
from muxrt.planner.phase_tables import Limits, costs_of, distserve_overheads, published_costs
from muxrt.planner.phases import Instance, Traffic, saturating_tokens

PROFILES = Path(__file__).parent.parent / "configs" / "profiles"
LAYERS_HIDDEN = {"opt-13b": (40, 5120), "opt-66b": (64, 9216)}
LONGEST = 2048


@cache
def coefficients(engine: str) -> dict[tuple[str, int], LinearSteps]:
    """The own engine's, or vLLM's."""
    name = "opt_a100.csv" if engine == "own" else "opt_a100_vllm.csv"
    return read_coefficients(PROFILES / name, engine)


def kv_capacity(model: str, tp: int, pp: int) -> int:
    """Tokens of an instance as DistServe counts them; its memory_estimator.py, on 84.99 GB."""
    layers, hidden = LAYERS_HIDDEN[model]
    layers //= pp
    weights = 2 * (50265 * hidden + 2048 * hidden + 12 * layers * hidden**2 / tp)
    weights += 2 * 5 * layers * hidden
    block = 64 * layers * hidden / tp
    return 16 * floor((0.95 * 84.9905e9 - 0.01 * 84.9905e9 - weights) / block)


@cache
def instance(
    model: str, tp: int, pp: int = 1, *, engine: str = "own", compat: bool = False
) -> Instance | None:
    """An instance; None where the degree was not profiled, or the weights do not fit."""
    steps = coefficients(engine).get((model, tp))
    layers, _ = LAYERS_HIDDEN[model]
    kv_tokens = kv_capacity(model, tp, pp) if layers % pp == 0 else 0
    if steps is None or kv_tokens < LONGEST:
        return None
    limits = Limits(LONGEST, LONGEST, 1024, kv_tokens)
    if compat:
        costs = published_costs(steps.published, limits, pp, distserve_overheads(pp))
    else:
        costs = costs_of(steps.at(1.0), limits, pp)
    return Instance(tp, pp, costs, limits, saturating_tokens(steps.prefill_s, LONGEST))


def all_alike(prompt: int, output: int, num: int = 20_000, seed: int = 0) -> Traffic:
    """Poisson arrivals of equal requests."""
    gaps = np.random.default_rng(seed).exponential(size=num)
    return Traffic(gaps, np.full(num, prompt), np.full(num, output))
