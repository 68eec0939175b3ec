"""Splitwise's machines for BLOOM-176B, with its released step times or the repaired ones."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from muxrt.cost.knots import Knots, KnotSteps, read_knots
from muxrt.planner.decode_pool import Room
from muxrt.planner.phase_tables import Limits, costs_of
from muxrt.planner.phases import Traffic
from muxrt.planner.provision import A100, H100, H100_CAP, Machine, Provisioner
from muxrt.workload.trace import read_trace

CONFIGS = Path(__file__).parent.parent / "configs"
TABLES = {"A100": "a100", "H100": "h100", "H100 capped": "h100_cap"}
KV_BYTES, WEIGHT_BYTES = 4_014_080, 329e9  # per token; the repository's model description
ROOM = Room((8 * 80e9 - WEIGHT_BYTES) // KV_BYTES, 512, True, 0)
LIMITS = Limits(16_384, 16_384, 512, int(ROOM.kv_tokens))
LINK_BYTES_PER_S = 200 * 2**30  # the simulator's default, whatever the machine


@cache
def knots(name: str) -> Knots:
    return read_knots(CONFIGS / "profiles" / f"splitwise_{TABLES[name]}.csv", name)["bloom-176b", 8]


def steps(name: str, *, released: bool) -> KnotSteps:
    return knots(name).as_released() if released else knots(name).repaired()


@cache
def machine(name: str, *, released: bool) -> Machine:
    """A100, H100 or H100 capped."""
    (kind,) = (kind for kind in (A100, H100, H100_CAP) if kind.name == name)
    return replace(kind, costs=costs_of(steps(name, released=released), LIMITS))


@cache
def traffic(service: str, num: int, seed: int = 0) -> Traffic:
    """Poisson; prompts and answers drawn apart from the excerpt's, as the paper's traces."""
    rows = read_trace(CONFIGS / "traces" / f"azure_{service}_excerpt.csv")
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(size=num)
    prompts = rng.choice([row.prompt_tokens for row in rows], num).astype(np.int64)
    outputs = rng.choice([row.output_tokens for row in rows], num).astype(np.int64)
    return Traffic(gaps, np.clip(prompts, 1, 12_000), np.maximum(1, outputs))


def provisioner(service: str, *, released: bool, num: int = 6000, seed: int = 0) -> Provisioner:
    """TBT alone is the predictor at the prompt's length, which is what the notebook takes."""
    alone = machine("A100", released=released).costs
    assert alone is not None
    xs, ys = (np.array(axis) for axis in zip(*knots("A100").released, strict=True))

    def tbt(prompt: int) -> float:
        return float(np.interp(prompt, xs, ys))

    return Provisioner(traffic(service, num, seed), alone, tbt, ROOM, KV_BYTES / LINK_BYTES_PER_S)
