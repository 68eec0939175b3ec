"""Units under load for the comparison of policies: what lives where, who asks for what, and when.

The rates, lengths and targets were chosen before the policy `slo` was written, so that some cases
are calm, some just full and some overloaded. `TUNED` are the cases (with the seeds of
`TUNED_SEEDS`) on which its constants were looked at; all others are held out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import msgspec

from muxrt.config.cluster import KINDS, GpuKind
from muxrt.config.model import ModelShape, load_shape
from muxrt.config.placement import (
    MIB,
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
from muxrt.cost.memory import num_params
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.sim.setting import Setting
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Lengths, PowerLaw, Quantile, Trace, Traffic, Workload, adjusted
from muxrt.workload.trace import read_trace

ROOT = Path(__file__).parent.parent
TRACES = ROOT / "configs" / "traces"
GPU, GPU_BYTES = "a100-80g", 80e9 * 0.9  # vLLM's usual share of a GPU
TUNED_SEEDS, SEEDS = (1,), (15, 16, 17)  # reported: seeds that nobody looked at before
# MuxServe's own allowance for its scheduler, per sequence and decode step (its planner has them).
CONTROL_S = {"llama-7b": 1e-4, "llama-13b": 0.8e-4, "llama-30b": 0.7e-4, "llama-65b": 0.7e-4}
# Two cores as measured for docs/decisions.md: 160 GFLOP/s and 20 GB/s each.
CPU = GpuKind(
    name="two-cores", device="cpu", memory_bytes=4096 * MIB, bandwidth_bytes_per_s=40e9,
    flops=320e9, sms=2, link_bytes_per_s=1e9,
)  # fmt: skip
GREEN = Lanes(kind="green", sm_pct=(40, 60))
STEADY = Slo(ttft_s=1.0, tpot_s=0.08)


@dataclass(frozen=True)
class Case:
    """A unit and its traffic; `models` by name are presets or demo models."""

    name: str
    what: str  # for people, one line
    models: Mapping[str, str]
    traffic: Workload
    slos: Mapping[str, Slo]
    gpus: int = 4
    lanes: Lanes = GREEN
    control_s: Mapping[str, float] = field(default_factory=dict)
    prefill_tokens: int = 2048
    kv_bytes: int | None = None  # None: what the weights leave
    refuses_late: bool = False

    @property
    def is_tuned(self) -> bool:
        return self.name in TUNED

    @property
    def is_cpu(self) -> bool:
        return self.gpus == 0

    def shape(self, model: str) -> ModelShape:
        name = self.models[model]
        return PRESETS[name] if name in PRESETS else _demo_shape(name)

    def config(self, policy: str, borrow: bool = True) -> ServeConfig:
        """The placement under `policy`."""
        shares = {model.name: model.rate_rps for model in self.traffic.models}
        specs = tuple(
            ModelSpec(
                name=name,
                path=name,
                slo=self.slos[name],
                rate_rps=shares.get(name) or 1.0,
                max_queue=10**9,
                queue_timeout_s=self.slos[name].ttft_s if self.refuses_late else None,
            )
            for name in self.models
        )
        mesh = Mesh(device="gpu", kind=GPU, node=0, gpus=tuple(range(self.gpus)))
        if self.is_cpu:
            mesh = Mesh(device="cpu", kind=CPU.name, node=0, gpus=(0,))
        unit = UnitSpec(
            name="unit",
            models=tuple(UnitModel(name=name) for name in self.models),
            memory=Memory(kv_bytes=self.kv_bytes or self._left_bytes()),
            mesh=mesh,
            lanes=self.lanes,
            scheduling=Scheduling(
                policy=policy,  # type: ignore[arg-type]
                prefill_tokens=self.prefill_tokens,
                borrow=borrow,
            ),
        )
        return ServeConfig(models=specs, units=(unit,))

    def _left_bytes(self) -> int:
        weights = sum(2 * num_params(self.shape(name)) for name in self.models)
        return int(self.gpus * GPU_BYTES - weights)

    def setting(self) -> Setting:
        """Step times: the A100 profile of MuxServe's engine, or a roofline of two cores."""
        shapes = {name: self.shape(name) for name in self.models}
        control = {name: self.control_s.get(m, 0.0) for name, m in self.models.items()}
        gpus = {**KINDS, CPU.name: CPU}
        return Setting(shapes, _cost(self.is_cpu), EngineFacts(), gpus, control)

    def requests(self, seed: int, speed: float = 1.0) -> list[Arrival]:
        load = adjusted(self.traffic, duration_s=None, speed=speed, seed=seed)
        rows = read_trace(Path(load.trace.file)) if load.trace is not None else ()
        return arrivals(load, rows)


@cache
def _cost(is_cpu: bool) -> CostModel:
    profile = load_profile(ROOT / "configs" / "profiles" / "llama_a100.yaml")
    return CostModel() if is_cpu else CostModel([profile], KINDS)


