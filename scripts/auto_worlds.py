"""Ten workloads for `auto`: is a mixture of colocation and disaggregation ever worse than either?

A workload's rate is a share (LOADS) of what the estimator says that its GPUs serve colocated, dealt
evenly to its models: no workload has a rate of its own choosing. `auto` is judged by simulations of
one seed; what is compared are simulations of others, the same requests for all strategies.

Noise, as it was defined before the first comparison: `auto` is worse than a strategy where the mean
over the seeds of its goodput minus the other's is below zero by more than twice the standard error
of these differences, and by more than half a per cent (by which `auto` prefers what is simpler).
"""

from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import yaml

from muxrt.cli.plan_input import Asked, load_problem
from muxrt.cli.plan_judge import Simulator, simulated_s
from muxrt.cli.plan_strategy import colocated
from muxrt.config.placement import Placement
from muxrt.errors import ConfigError
from muxrt.planner.apart import colocated_gpus
from muxrt.planner.capacity import Capacity
from muxrt.planner.mix import Mix, to_placement
from muxrt.planner.phase_plan import to_placement as phases_to_placement
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.search import Search
from muxrt.planner.strategies.distserve import distserve
from muxrt.planner.strategies.mixed import Found, Terms, mixed
from muxrt.planner.strategies.splitwise import splitwise

PROFILES = Path(__file__).parent.parent / "configs" / "profiles"
OPT = {
    "opt-13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40, "intermediate_size": 13656},
    "opt-66b": {"hidden_size": 9216, "num_layers": 64, "num_heads": 72, "intermediate_size": 24576},
}
OPT_REST = {"vocab_size": 50272, "max_positions": 2048, "tied_embeddings": True}
# Lengths as in configs/workloads/large/chat_and_code.yaml.
LENGTHS: dict[str, dict[str, Any]] = {
    "chat": {
        "prompt": {"mean_tokens": 700, "cv": 0.8, "max_tokens": 1500},
        "output": {"mean_tokens": 200, "cv": 0.8, "max_tokens": 500},
    },
    "code": {
        "prompt": {"mean_tokens": 1100, "cv": 0.5, "max_tokens": 1900},
        "output": {"mean_tokens": 30, "cv": 0.7, "max_tokens": 120},
    },
}
# TTFT and TPOT, seconds. DistServe's evaluation has 0.25 and 0.1 for its 13B chat (OSDI 2024, table
# 1); tight here is where a prefill of a neighbour costs a token its target.
SLOS = {"tight": (0.5, 0.05), "loose": (2.0, 0.12)}
SLOWER = {"opt-66b": 2.5, "llama-30b": 2.5}  # targets of larger models, times those
LOADS = (0.8, 0.95)
SEEDS = (1001, 1002, 1003)
ALIKE = 0.005
LIMIT_S = 60.0  # of a search, CPU time: the machine may have other work
SINGLES = ("muxserve", "spatial", "colocated", "distserve", "splitwise")


@dataclass(frozen=True, slots=True)
class World:
    """Models with their kind of traffic, on nodes of 8 A100."""

    name: str
    models: tuple[tuple[str, str], ...]  # preset or OPT, chat or code
    slo: str
    nodes: int = 1


WORLDS = (
    World("chat, OPT-13B", (("opt-13b", "chat"),), "tight"),
    World("chat, OPT-13B", (("opt-13b", "chat"),), "loose"),
    World("chat, LLaMA-7B and 13B", (("llama-7b", "chat"), ("llama-13b", "chat")), "tight"),
    World("code, OPT-13B", (("opt-13b", "code"),), "tight"),
    World("code, OPT-13B", (("opt-13b", "code"),), "loose"),
    World("code, two LLaMA-7B", (("llama-7b", "code"), ("llama-7b", "code")), "loose"),
    World("mixed, two OPT-13B", (("opt-13b", "chat"), ("opt-13b", "code")), "tight"),
    World("mixed, two OPT-13B", (("opt-13b", "chat"), ("opt-13b", "code")), "loose"),
    World("mixed, OPT-13B and 66B", (("opt-13b", "chat"), ("opt-66b", "code")), "tight", 2),
    World(
        "mixed, LLaMA-7B, 13B and 30B",
        (("llama-7b", "chat"), ("llama-13b", "code"), ("llama-30b", "chat")),
        "loose",
        2,
    ),
)
SMALL = (WORLDS[3], WORLDS[6])  # what tests have time for


def asked_of(world: World, load: float = LOADS[1]) -> Asked:
    """The world at that load."""
    shares = _loaded(world, dict.fromkeys(range(len(world.models)), 1e-3))
    problem = shares.problem
    capacity = Capacity(problem, QueueingJudge(problem))
    rates = {}
    for index, name in enumerate(problem.demands):
        per_gpu = 1e-3 / colocated_gpus(problem, capacity, name)
        rates[index] = round(load * per_gpu * problem.num_gpus / len(world.models), 3)
    return _loaded(world, rates)


