"""What docs/validation.md says: its figures, and one of its measurements simulated anew."""

import sys
from functools import cache
from pathlib import Path
from random import Random
from statistics import median

import pytest
from sim_world import ONE_LANE, config, unit

from muxrt.config.cluster import KINDS
from muxrt.config.placement import ModelSpec, Scheduling
from muxrt.config.plan import EngineFacts
from muxrt.config.presets import PRESETS
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import simulate
from muxrt.workload.arrivals import Arrival, draw
from muxrt.workload.spec import Lengths

ROOT = Path(__file__).parent.parent
PROMPT = Lengths(mean_tokens=161, cv=1.0, min_tokens=4, max_tokens=1024)
OUTPUT = Lengths(mean_tokens=338, cv=0.7, min_tokens=4, max_tokens=1023)


@cache
def a100() -> CostModel:
    return CostModel([load_profile(ROOT / "configs" / "profiles" / "llama_a100.yaml")], KINDS)


@pytest.mark.parametrize(
    ("preset", "rate_rps", "control_s", "least", "most"),
    [("llama-7b", 12.0, 0.5e-4, 7.7, 9.5), ("llama-13b", 6.0, 0.4e-4, 4.9, 5.7)],
)
def test_overloaded_gpus_serve_what_muxserve_measured(
    preset: str, rate_rps: float, control_s: float, least: float, most: float
) -> None:
    """Its spatial runs: 7.7 to 9.5 requests/s of a 7B on one A100, 4.9 to 5.7 of a 13B.

    A 13B is simulated somewhat too slow: 10 % are allowed.
    """
    rng, at_s, asked = Random(0), 0.0, list[Arrival]()
    for _ in range(1500):
        at_s += rng.expovariate(rate_rps)
        asked.append(Arrival(at_s, "a", draw(PROMPT, rng), draw(OUTPUT, rng)))
    setting = Setting({"a": PRESETS[preset]}, a100(), EngineFacts(control_s=control_s))
    weights = {"llama-7b": 13.5e9, "llama-13b": 26e9}[preset]
    alone = unit(
        "a",
        lanes=ONE_LANE,
        kv_bytes=int(72e9 - 1.6e9 - weights),
        scheduling=Scheduling(policy="fcfs", prefill_tokens=2048),
    )
    spec = ModelSpec(name="a", preset=preset, max_queue=10**9)
    run = simulate(config(alone, models=[spec]), setting, asked)
    last_s = max(served.last_s or 0.0 for served in run.served)
    assert 0.9 * least < len(asked) / last_s < 1.1 * most


def test_the_published_errors_are_within_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of totals 10 % in the median, 20 % for four models in five, nearly all rankings right."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "plot_validation", raising=False)
    import plot_validation as figures

    cases = figures.read(ROOT / "docs" / "benchmarks" / "validation_muxserve.csv")
    assert median(abs(case.total.error) for case in cases) < 0.1
    models = [model for case in cases for model in case.models]
    assert sum(abs(model.error) <= 0.2 for model in models) > 0.8 * len(models)
    right, clear = figures._rankings(cases)
    assert right >= 0.9 * clear