@cache
def _demo_shape(name: str) -> ModelShape:
    return load_shape(ROOT / "configs" / "demo_models" / name)


def _chat(mean: float, cv: float = 1.0, most: int = 1000) -> Lengths:
    return Lengths(mean_tokens=mean, cv=cv, min_tokens=4, max_tokens=most)


def _traffic(
    rates: Mapping[str, float],
    prompts: Mapping[str, Lengths] | Lengths,
    outputs: Mapping[str, Lengths] | Lengths,
    cv: float = 1.0,
    duration_s: float = 120.0,
) -> Workload:
    def of(lengths: Mapping[str, Lengths] | Lengths, name: str) -> Lengths:
        return lengths if isinstance(lengths, Lengths) else lengths[name]

    models = tuple(
        Traffic(name=name, rate_rps=rate, prompt=of(prompts, name), output=of(outputs, name))
        for name, rate in rates.items()
    )
    return Workload(duration_s=duration_s, models=models, gap_cv=cv)


def _power_law(names: Sequence[str], alpha: float, rate: float, cv: float = 1.0) -> Workload:
    law = PowerLaw(alpha=alpha, rate_rps=rate)
    return msgspec.structs.replace(
        _traffic(dict.fromkeys(names, 1.0), _chat(161), _chat(338, 0.7), cv),
        models=tuple(Traffic(name=n, prompt=_chat(161), output=_chat(338, 0.7)) for n in names),
        power_law=law,
    )


def _replay(file: str, names: Sequence[str], speed: float, most_prompt: int) -> Workload:
    trace = Trace(
        file=str(TRACES / file), speed=speed, max_prompt_tokens=most_prompt, max_output_tokens=800
    )
    return Workload(
        duration_s=170 / speed,
        models=tuple(Traffic(name=name) for name in names),
        power_law=PowerLaw(alpha=0.9),
        trace=trace,
    )


THREE = {"30b": "llama-30b", "13b": "llama-13b", "7b": "llama-7b"}
THREE_SLO = {"30b": Slo(2.0, 0.15), "13b": Slo(1.0, 0.1), "7b": Slo(1.0, 0.08)}
SEVENS = dict.fromkeys(("a", "b", "c", "d"), "llama2-7b")
SEVENS_SLO = dict.fromkeys(SEVENS, STEADY)
TWO = {"13b": "llama2-13b", "7b": "llama2-7b"}
TWO_SLO = dict.fromkeys(TWO, STEADY)
LONG_OR_CHAT = Lengths(
    quantiles=(
        Quantile(share=0.8, tokens=300), Quantile(share=0.85, tokens=2000),
        Quantile(share=1.0, tokens=3200),
    ),
    min_tokens=10,
)  # fmt: skip
DEMO = {name: name for name in ("pydoc-s", "pydoc-m", "pydoc-l")}
DEMO_LANES = Lanes(kind="cores", split=(1, 1))
DEMO_RATES = {"pydoc-s": 3.0, "pydoc-m": 1.7, "pydoc-l": 1.2}


def _demo(name: str, what: str, times: float, slo: Slo, cv: float = 1.0) -> Case:
    rates = {model: times * rate for model, rate in DEMO_RATES.items()}
    return Case(
        name, what, DEMO, _traffic(rates, _chat(100, 0.8, 400), _chat(60, 0.8, 200), cv, 20.0),
        dict.fromkeys(DEMO, slo), gpus=0, lanes=DEMO_LANES, prefill_tokens=512, kv_bytes=64 * MIB,
    )  # fmt: skip


def _serial(case: Case) -> Case:
    """The paper's baselines do one job at a time: a single lane."""
    lanes = Lanes(kind="stream", depth=1)
    return replace(case, name=f"{case.name}-serial", what=f"{case.what}; one lane", lanes=lanes)


def _ablations() -> list[Case]:
    thirty = {"30b": _chat(322), "13b": _chat(161), "7b": _chat(161)}
    thirty_out = {"30b": _chat(676, 0.7), "13b": _chat(338, 0.7), "7b": _chat(338, 0.7)}
    big = {"65b": "llama-65b", "30b": "llama-30b"}
    return [
        Case(
            "paper-30b-13b-7b", "MuxServe's ablation: 2:8:8 requests/s, lengths 2:1:1", THREE,
            _traffic({"30b": 2.0, "13b": 8.0, "7b": 8.0}, thirty, thirty_out), THREE_SLO,
            control_s=CONTROL_S,
        ),
        Case(
            "paper-65b-30b", "MuxServe's ablation: 1:8 requests/s, lengths 778/251 and 128/126",
            big,
            _traffic(
                {"65b": 1.0, "30b": 8.0},
                {"65b": _chat(778, 0.5), "30b": _chat(128)},
                {"65b": _chat(251, 0.7), "30b": _chat(126, 0.7)},
            ),
            {"65b": Slo(2.0, 0.2), "30b": Slo(1.0, 0.1)},
            control_s=CONTROL_S,
        ),
    ]  # fmt: skip


