"""The largest rate that a placement serves with its targets kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from muxrt.config.placement import Slo
from muxrt.config.serve import ServeConfig
from muxrt.sim.group import Served, Simulation
from muxrt.sim.report import meets
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import tasks
from muxrt.workload.arrivals import Arrival

PRECISION = 0.02  # of the speed that is found
MOST_DOUBLINGS = 12


class Tally:
    """Counts who met the targets, until it is certain whether enough will."""

    def __init__(self, num_requests: int, target: float, slos: Mapping[str, Slo | None]) -> None:
        """`target` is the share of `num_requests` that must meet theirs, in (0, 1]."""
        self._needed = ceil(target * num_requests - 1e-9)
        self._may_miss = num_requests - self._needed
        self._slos = slos
        self.num_met = self.num_missed = 0

    def ended(self, served: Served) -> None:
        """A request got its last token, or was refused."""
        met = meets(served, self._slos[served.model])
        self.num_met += met
        self.num_missed += not met

    @property
    def is_enough(self) -> bool:
        return self.num_met >= self._needed

    @property
    def is_certain(self) -> bool:
        """The rest of the requests cannot change the answer."""
        return self.is_enough or self.num_missed > self._may_miss


def attains(
    config: ServeConfig,
    setting: Setting,
    arrivals: Sequence[Arrival],
    slos: Mapping[str, Slo | None],
    target: float,
) -> bool:
    """Whether at least `target` of the requests meet both targets; simulates no more than needed.

    Raises ConfigError as `simulate` does.
    """
    tally = Tally(len(arrivals), target, slos)
    for task in tasks(config, setting, arrivals):
        Simulation(task.group, task.setting, tally).run(task.arrivals)
        if tally.is_certain:
            break
    return tally.is_enough


@dataclass(frozen=True, slots=True)
class Found:
    """The largest speed that was seen to be fast enough, and the smallest that was not."""

    speed: float  # 0: not even the slowest was
    too_fast: float
    num_tried: int


def find_speed(attains_at: Callable[[float], bool], precision: float = PRECISION) -> Found:
    """Bisect for the largest speed (1 = the rates as given) at which `attains_at` holds.

    Every speed is asked with the same random numbers, so that only the speed differs.
    """
    low, high, tried = 0.0, 1.0, 1
    if attains_at(1.0):
        while tried <= MOST_DOUBLINGS:
            low, high, tried = high, 2 * high, tried + 1
            if not attains_at(high):
                break
    else:
        while tried <= MOST_DOUBLINGS and not low:
            tried += 1
            low, high = (high / 2, high) if attains_at(high / 2) else (0.0, high / 2)
    while low and high - low > precision * low:
        middle, tried = (low + high) / 2, tried + 1
        low, high = (middle, high) if attains_at(middle) else (low, middle)
    return Found(low, high, tried)
