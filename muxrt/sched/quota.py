"""Block quotas: who is entitled to how much, and how that moves with demand.

A quota is an entitlement, not a wall. Initial quotas follow the expected need (MuxServe section
3.3: rate x KV blocks per request); adaptation moves blocks from models that leave theirs unused
to models that are full and queueing, in proportion to what the donors can spare.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from muxrt.errors import ConfigError

HUNGRY_USE = 0.9  # of its quota: fuller than this and queueing = wants more
COMFORT_USE = 0.95  # a donor keeps this much headroom over what it uses: use / 0.95
MAX_STEP = 0.25  # of its quota a hungry model gains at most per period


@dataclass(frozen=True, slots=True)
class Demand:
    """What initial quotas are made from."""

    model: str
    floor_blocks: int  # one sequence of maximum length
    weight: float  # expected need: rate x blocks per request
    share: float | None = None  # configured share of the unit's blocks; None = by weight


@dataclass(frozen=True, slots=True)
class Usage:
    """What one model did with its quota in the last period."""

    quota_blocks: int
    floor_blocks: int
    peak_blocks: int  # most it held at once
    wanted_blocks: int  # what its queue would need on top, 0 when nobody waits


def initial_quotas(demands: list[Demand], num_blocks: int) -> dict[str, int]:
    """Split all blocks: configured shares first, the rest by weight, nobody below its floor.

    Raises ConfigError if the floors alone do not fit.
    """
    floors = sum(demand.floor_blocks for demand in demands)
    if floors > num_blocks:
        parts = ", ".join(f"{demand.model} {demand.floor_blocks}" for demand in demands)
        raise ConfigError(
            f"the arena holds {num_blocks} blocks, but one sequence of maximum length per model"
            f" needs {floors} ({parts}): raise memory.kv_bytes or lower max_model_len"
        )
    quotas = {d.model: max(d.floor_blocks, int((d.share or 0.0) * num_blocks)) for d in demands}
    _trim(quotas, demands, num_blocks)
    free = num_blocks - sum(quotas.values())
    weights = {d.model: d.weight for d in demands if d.share is None} or {
        d.model: d.weight for d in demands
    }
    return _fill(quotas, weights, free)


def _trim(quotas: dict[str, int], demands: list[Demand], num_blocks: int) -> None:
    """Lower configured shares towards the floors until all fit (floors may have raised others)."""
    excess = sum(quotas.values()) - num_blocks
    if excess <= 0:
        return
    spare = {d.model: quotas[d.model] - d.floor_blocks for d in demands}
    for model, part in split(excess, spare).items():
        quotas[model] -= part


def _fill(quotas: dict[str, int], weights: Mapping[str, float], free: int) -> dict[str, int]:
    """Hand out `free` blocks so that the totals of the weighted models follow the weights.

    A model whose floor is already above its fair total gets nothing (water filling).
    """
    while free > 0:
        total = free + sum(quotas[model] for model in weights)
        scale = sum(weights.values()) or 1.0
        fair = {m: total * (w / scale if scale else 1 / len(weights)) for m, w in weights.items()}
        poor = {m: w for m, w in weights.items() if fair[m] > quotas[m]}
        if len(poor) == len(weights) or not poor:
            gaps = {m: max(1.0, fair[m] - quotas[m]) for m in poor or weights}
            for model, part in split(free, gaps).items():
                quotas[model] += part
            break
        weights = poor
    return quotas


def adapt(usages: Mapping[str, Usage]) -> dict[str, int]:
    """New quotas (same sum): donors give spare blocks to hungry models, all in proportion."""
    wants = {model: _want(usage) for model, usage in usages.items()}
    spares = {model: 0 if wants[model] else _spare(usage) for model, usage in usages.items()}
    moved = min(sum(wants.values()), sum(spares.values()))
    gains, losses = split(moved, wants), split(moved, spares)
    return {
        model: usage.quota_blocks + gains.get(model, 0) - losses.get(model, 0)
        for model, usage in usages.items()
    }


def _want(usage: Usage) -> int:
    full = usage.peak_blocks >= HUNGRY_USE * usage.quota_blocks
    if not (full and usage.wanted_blocks):
        return 0
    return min(usage.wanted_blocks, max(1, int(MAX_STEP * usage.quota_blocks)))


def _spare(usage: Usage) -> int:
    kept = max(usage.floor_blocks, int(usage.peak_blocks / COMFORT_USE) + 1)
    return max(0, usage.quota_blocks - kept)


def split(amount: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`amount` in whole parts proportional to `weights`; the parts add up exactly.

    With integer weights that sum to at least `amount`, no part exceeds its weight.
    """
    total = sum(weights.values())
    if amount <= 0 or total <= 0:
        return {}
    exact = {key: amount * weight / total for key, weight in weights.items()}
    parts = {key: int(value) for key, value in exact.items()}
    # Largest remainder first; ties by name, so that the same input gives the same split.
    by_remainder = sorted(exact, key=lambda key: (parts[key] - exact[key], key))
    for key in by_remainder[: amount - sum(parts.values())]:
        parts[key] += 1
    return parts