def _gpu_cases() -> list[Case]:
    chat_out = _chat(200, 0.7)
    mixed = {"13b": _chat(2000, 0.4, 3200), "7b": _chat(161)}
    mixed_out = {"13b": _chat(60, 0.5), "7b": chat_out}
    return [
        Case(
            "calm", "four 7B on a GPU, half of what it can do", SEVENS,
            _power_law(tuple(SEVENS), 0.9, 2.5), SEVENS_SLO, gpus=1,
        ),
        Case(
            "skewed", "the same, full, popularity alpha 1.3", SEVENS,
            _power_law(tuple(SEVENS), 1.3, 6.5), SEVENS_SLO, gpus=1,
        ),
        Case(
            "skewed-more", "alpha 2.1", SEVENS,
            _power_law(tuple(SEVENS), 2.1, 6.0), SEVENS_SLO, gpus=1,
        ),
        Case(
            "overload", "twice what it can do", SEVENS,
            _power_law(tuple(SEVENS), 0.9, 10.0), SEVENS_SLO, gpus=1,
        ),
        Case(
            "overload-refusing", "the same, late requests refused (429)", SEVENS,
            _power_law(tuple(SEVENS), 0.9, 10.0), SEVENS_SLO, gpus=1, refuses_late=True,
        ),
        Case(
            "bursts", "gamma gaps, cv 2", TWO,
            _traffic({"13b": 10.0, "7b": 18.0}, _chat(161), chat_out, 2.0), TWO_SLO, gpus=2,
        ),
        Case(
            "bursts-more", "gamma gaps, cv 4", TWO,
            _traffic({"13b": 9.0, "7b": 16.0}, _chat(161), chat_out, 4.0), TWO_SLO, gpus=2,
        ),
        Case(
            "long-beside-chat", "13B reads 2,000 tokens, 7B chats", TWO,
            _traffic({"13b": 1.5, "7b": 7.0}, mixed, mixed_out),
            {"13b": Slo(4.0, 0.1), "7b": Slo(0.5, 0.06)}, gpus=2,
        ),
        Case(
            "long-among-chat", "one 7B: every fifth prompt has 2,000 to 3,200 tokens",
            {"7b": "llama2-7b"},
            _traffic({"7b": 5.0}, LONG_OR_CHAT, chat_out), {"7b": Slo(0.8, 0.08)}, gpus=1,
        ),
        Case(
            "tight-tpot", "7B within 35 ms a token, beside a patient 30B",
            {"30b": "llama-30b", "7b": "llama-7b"},
            _traffic({"30b": 4.0, "7b": 16.0}, _chat(161), chat_out),
            {"30b": Slo(4.0, 0.3), "7b": Slo(1.0, 0.035)},
        ),
        Case(
            "tight-ttft", "first token within 0.3 s", TWO,
            _traffic({"13b": 5.0, "7b": 10.0}, _chat(300), _chat(100, 0.7)),
            dict.fromkeys(TWO, Slo(0.3, 0.1)), gpus=2,
        ),
        Case(
            "one-lane", "no splitting: 13B and 7B take turns on the whole GPU", TWO,
            _traffic({"13b": 5.0, "7b": 7.5}, _chat(300), chat_out), TWO_SLO, gpus=2,
            lanes=Lanes(kind="stream", depth=1),
        ),
        Case(
            "azure-conversation", "the recorded conversation service dealt to 13B and 7B", TWO,
            _replay("azure_conv_excerpt.csv", tuple(TWO), 0.8, 3000),
            dict.fromkeys(TWO, Slo(1.5, 0.08)), gpus=2,
        ),
        Case(
            "azure-code", "the recorded code service (bursts, long prompts, short answers)", TWO,
            _replay("azure_code_excerpt.csv", tuple(TWO), 0.6, 3000),
            dict.fromkeys(TWO, Slo(2.0, 0.08)), gpus=2,
        ),
    ]  # fmt: skip


CASES = {
    case.name: case
    for case in (
        *_ablations(),
        *map(_serial, _ablations()),
        *_gpu_cases(),
        _demo("demo", "the demo models on two cores", 50.0, Slo(0.1, 0.02)),
        _demo("demo-bursts", "the same, gamma gaps, cv 3", 30.0, Slo(0.1, 0.02), 3.0),
        _demo("demo-overload", "the same, too much of it", 80.0, Slo(0.1, 0.02)),
    )
}
TUNED = frozenset(
    ("paper-30b-13b-7b", "skewed", "overload", "bursts", "long-beside-chat", "one-lane", "demo")
)
