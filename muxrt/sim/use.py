"""How full and how busy units were, over time and in all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SAMPLE_S = 1.0  # how often units are looked at
# Twice as many become half as many, twice as long: a day takes no more room than a minute.
MOST_INTERVALS = 200


@dataclass(frozen=True, slots=True)
class OverTime:
    """A unit in equal intervals from the start of the run.

    `interval_s` is in seconds. A value of `kv` is the mean share of the unit's blocks that the
    model held, looked at once a second; one of `lanes` the share of the interval that a lane was
    busy. The last interval may be shorter than the others.
    """

    interval_s: float
    kv: Mapping[str, tuple[float, ...]]  # by model
    lanes: tuple[tuple[float, ...], ...]  # by lane


@dataclass(slots=True)
class _Interval:
    """Sums of samples."""

    num_samples: int
    kv: list[float]
    busy_s: list[float]

    def merged(self, other: "_Interval") -> "_Interval":
        """Both as one."""
        return _Interval(
            self.num_samples + other.num_samples,
            [a + b for a, b in zip(self.kv, other.kv, strict=True)],
            [a + b for a, b in zip(self.busy_s, other.busy_s, strict=True)],
        )


@dataclass(slots=True)
class Gauge:
    """Looks at a unit every `SAMPLE_S` seconds."""

    models: tuple[str, ...]
    num_lanes: int
    num_samples: int = 0
    total: float = 0.0
    peak: float = 0.0
    _samples_each: int = 1  # of an interval
    _intervals: list[_Interval] = field(default_factory=list)
    _busy_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._busy_s = [0.0] * self.num_lanes

    def add(self, kv: Sequence[float], busy_s: Sequence[float]) -> None:
        """`kv`: shares of the blocks, by model; `busy_s`: seconds since the start, by lane."""
        share = sum(kv)
        self.num_samples += 1
        self.total += share
        self.peak = max(self.peak, share)
        since = [now - before for now, before in zip(busy_s, self._busy_s, strict=True)]
        self._busy_s = list(busy_s)
        sample = _Interval(1, list(kv), since)
        kept = self._intervals
        if kept and kept[-1].num_samples < self._samples_each:
            kept[-1] = kept[-1].merged(sample)
            return
        if len(kept) == 2 * MOST_INTERVALS:
            self._samples_each *= 2
            kept[:] = [a.merged(b) for a, b in zip(kept[::2], kept[1::2], strict=True)]
        kept.append(sample)

    def over_time(self) -> OverTime:
        """All samples so far."""
        kv = {
            model: tuple(one.kv[index] / one.num_samples for one in self._intervals)
            for index, model in enumerate(self.models)
        }
        lanes = tuple(
            tuple(one.busy_s[lane] / (one.num_samples * SAMPLE_S) for one in self._intervals)
            for lane in range(self.num_lanes)
        )
        return OverTime(self._samples_each * SAMPLE_S, kv, lanes)


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What one model did in one unit."""

    model: str
    preemptions_swap: int
    preemptions_recompute: int
    quota_blocks: int  # at the end


@dataclass(frozen=True, slots=True)
class UnitUse:
    """How busy one unit was until its last request ended."""

    unit: str
    num_blocks: int
    kv_mean: float  # share of the blocks that sequences held, sampled once a second
    kv_peak: float
    lanes_busy: tuple[float, ...]  # share of the time, by lane
    num_batches: int
    deaths: int
    down_s: float  # of the time until its last request ended
    models: tuple[ModelUse, ...]
    over_time: OverTime
