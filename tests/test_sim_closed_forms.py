"""The simulator against formulas: waiting in a queue, Little's law, and KV capacities."""

import csv
from math import floor
from pathlib import Path
from random import Random
from statistics import mean

import pytest
from sim_world import ONE_LANE, config, setting, steps, unit

from muxrt.config.model import ModelShape
from muxrt.config.placement import ModelSpec, Scheduling, Sizes
from muxrt.config.presets import shape_of_sizes
from muxrt.engine.build import plan_unit
from muxrt.sim.simulate import simulate
from muxrt.workload.arrivals import Arrival

PROMPT = 512
NO_LIMIT = 10**9
CAPACITIES = Path(__file__).parent / "data" / "distserve_kv_capacity.csv"


def poisson(rate_rps: float, num: int, output: int = 1, seed: int = 0) -> list[Arrival]:
    rng, at_s, found = Random(seed), 0.0, list[Arrival]()
    for _ in range(num):
        at_s += rng.expovariate(rate_rps)
        found.append(Arrival(at_s, "a", PROMPT, output))
    return found


def patient(**knobs: object) -> ModelSpec:
    return ModelSpec(name="a", preset="llama-7b", max_queue=NO_LIMIT, **knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_prefills_one_at_a_time_wait_as_in_m_d_1(load: float) -> None:
    """Constant service (Pollaczek-Khinchine): the mean wait is load / (2 (1 - load)) services."""
    service_s = steps().prefill_s(PROMPT, PROMPT**2)
    alone = unit("a", lanes=ONE_LANE, scheduling=Scheduling(prefill_tokens=PROMPT))
    run = simulate(
        config(alone, models=[patient()]), setting("a"), poisson(load / service_s, 12_000)
    )
    ttft_s = mean(s.first_s - s.at_s for s in run.served if s.first_s is not None)
    wait_s = load / (2 * (1 - load)) * service_s
    assert ttft_s == pytest.approx(service_s + wait_s, rel=0.06)
    assert run.units[0].lanes_busy[0] == pytest.approx(load, rel=0.04)


def test_littles_law_holds_for_the_blocks_in_use() -> None:
    """Mean blocks in use = rate x mean (blocks x time), summed over every request's life."""
    run = simulate(config(unit("a"), models=[patient()]), setting("a"), poisson(3.0, 600, 200))
    end_s = max(s.last_s for s in run.served if s.last_s is not None)
    plan = plan_unit(unit("a"), {"a": patient()}, setting("a").shapes)
    layout, held = plan.models["a"].layout, 0.0
    for served in run.served:
        assert served.first_s is not None and served.last_s is not None
        # From 512 to 711 tokens; a prefill holds its blocks too.
        blocks = mean(layout.num_blocks(PROMPT + i) for i in range(200))
        held += blocks * (served.last_s - served.at_s)
    expected = held / end_s / plan.num_blocks
    assert run.units[0].kv_mean == pytest.approx(expected, rel=0.03)


# DistServe's models: hidden size, layers. Its engine's budget (LLMServe/DistServe, simdistserve).
OPT = {"opt-13b": (5120, 40), "opt-66b": (9216, 64), "opt-175b": (12288, 96)}
GPU_BYTES, USABLE, RESERVED = 84.9905e9, 0.95, 0.01


def kv_budget(model: str, tp: int, pp: int) -> int:
    """Bytes for KV on the GPUs of one pipeline stage, by DistServe's own account of the weights."""
    hidden, layers = OPT[model][0], OPT[model][1] // pp
    tables = (50265 + 2048) * hidden
    weights = 2 * (tables + 12 * layers * hidden**2 / tp + 5 * layers * hidden)
    return floor(tp * ((USABLE - RESERVED) * GPU_BYTES - weights))


def stage(model: str, pp: int) -> ModelShape:
    """What one pipeline stage keeps in its arena."""
    hidden, layers = OPT[model]
    return shape_of_sizes(
        Sizes(
            hidden_size=hidden,
            num_layers=layers // pp,
            num_heads=hidden // 128,
            intermediate_size=4 * hidden,
        )
    )


def capacities() -> list[tuple[str, int, int, int]]:
    lines = [line for line in CAPACITIES.read_text().splitlines() if not line.startswith("#")]
    return [
        (row["model"], int(row["tp"]), int(row["pp"]), int(row["max_kv_tokens"]))
        for row in csv.DictReader(lines)
    ]


def test_every_row_of_the_table_is_there() -> None:
    assert len(capacities()) == 76


@pytest.mark.parametrize(("model", "tp", "pp", "tokens"), capacities())
def test_an_arena_holds_as_many_tokens_as_distserve_says(
    model: str, tp: int, pp: int, tokens: int
) -> None:
    spec = unit("m", gpus=range(tp), kv_bytes=kv_budget(model, tp, pp))
    named = ModelSpec(name="m", preset="llama-7b", max_model_len=2048)
    plan = plan_unit(spec, {"m": named}, {"m": stage(model, pp)})
    layout = plan.models["m"].layout
    assert plan.num_blocks // layout.blocks_per_group * layout.block_tokens == tokens
