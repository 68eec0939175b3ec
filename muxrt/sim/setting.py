"""What placements are simulated in: everything that is not the placement and not the traffic."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from muxrt.config.cluster import KINDS, GpuKind
from muxrt.config.model import ModelShape
from muxrt.config.plan import EngineFacts
from muxrt.cost.model import CostModel
from muxrt.errors import ConfigError

NETWORK_BYTES_PER_S = 25e9  # between nodes, of each, in each direction: 200 Gb/s


@dataclass(frozen=True, slots=True)
class Failure:
    """A unit's process dies."""

    unit: str
    at_s: float
    down_s: float | None = None  # until it is loaded again; None: never

    def __post_init__(self) -> None:
        if self.at_s < 0 or (self.down_s is not None and self.down_s <= 0):
            raise ConfigError(
                f"{self.unit}: found a failure at {self.at_s:g} s for {self.down_s} s, expected"
                " at least 0, and more than 0 until it is back"
            )

    @property
    def ends_s(self) -> float:
        """When it is back."""
        return math.inf if self.down_s is None else self.at_s + self.down_s


@dataclass(frozen=True, slots=True)
class Setting:
    """Shapes by model, step times, GPUs by kind, and what the engine costs beside the steps."""

    shapes: Mapping[str, ModelShape]
    cost: CostModel
    engine: EngineFacts = field(default_factory=EngineFacts)
    gpus: Mapping[str, GpuKind] = field(default_factory=lambda: dict(KINDS))
    control_s: Mapping[str, float] = field(default_factory=dict)  # by model, before the engine's
    failures: tuple[Failure, ...] = ()
    network_bytes_per_s: float = NETWORK_BYTES_PER_S
    # Clients say how many tokens they want and get them all, as `muxrt bench` does; otherwise an
    # answer ends by itself, and the brain cannot know when.
    asks_exactly: bool = False
    fold: bool = True  # runs of decode steps, for speed; results are the same either way
