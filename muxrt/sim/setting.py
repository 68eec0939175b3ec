"""What placements are simulated in: everything that is not the placement and not the traffic."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from muxrt.config.cluster import KINDS, GpuKind
from muxrt.config.model import ModelShape
from muxrt.config.plan import EngineFacts
from muxrt.cost.model import CostModel


@dataclass(frozen=True, slots=True)
class Setting:
    """Shapes by model, step times, GPUs by kind, and what the engine costs beside the steps."""

    shapes: Mapping[str, ModelShape]
    cost: CostModel
    engine: EngineFacts = field(default_factory=EngineFacts)
    gpus: Mapping[str, GpuKind] = field(default_factory=lambda: dict(KINDS))
    control_s: Mapping[str, float] = field(default_factory=dict)  # by model, before the engine's
    # Clients say how many tokens they want and get them all, as `muxrt bench` does; otherwise an
    # answer ends by itself, and the brain cannot know when.
    asks_exactly: bool = False
    fold: bool = True  # runs of decode steps, for speed; results are the same either way
