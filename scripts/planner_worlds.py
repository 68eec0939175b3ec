"""Problems that the planner is measured on: MuxServe's cases, small random ones, large ones."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import msgspec

from muxrt.config.cluster import KINDS, Cluster, NodeGroup
from muxrt.config.placement import ModelSpec, Slo
from muxrt.config.plan import EngineFacts
from muxrt.config.presets import PRESETS, model_shape
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.planner.workload import Demand, Engine, Lengths, Problem
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import SimJudge
from muxrt.workload.arrivals import arrivals
from muxrt.workload.offered import moments
from muxrt.workload.spec import PowerLaw, Traffic, load_workload

ROOT = Path(__file__).parent.parent
GPU = "a100-80g"
PROFILE = ROOT / "configs" / "profiles" / "llama_a100.yaml"
WORKLOAD = ROOT / "configs" / "workloads" / "muxserve.yaml"
# 12 of 7B, 4 of 13B, 2 of 30B, one of 65B, by falling popularity (MuxServe, section 4.2).
SIZES = ("llama-7b",) * 12 + ("llama-13b",) * 4 + ("llama-30b",) * 2 + ("llama-65b",)
NAMES = tuple(f"llm-{index}" for index in range(len(SIZES)))
ALPHAS = (0.7, 1.3, 1.7)
TOP_RATES = (20.0, 30.0, 40.0, 50.0)  # requests/s of the most popular model
MUXSERVE_CONTROL_S = 1e-4  # per sequence and decode step: references, 2.7 point 13
MAX_TOKENS = 2048
RPS_PER_GPU = 5.0  # of a large case: somewhat more than its GPUs serve


@dataclass(frozen=True, slots=True)
class Case:
    """One of the synthetic cases."""

    alpha: float
    top_rps: float

    @property
    def title(self) -> str:
        return f"alpha {self.alpha:g}, top {self.top_rps:g}/s"


CASES = tuple(Case(alpha, top_rps) for alpha in ALPHAS for top_rps in TOP_RATES)


def a100_cost() -> CostModel:
    """Step times from MuxServe's profile, fitted when first asked for."""
    return CostModel([load_profile(PROFILE)], {GPU: KINDS[GPU]})


def synthetic(case: Case, control_s: float = 0.0) -> Problem:
    """19 LLaMAs on 32 A100, with the shipped workload's lengths and targets."""
    rates = [case.top_rps * rank**-case.alpha for rank in range(1, len(SIZES) + 1)]
    return Problem(_cluster(32), _demands(SIZES, rates), a100_cost(), Engine(control_s=control_s))


def sim_judge(case: Case, control_s: float, duration_s: float, warmup_s: float) -> SimJudge:
    """The simulator under the case's requests; who cannot have a first token in time is refused."""
    workload = msgspec.structs.replace(
        load_workload(WORKLOAD),
        models=tuple(Traffic(name=name) for name in NAMES),
        power_law=PowerLaw(alpha=case.alpha, top_rate_rps=case.top_rps),
        duration_s=duration_s,
    )
    slo = workload.slo
    assert slo is not None
    models = [
        ModelSpec(
            name=name,
            preset=size,
            slo=slo,
            max_model_len=MAX_TOKENS,
            queue_timeout_s=slo.ttft_s,
        )
        for name, size in zip(NAMES, SIZES, strict=True)
    ]
    shapes = {model.name: model_shape(model, ()) for model in models}
    setting = Setting(shapes, a100_cost(), EngineFacts(control_s=control_s))
    return SimJudge(models, setting, arrivals(workload), duration_s, warmup_s=warmup_s)


def large(models: int, gpus: int) -> Problem:
    """The same mix of sizes in random order, popularity 1 / rank, about as much as is served."""
    sizes = [SIZES[index % len(SIZES)] for index in range(models)]
    Random(0).shuffle(sizes)
    weights = [1 / rank for rank in range(1, models + 1)]
    rates = [RPS_PER_GPU * gpus * weight / sum(weights) for weight in weights]
    return Problem(_cluster(gpus), _demands(sizes, rates), a100_cost(), Engine())


@cache
def _fitted() -> CostModel:
    return a100_cost()


def small(seed: int) -> Problem:
    """2 to 5 models on 2 to 4 GPUs: sizes, rates from idle to overload, lengths, targets."""
    rng = Random(seed)
    gpus, models = rng.choice((2, 3, 4)), rng.choice((2, 3, 4, 5))
    while True:
        sizes = [rng.choice(SIZES[: 12 + gpus]) for _ in range(models)]
        rates = [rng.choice((0.5, 2.0, 6.0, 15.0)) * rng.uniform(0.7, 1.4) for _ in sizes]
        slo = Slo(ttft_s=rng.choice((0.5, 1.0, 2.0)), tpot_s=rng.choice((0.05, 0.1)))
        scale = rng.choice((0.3, 1.0, 2.0))
        demands = [
            replace(d, slo=slo, prompt=_times(d.prompt, scale)) for d in _demands(sizes, rates)
        ]
        problem = Problem(_cluster(gpus, gpus), demands, _fitted(), Engine())
        if problem.fits(0, 1 << (gpus.bit_length() - 1), tuple(problem.demands)):
            return problem


def _cluster(gpus: int, per_node: int = 8) -> Cluster:
    return Cluster(nodes=(NodeGroup(gpu=GPU, gpus=per_node, count=gpus // per_node),))


def _demands(sizes: tuple[str, ...] | list[str], rates: list[float]) -> list[Demand]:
    workload = load_workload(WORKLOAD)
    assert workload.slo is not None
    prompt, output = (moments(lengths) for lengths in (workload.prompt, workload.output))
    return [
        Demand(
            f"llm-{index}",
            PRESETS[size],
            rate_rps,
            Lengths(prompt.mean, prompt.mean_square),
            Lengths(output.mean, output.mean_square),
            workload.slo,
            MAX_TOKENS,
        )
        for index, (size, rate_rps) in enumerate(zip(sizes, rates, strict=True))
    ]


def _times(lengths: Lengths, scale: float) -> Lengths:
    return Lengths(lengths.mean * scale, lengths.mean_square * scale**2)
