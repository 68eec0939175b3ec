"""How long requests took, and whether that was what was promised. Pure arithmetic, seconds."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import ceil, floor
from typing import Protocol


class Targets(Protocol):
    """What is promised (`config.placement.Slo`)."""

    @property
    def ttft_s(self) -> float: ...

    @property
    def tpot_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one request took, as its client saw it."""

    ttft_s: float | None  # None: no token ever came
    tpot_s: float | None  # None: fewer than two tokens, so nothing could be late


def tpot_s(first_s: float, last_s: float, output_tokens: int) -> float | None:
    """Mean time per output token after the first; None where there is none."""
    return (last_s - first_s) / (output_tokens - 1) if output_tokens > 1 else None


def percentile(values: Iterable[float], pct: float) -> float | None:
    """The value below which `pct` per cent lie, interpolated linearly; None of nothing."""
    if not 0 <= pct <= 100:
        raise ValueError(f"a percentile is between 0 and 100: {pct}")
    ordered = sorted(values)
    if not ordered:
        return None
    rank = (len(ordered) - 1) * pct / 100
    low, high = ordered[floor(rank)], ordered[ceil(rank)]
    return low + (high - low) * (rank - floor(rank))


def is_met(timing: Timing, targets: Targets) -> bool:
    """Both targets kept; a request without a token keeps none."""
    if timing.ttft_s is None or timing.ttft_s > targets.ttft_s:
        return False
    return timing.tpot_s is None or timing.tpot_s <= targets.tpot_s


def attainment(timings: Collection[Timing], targets: Targets) -> float | None:
    """Share of requests that met BOTH targets; None of nothing."""
    if not timings:
        return None
    return sum(is_met(timing, targets) for timing in timings) / len(timings)


def goodput_rps(timings: Iterable[Timing], targets: Targets, wall_s: float) -> float:
    """Requests per second that met both targets. Raises ValueError unless `wall_s` > 0."""
    if wall_s <= 0:
        raise ValueError(f"goodput needs a duration: wall_s={wall_s}")
    return sum(is_met(timing, targets) for timing in timings) / wall_s
