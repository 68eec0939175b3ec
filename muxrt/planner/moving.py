"""What it costs to go from one placement to another, and whether that is worth it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from muxrt.config.placement import UnitSpec
from muxrt.planner.diff import Diff, Fate


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast units come up."""

    load_bytes_per_s: float  # of a node: weights, from where they are kept into its memory
    unit_start_s: float  # of a unit, beside its weights


@dataclass(frozen=True, slots=True)
class Cost:
    """What a change takes."""

    loaded_bytes: Mapping[str, int]  # weights, by unit that starts
    reduced_s: float  # until the last of them serves
    lost_requests: float  # at most: those that come meanwhile for units that are down

    @property
    def total_bytes(self) -> int:
        return sum(self.loaded_bytes.values())


def cost_of(
    found: Diff,
    weight_bytes: Callable[[str, int], int],
    rates_rps: Mapping[str, float],
    speed: Speed,
) -> Cost:
    """The cost if every unit that goes does so before any other comes.

    `weight_bytes` is of a model on a mesh of so many GPUs, all of them together; `rates_rps` are
    of the models. All units of a node load at once and share its bandwidth. Other replicas may take
    what is counted as lost, and requests may wait: this is the most that it can cost.
    """
    loaded = {
        one.new.name: _bytes(one.new, weight_bytes)
        for one in found.of(Fate.ADDED, Fate.CHANGED)
        if one.new is not None
    }
    by_node: dict[int, int] = {}
    for one in found.of(Fate.ADDED, Fate.CHANGED):
        if one.new is not None:
            node = (one.new.mesh.nodes or (one.new.mesh.node or 0,))[0]
            by_node[node] = by_node.get(node, 0) + loaded[one.new.name]
    slowest = max(by_node.values(), default=0) / speed.load_bytes_per_s
    reduced_s = slowest + speed.unit_start_s if loaded else 0.0
    shares = _shares([one.old for one in found.units if one.old is not None])
    down = [one.old for one in found.of(Fate.REMOVED, Fate.CHANGED) if one.old is not None]
    lost_rps = sum(
        rates_rps.get(part.name, 0.0) * shares[unit.name, part.name, part.role]
        for unit in down
        for part in unit.models
        if part.role != "decode"  # the request was counted where it begins
    )
    return Cost(loaded, reduced_s, lost_rps * reduced_s)


def _bytes(unit: UnitSpec, weight_bytes: Callable[[str, int], int]) -> int:
    size = len(unit.mesh.gpus or (0,))
    return sum(weight_bytes(part.name, size) for part in unit.models)


def _shares(units: Sequence[UnitSpec]) -> dict[tuple[str, str, str], float]:
    """The part of a model's requests that each unit gets, by (unit, model, role)."""
    totals: dict[tuple[str, bool], float] = {}
    for unit in units:
        for part in unit.models:
            key = part.name, part.role == "decode"
            totals[key] = totals.get(key, 0.0) + part.traffic
    return {
        (unit.name, part.name, part.role): part.traffic / totals[part.name, part.role == "decode"]
        for unit in units
        for part in unit.models
    }


@dataclass(frozen=True, slots=True)
class Terms:
    """When a change is made: the hysteresis."""

    window_s: float  # in which it must earn its cost
    margin: float = 1.0  # it must earn its cost so many times over again
    least_gain: float = 0.02  # of what is served now: less is within the error of a prediction


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to go, and why."""

    is_worth: bool
    gain_rps: float
    reason: str


def decide(
    found: Diff, goodput_rps: float, gains_rps: Sequence[float], cost: Cost, terms: Terms
) -> Decision:
    """`gains_rps`: what the change adds to `goodput_rps`, in each way that the traffic may go."""
    gain = fmean(gains_rps)
    if found.is_empty:
        return Decision(False, gain, "the old placement is as good as any that was found")
    if gain <= 0:
        return Decision(False, gain, "nothing that was found serves more")
    if gain < terms.least_gain * goodput_rps:
        return Decision(
            False,
            gain,
            f"it would gain {gain:.2f} requests/s, less than {terms.least_gain:.0%} of"
            f" {goodput_rps:.2f}",
        )
    earned, price = gain * terms.window_s, (1 + terms.margin) * cost.lost_requests
    said = (
        f"it earns {earned:.0f} requests in {terms.window_s / 3600:g} h, its move costs at most"
        f" {cost.lost_requests:.0f}, which {{}} {1 + terms.margin:g} times over"
    )
    if earned < price:
        return Decision(False, gain, said.format("it does not earn"))
    return Decision(True, gain, said.format("it earns"))
