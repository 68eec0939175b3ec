"""Simulate MuxServe's measured runs on 32 A100 and compare: throughput per model and in all.

Its placements, rates and logged request counts are read from CSV files (`--data`); what was not
logged is assumed, and stated in docs/validation.md: lengths, arrival times, MPS limits, KV bytes.

    python scripts/validate_muxserve.py --data FOLDER --out validation.csv
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import process_time

from muxrt.config.cluster import KINDS
from muxrt.config.placement import (
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
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
from muxrt.sim.simulate import simulate
from muxrt.workload.arrivals import Arrival, draw
from muxrt.workload.spec import Lengths

PROFILE = Path(__file__).parent.parent / "configs" / "profiles" / "llama_a100.yaml"
SYSTEMS = ("spatial", "temporal", "muxserve")
# Its code's own allowance for scheduling, per sequence and decode step.
CONTROL_S = {"llama-7b": 1e-4, "llama-13b": 0.8e-4, "llama-30b": 0.7e-4, "llama-65b": 0.7e-4}
GPU, DECODE_PCTS, BATCHES = "a100-80g", range(30, 100, 10), [2**k for k in range(9)]
PREFILL_PCT = {"llama-7b": 80, "llama-13b": 90, "llama-30b": 100, "llama-65b": 100}
PROMPT = Lengths(mean_tokens=161, cv=1.0, min_tokens=4, max_tokens=1024)
OUTPUT = Lengths(mean_tokens=338, cv=0.7, min_tokens=4, max_tokens=1023)
GPU_BYTES = 80e9 * 0.9  # vLLM's usual share of a GPU
PROCESS_BYTES = 1.6e9  # two processes per model and GPU
NO_LIMIT = 10**9
FIELDS = "alpha,scale,system,llm,model,requests,measured_rps,simulated_rps,preemptions,cpu_s"

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Case:
    """One workload; `counts` are the requests that were logged."""

    alpha: str
    scale: str
    rates: dict[str, float]
    models: dict[str, str]
    counts: dict[str, int]


def read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cases(data: Path) -> Iterator[Case]:
    found = defaultdict(list)
    for row in read(data / "synthetic_rates.csv"):
        found[row["alpha"], row["rate_scale_code"]].append(row)
    for (alpha, scale), rows in found.items():
        yield Case(
            alpha,
            scale,
            {row["llm"]: float(row["rate_req_s"]) for row in rows},
            {row["llm"]: row["model"] for row in rows},
            {row["llm"]: int(row["n_requests_logged"]) for row in rows},
        )


def requests(case: Case, seed: int) -> list[Arrival]:
    """Poisson at the planned rates, as many as were logged, in the time that they take on average.

    Its own random times are not known; a stream that is 10 % longer has 10 % less throughput.
    """
    found = []
    for llm, count in case.counts.items():
        rng, times = Random(f"{seed}/{llm}"), [0.0]
        for _ in range(count):
            times.append(times[-1] + rng.expovariate(1.0))
        scale = count / case.rates[llm] / times[-1]
        found += [Arrival(scale * t, llm, draw(PROMPT, rng), draw(OUTPUT, rng)) for t in times[1:]]
    return sorted(found, key=lambda arrival: arrival.at_s)


def decode_pct(case: Case, llm: str, gpus: int, cost: CostModel) -> int:
    """The MPS limit that its planner (Algorithm 2) gives decodes: the least that meets the rate.

    Where none does, the one with the highest throughput.
    """
    model, best = case.models[llm], (0.0, DECODE_PCTS[0])
    shared = cost.steps(PRESETS[model], gpus, KINDS[GPU])
    prompt, output = float(PROMPT.mean_tokens or 0), float(OUTPUT.mean_tokens or 0)
    for pct in DECODE_PCTS:
        steps = shared.at(pct / 100)
        for batch in BATCHES:
            prefill_s = shared.at(1.0).prefill_s(batch * prompt, batch * prompt**2)
            step_s = steps.decode_s(batch, batch * (prompt + output / 2))
            rate = batch / (prefill_s + output * (step_s + CONTROL_S[model] * batch))
            best = max(best, (rate, pct))
        if best[0] >= case.rates[llm]:
            break
    return best[1]


def units(case: Case, system: str, options: argparse.Namespace, cost: CostModel) -> list[UnitSpec]:
    """The logged meshes; temporal has MuxServe's."""
    rows = read(options.data / "synthetic_placements.csv")
    placed = "spatial" if system == "spatial" else "muxserve"
    meshes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if (row["alpha"], row["rate_scale_code"], row["system"]) == (
            case.alpha,
            case.scale,
            placed,
        ):
            meshes[row["mesh_idx"], row["mesh_gpus"]].append(row["llm"])
    return [
        unit(case, system, f"mesh-{index}", int(gpus), llms, options, cost)
        for (index, gpus), llms in meshes.items()
    ]