def _loaded(world: World, rates: dict[int, float]) -> Asked:
    models, traffic = [], []
    ttft_s, tpot_s = SLOS[world.slo]
    for index, (shape, kind) in enumerate(world.models):
        name, times = f"{kind}-{index}", SLOWER.get(shape, 1.0)
        source = {"sizes": OPT[shape] | OPT_REST} if shape in OPT else {"preset": shape}
        models.append({"name": name, "max_model_len": 2048, **source})
        slo = {"ttft_s": times * ttft_s, "tpot_s": times * tpot_s}
        traffic.append({"name": name, "rate_rps": rates[index], "slo": slo, **LENGTHS[kind]})
    profile = "opt_a100.yaml" if world.models[0][0] in OPT else "llama_a100.yaml"
    plan = {
        "cluster": {"nodes": [{"gpu": "a100-80g", "gpus": 8, "count": world.nodes}]},
        "profiles": [str(PROFILES / profile)],
        "models": models,
    }
    with TemporaryDirectory() as folder:
        files = Path(folder) / "plan.yaml", Path(folder) / "traffic.yaml"
        for path, document in zip(files, (plan, {"models": traffic}), strict=True):
            path.write_text(yaml.safe_dump(document))
        return load_problem(*files, None, None)


def single(name: str, asked: Asked) -> Placement | None:
    """A placement of one kind; None where it finds no room."""
    problem = asked.problem
    try:
        if name in ("distserve", "splitwise"):
            found = (distserve if name == "distserve" else splitwise)(problem)
            return phases_to_placement(problem, found)
        judge = QueueingJudge(problem)
        strategy = "auto" if name == "colocated" else name
        return to_placement(problem, colocated(asked, strategy, Search(judge, judge)))
    except ConfigError:
        return None


def automatic(asked: Asked) -> Found:
    """What `muxrt plan --judge simulator` finds."""
    estimator, simulator = QueueingJudge(asked.problem), Simulator(asked)
    end_s = process_time() + LIMIT_S
    judge = partial(simulator.draft, estimator)
    search = Search(estimator, judge, lambda: process_time() > end_s)
    return mixed(asked.problem, search, Terms(simulator.mix, is_judged=True))


def compare(world: World, load: float = LOADS[1], seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """Goodput by strategy and seed, and what `auto` chose."""
    asked = asked_of(world, load)
    placements = {name: single(name, asked) for name in SINGLES}
    begun_s = process_time()
    found = automatic(asked)
    cpu_s = round(process_time() - begun_s, 1)
    placements["auto"] = to_placement(asked.problem, found.mix)
    judges = [Simulator(asked, seed) for seed in seeds]
    return {
        "workload": world.name,
        "slo": world.slo,
        "load": load,
        "seconds": simulated_s(asked),
        "gpus": asked.problem.num_gpus,
        "offered_rps": sum(demand.rate_rps for demand in asked.problem.demands.values()),
        "goodput_rps": {
            name: None if one is None else [round(j.placement(one).goodput_rps, 3) for j in judges]
            for name, one in placements.items()
        },
        "chosen": _shown(found),
        "cpu_s": cpu_s,
    }


def _shown(found: Found) -> dict[str, Any]:
    mix: Mix = found.mix
    return {
        "apart": {one.model: f"{one.copies} x ({one.split.name})" for one in mix.apart.models},
        "apart_gpus": mix.apart.num_gpus,
        "colocated": [f"{'+'.join(group.models)} on {group.size}" for group in mix.together],
        "judged": found.num_judged,
        "reasons": found.reasons,
        "notes": list(found.notes),
    }


@dataclass(frozen=True, slots=True)
class Beside:
    """`auto` beside the strategy of one kind with the most goodput."""

    best: str
    best_rps: float
    auto_rps: float
    difference_rps: float  # mean over the seeds
    error_rps: float  # standard error of that mean

    @property
    def is_worse(self) -> bool:
        """By more than noise."""
        return -self.difference_rps > max(2 * self.error_rps, ALIKE * self.best_rps)


def beside(row: dict[str, Any]) -> Beside:
    """`auto` against the best of the others, which the same seeds have shown to be the best."""
    goodput = row["goodput_rps"]
    means = {one: fmean(goodput[one]) for one in SINGLES if goodput[one] is not None}
    best = max(means, key=lambda one: means[one])
    differences = [a - b for a, b in zip(goodput["auto"], goodput[best], strict=True)]
    error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else 0.0
    return Beside(best, means[best], fmean(goodput["auto"]), fmean(differences), error)
