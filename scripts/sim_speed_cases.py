"""What the simulator's speed is measured on: Azure's conversation hour, and a large cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec
from bench_planner import place
from planner_worlds import MAX_TOKENS, WORKLOAD, large

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
from muxrt.planner.assign import in_order, to_placement
from muxrt.planner.queueing import QueueingJudge
from muxrt.sim.setting import Setting
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Traffic, load_workload
from muxrt.workload.trace import TraceRow, read_trace

GB = 10**9
GPU = "h100-80g"
SLO = Slo(ttft_s=2.0, tpot_s=0.1)
MIX = ("llama3-8b", "llama3-8b", "llama2-13b", "mistral-7b")
ALPHA = 0.9  # of the popularity in the mix
ONE_LANE = Lanes(kind="stream", depth=2)
TWO_LANES = Lanes(kind="green", sm_pct=(60, 40), depth=2)


@dataclass(frozen=True, slots=True)
class Case:
    """A placement, what it is simulated in, and its requests in order of time."""

    config: ServeConfig
    setting: Setting
    arrivals: Sequence[Arrival]


def _unit(name: str, models: Sequence[str], gpus: Sequence[int], lanes: Lanes, kv: int) -> UnitSpec:
    return UnitSpec(
        name=name,
        models=tuple(UnitModel(name=model) for model in models),
        memory=Memory(kv_bytes=kv),
        mesh=Mesh(device="gpu", kind=GPU, node=0, gpus=tuple(gpus)),
        lanes=lanes,
        scheduling=Scheduling(prefill_tokens=2048, max_sequences=256),
    )


def _case(
    shapes: dict[str, str], units: Sequence[UnitSpec], length: int, found: list[Arrival]
) -> Case:
    models = tuple(
        ModelSpec(name=name, preset=preset, slo=SLO, max_model_len=length, max_queue=10_000)
        for name, preset in shapes.items()
    )
    known = {name: PRESETS[preset] for name, preset in shapes.items()}
    setting = Setting(known, CostModel(efficiency=Efficiency()), EngineFacts(interference=0.1))
    return Case(ServeConfig(models=models, units=tuple(units)), setting, found)


def azure_case(name: str, rows: Sequence[TraceRow]) -> Case:
    """`rows` on 8 H100: one large model, replicas of a small one, or 16 models on 4 meshes.

    Answers are as recorded; prompts are cut to what a model can hold with them.
    """
    if name == "70b":
        units = [_unit("u0", ["m"], range(8), ONE_LANE, 380 * GB)]
        return _case({"m": "llama3-70b"}, units, 8192, _dealt(rows, ["m"], 8192))
    if name == "8b":
        units = [_unit(f"u{gpu}", ["m"], [gpu], ONE_LANE, 50 * GB) for gpu in range(8)]
        return _case({"m": "llama3-8b"}, units, 8192, _dealt(rows, ["m"], 8192))
    lanes = {"mix": ONE_LANE, "mix on two lanes": TWO_LANES}[name]
    names = [f"m{index}" for index in range(4 * len(MIX))]
    units = [
        _unit(f"u{index}", names[index::4], [2 * index, 2 * index + 1], lanes, 80 * GB)
        for index in range(4)
    ]
    shapes = {name: MIX[index // 4] for index, name in enumerate(names)}
    return _case(shapes, units, 4096, _dealt(rows, names, 4096))


AZURE_CASES = ("70b", "8b", "mix", "mix on two lanes")


def _dealt(rows: Sequence[TraceRow], models: Sequence[str], length: int) -> list[Arrival]:
    rng, weights = Random(3), [(rank + 1) ** -ALPHA for rank in range(len(models))]
    longest = length - max(row.output_tokens for row in rows)
    return [
        Arrival(
            row.at_s,
            rng.choices(models, weights)[0],
            max(1, min(row.prompt_tokens, longest)),
            max(1, row.output_tokens),
        )
        for row in rows
    ]


def azure_rows(trace: Path, duration_s: float) -> list[TraceRow]:
    """The requests of the first seconds of a trace."""
    return [row for row in read_trace(trace) if row.at_s < duration_s]


def large_case(models: int, gpus: int, requests: int, load: float) -> Case:
    """LLaMAs of four sizes where `muxrt plan` puts them, popularity 1 / rank (planner_worlds).

    `load` is the traffic's part of what was planned for, which is somewhat more than is served.
    """
    problem = large(models, gpus)
    draft, _ = place("auto", problem)
    draft = in_order(problem, draft)
    placement = to_placement(problem, draft, QueueingJudge(problem)(draft))
    rates = {name: load * demand.rate_rps for name, demand in problem.demands.items()}
    workload = msgspec.structs.replace(
        load_workload(WORKLOAD),
        models=tuple(Traffic(name=name, rate_rps=rate) for name, rate in rates.items()),
        power_law=None,
        # For more than are asked for, as their number is random (5 sigma): the first are taken.
        duration_s=(requests + 5 * requests**0.5) / sum(rates.values()),
    )
    specs = tuple(
        ModelSpec(
            name=name,
            preset="llama-7b",  # for its dtype; the setting has the shapes
            slo=demand.slo,
            max_model_len=MAX_TOKENS,
            rate_rps=rates[name],
        )
        for name, demand in problem.demands.items()
    )
    setting = Setting({n: d.shape for n, d in problem.demands.items()}, problem.cost)
    config = ServeConfig(models=specs, units=placement.units)
    return Case(config, setting, arrivals(workload)[:requests])