def unit(
    case: Case,
    system: str,
    name: str,
    gpus: int,
    llms: Sequence[str],
    options: argparse.Namespace,
    cost: CostModel,
) -> UnitSpec:
    weights = sum(2 * num_params(PRESETS[case.models[llm]]) for llm in llms)
    kv_bytes = int(gpus * (GPU_BYTES - PROCESS_BYTES * len(llms)) - weights)
    is_split = system == "muxserve"
    lanes = Lanes(kind="stream", depth=1)
    if is_split:
        # Ten tokens of SMs and two on loan: a prefill and a decode, or decodes alone.
        lanes = Lanes(kind="mps", sm_pct=(90, 40, 40), depth=1)
    return UnitSpec(
        name=name,
        models=tuple(
            UnitModel(
                name=llm,
                sm_pct=_shares(case, llm, gpus, options, cost) if is_split else None,
            )
            for llm in llms
        ),
        memory=Memory(kv_bytes=kv_bytes, plane_tokens=32),
        mesh=Mesh(device="gpu", kind=GPU, node=0, gpus=tuple(range(gpus))),
        lanes=lanes,
        scheduling=Scheduling(
            policy="adbs" if is_split else options.temporal_policy,
            prefill_tokens=2048,
            quota_period_s=8.0,
            preempt="recompute",
        ),
    )


@dataclass(frozen=True)
class Simulated:
    """Requests/s of each model: its requests / the time of its last completion."""

    rates: dict[str, float]
    preemptions: int


def _shares(
    case: Case, llm: str, gpus: int, options: argparse.Namespace, cost: CostModel
) -> tuple[int, int]:
    pct = options.decode_pct or decode_pct(case, llm, gpus, cost)
    return PREFILL_PCT[case.models[llm]], pct


def run(case: Case, system: str, options: argparse.Namespace, cost: CostModel) -> Simulated:
    placed = units(case, system, options, cost)
    logged = {part.name for one in placed for part in one.models}  # a few logs are missing
    models = tuple(
        ModelSpec(name=llm, preset=model, rate_rps=case.rates[llm], max_queue=NO_LIMIT)
        for llm, model in case.models.items()
        if llm in logged
    )
    setting = Setting(
        {llm: PRESETS[model] for llm, model in case.models.items()},
        cost,
        EngineFacts(interference=options.interference),
        control_s={
            llm: options.control_scale * CONTROL_S[model] for llm, model in case.models.items()
        },
    )
    asked = [one for one in requests(case, options.seed) if one.model in logged]
    done = simulate(ServeConfig(models=models, units=tuple(placed)), setting, asked)
    last_s: dict[str, float] = {}
    for served in done.served:
        assert served.is_answered and served.last_s is not None, served
        last_s[served.model] = max(last_s.get(served.model, 0.0), served.last_s)
    rates = {llm: case.counts[llm] / end_s for llm, end_s in last_s.items()}
    uses = [use for placed_unit in done.units for use in placed_unit.models]
    return Simulated(rates, sum(u.preemptions_recompute for u in uses))


def measured(data: Path) -> dict[tuple[str, str, str, str], float]:
    """Requests/s by (alpha, scale, system, llm)."""
    return {
        (row["alpha"], row["rate_scale_code"], row["system"], f"llm-{row['llm']}"): float(
            row["tpt_req_s"]
        )
        for row in read(data / "synthetic_e2e_per_llm.csv")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a line per model; is appended to")
    parser.add_argument("--alpha", nargs="*", default=["1.3", "1.7", "0.7"])
    parser.add_argument("--scale", nargs="*", default=["0.5", "0.75", "1.0", "1.25"])
    parser.add_argument("--system", nargs="*", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--decode-pct", type=int, help="of every model; else as its planner does")
    parser.add_argument(
        "--temporal-policy", default="fcfs", choices=["adbs", "fcfs", "round-robin"]
    )
    parser.add_argument("--control-scale", type=float, default=1.0, help="of its own allowance")
    parser.add_argument("--interference", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known, cost = measured(options.data), CostModel([load_profile(PROFILE)], KINDS)
    if not options.out.exists():
        options.out.write_text(FIELDS + "\n")
    wanted = [
        c for c in cases(options.data) if c.alpha in options.alpha and c.scale in options.scale
    ]
    for case in sorted(wanted, key=lambda c: (options.alpha.index(c.alpha), c.scale)):
        for system in options.system:
            started_s = process_time()
            found = run(case, system, options, cost)
            write(options.out, case, system, found, known, process_time() - started_s)


def write(
    out: Path,
    case: Case,
    system: str,
    simulated: Simulated,
    known: dict[tuple[str, str, str, str], float],
    cpu_s: float,
) -> None:
    """A line per model whose log is there, and their sums on the screen."""
    totals = [0.0, 0.0]
    with out.open("a", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        for llm, model in case.models.items():
            measured_rps = known.get((case.alpha, case.scale, system, llm))
            if measured_rps is None or llm not in simulated.rates:
                continue
            totals[0] += measured_rps
            totals[1] += simulated.rates[llm]
            lines.writerow(
                [case.alpha, case.scale, system, llm, model, case.counts[llm], measured_rps,
                 f"{simulated.rates[llm]:.4f}", simulated.preemptions, f"{cpu_s:.0f}"]
            )  # fmt: skip
    print(
        f"alpha {case.alpha} scale {case.scale} {system:9} measured {totals[0]:6.1f} simulated"
        f" {totals[1]:6.1f} requests/s ({totals[1] / totals[0] - 1:+.1%}),"
        f" {simulated.preemptions} preempted, {cpu_s:.0f} s of CPU",
        flush=True,
    )


if __name__ == "__main__":
    main()
