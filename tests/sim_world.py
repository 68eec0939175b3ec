"""Small placements on GPUs and requests for them; times by roofline, so nothing is fitted."""

from collections.abc import Sequence

from muxrt.config.placement import (
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
    Slo,
    UnitModel,
    UnitSpec,
)
from muxrt.config.plan import EngineFacts
from muxrt.config.presets import PRESETS
from muxrt.config.serve import ServeConfig
from muxrt.cost.model import CostModel
from muxrt.cost.roofline import Efficiency
from muxrt.cost.steps import Steps
from muxrt.sim.setting import Setting
from muxrt.workload.arrivals import Arrival

GB = 10**9
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
COST = CostModel(efficiency=Efficiency())
ONE_LANE = Lanes(kind="stream", depth=1)


def setting(*models: str, preset: str = "llama-7b", facts: EngineFacts | None = None) -> Setting:
    """All `models` have the same shape."""
    shapes = dict.fromkeys(models, PRESETS[preset])
    return Setting(shapes, COST, facts or EngineFacts())


def steps(share: float = 1.0, tp: int = 1, preset: str = "llama-7b") -> Steps:
    """Times of the models of `setting`."""
    gpus = setting("a").gpus
    return COST.steps(PRESETS[preset], tp, gpus["a100-80g"]).at(share)


def unit(
    *models: str,
    name: str = "u",
    gpus: Sequence[int] = (0,),
    lanes: Lanes = ONE_LANE,
    kv_bytes: int = 40 * GB,
    parts: Sequence[UnitModel] = (),
    scheduling: Scheduling | None = None,
) -> UnitSpec:
    """A unit on A100s; `parts` instead of names where a model needs more than its name."""
    return UnitSpec(
        name=name,
        models=tuple(parts) or tuple(UnitModel(name=model) for model in models),
        memory=Memory(kv_bytes=kv_bytes),
        mesh=Mesh(device="gpu", kind="a100-80g", node=0, gpus=tuple(gpus)),
        lanes=lanes,
        scheduling=scheduling or Scheduling(prefill_tokens=2048),
    )


def config(*units: UnitSpec, models: Sequence[ModelSpec] = ()) -> ServeConfig:
    """A placement; `models` instead of plain ones with the usual targets."""
    names = dict.fromkeys(part.name for one in units for part in one.models)
    plain = tuple(ModelSpec(name=name, preset="llama-7b", slo=SLO) for name in names)
    return ServeConfig(models=tuple(models) or plain, units=units)


def burst(
    model: str, num: int, *, at_s: float = 0.0, prompt: int = 100, output: int = 10
) -> list[Arrival]:
    """Requests at the same time."""
    return [Arrival(at_s, model, prompt, output)] * num
