"""Traffic whose mix shifts, on eight A100 of which four prefill: policies of the router, compared.

OPT-13B with DistServe's coefficients. Prompts are long and answers short in the first half, the
other way round in the second; each is more than four GPUs can do of that phase.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from muxrt.config.cluster import KINDS
from muxrt.config.placement import (
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Role,
    Scheduling,
    Slo,
    UnitModel,
    UnitSpec,
)
from muxrt.config.profile import sizes_of
from muxrt.config.routing import Routing
from muxrt.config.serve import ServeConfig
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.metrics import percentile
from muxrt.planner.phases import saturating_tokens
from muxrt.sim.group import Served
from muxrt.sim.report import meets, timing
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import simulate
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Lengths, Traffic, Workload

PROFILE = load_profile(Path(__file__).parent.parent / "configs" / "profiles" / "opt_a100.yaml")
SHAPE = PROFILE.shapes["opt-13b"]
SETTING = Setting({"chat": SHAPE}, CostModel([PROFILE]))
MODEL = ModelSpec(name="chat", sizes=sizes_of(SHAPE), slo=Slo(ttft_s=0.4, tpot_s=0.1))
KV_BYTES = 48 * 10**9  # of 80 GB; weights take 26
NUM_GPUS, LONGEST = 8, 2048
HALF_S = 60.0


def placement(routing: Routing, num_prefill: int | None = NUM_GPUS // 2) -> ServeConfig:
    """So many GPUs prefill and the others decode; None: all do both."""
    gpu = KINDS["a100-80g"]
    steps = SETTING.cost.steps(SHAPE, 1, gpu).at(1.0)
    scheduling = Scheduling(
        policy="fcfs", prefill_tokens=saturating_tokens(steps.prefill_s, LONGEST)
    )

    def unit(index: int) -> UnitSpec:
        role: Role = "mixed"
        if num_prefill is not None:
            role = "prefill" if index < num_prefill else "decode"
        return UnitSpec(
            name=f"{role}-{index}",
            models=(UnitModel(name="chat", role=role),),
            memory=Memory(kv_bytes=KV_BYTES),
            mesh=Mesh(device="gpu", kind=gpu.name, node=0, gpus=(index,)),
            lanes=Lanes(kind="stream"),
            scheduling=scheduling,
        )

    units = tuple(unit(index) for index in range(NUM_GPUS))
    return ServeConfig(models=(MODEL,), units=units, routing=routing)


def in_both(num_prefill: int, num_decode: int) -> ServeConfig:
    """So many GPUs serve the model apart, the others colocated; traffic as there are GPUs."""
    units = []
    for index, unit in enumerate(placement(Routing()).units):
        role: Role = "mixed"
        if index < num_prefill + num_decode:
            role = "prefill" if index < num_prefill else "decode"
        traffic = (num_prefill + num_decode) / num_prefill if role == "prefill" else 1.0
        models = (UnitModel(name="chat", role=role, traffic=traffic),)
        units.append(msgspec.structs.replace(unit, name=f"{role}-{index}", models=models))
    return ServeConfig(models=(MODEL,), units=tuple(units))


def shifting(first: Traffic, second: Traffic, seed: int) -> list[Arrival]:
    """The one for `HALF_S` seconds, then the other."""
    halves = [
        arrivals(Workload(duration_s=HALF_S, seed=2 * seed + index, models=(traffic,)))
        for index, traffic in enumerate((first, second))
    ]
    return halves[0] + [replace(a, at_s=a.at_s + HALF_S) for a in halves[1]]


def traffic(rate_rps: float, prompt: int, output: int) -> Traffic:
    """Lengths vary by 70 %."""
    return Traffic(
        name="chat",
        rate_rps=rate_rps,
        prompt=Lengths(mean_tokens=prompt, cv=0.7, max_tokens=1500),
        output=Lengths(mean_tokens=output, cv=0.7, max_tokens=500),
    )


def serve(config: ServeConfig, asked: list[Arrival]) -> dict[str, Any]:
    """What became of them: attainment by half, tails, and how often units changed their role."""
    run = simulate(config, SETTING, asked)
    halves = [[one for one in run.served if (one.at_s >= HALF_S) == late] for late in (False, True)]
    return {
        "attainment": [_attainment(half) for half in (*halves, run.served)],
        "ttft_p90_s": [_p90([timing(one).ttft_s for one in half]) for half in halves],
        "tpot_p90_s": [_p90([timing(one).tpot_s for one in half]) for half in halves],
        "borrowed": sum(switch.after == "mixed" for _, switch in run.switches),
    }


def _attainment(served: "list[Served] | tuple[Served, ...]") -> float:
    return sum(meets(one, MODEL.slo) for one in served) / len(served)


def _p90(values: list[float | None]) -> float | None:
    return percentile([value for value in values if value is not None], 90)


POLICIES = {
    "distserve": placement(Routing()),
    "splitwise, nobody borrows": placement(Routing(policy="splitwise", borrow=False)),
    "splitwise": placement(Routing(policy="splitwise")),
    "all units mixed": placement(Routing(), None),
}
# Prompts first, answers then; the mean of both all the time; in either half less than four GPUs do.
TRAFFICS = {
    "shifting": (traffic(38, 900, 60), traffic(28, 250, 350)),
    "steady": (traffic(30, 500, 180), traffic(30, 500, 180)),
    "light": (traffic(15, 500, 180), traffic(15, 500, 180)),
}
# High and low marks: prefill batches, shares of the KV memory.
MARKS = (
    *((high, high / 4, 0.9, 0.7) for high in (1, 2, 4, 8, 16)),
    *((4, low, 0.9, 0.7) for low in (0.25, 4)),
    *((4, 1, high, round(0.8 * high, 2)) for high in (0.5, 0.7, 1.0)),
)


def marked(high: float, low: float, high_kv: float, low_kv: float) -> Routing:
    """Splitwise's routing with these marks."""
    return Routing(
        policy="splitwise",
        borrow_batches=high,
        return_batches=low,
        borrow_kv=high_kv,
        return_kv=low_kv,
    )


def over_seeds(config: ServeConfig, halves: tuple[Traffic, Traffic], seeds: int) -> dict[str, Any]:
    """Means over seeds of what `serve` says, and the attainment of each seed."""
    rows = [serve(config, shifting(*halves, seed)) for seed in range(seeds)]
    return {
        "attainment": _means([row["attainment"] for row in rows]),
        "ttft_p90_s": _means([row["ttft_p90_s"] for row in rows]),
        "tpot_p90_s": _means([row["tpot_p90_s"] for row in rows]),
        "borrowed": sum(row["borrowed"] for row in rows) / seeds,
        "by_seed": [round(row["attainment"][-1], 4) for row in rows],
    }


def _means(rows: list[list[float]]) -> list[float]:
    return [round(sum(column) / len(column), 4) for column in zip(*rows, strict=True)]
