"""muxrt's `muxserve` strategy beside the placements that MuxServe's published runs used.

    python scripts/compare_muxserve.py             # the 12 synthetic cases, as Markdown
    python scripts/compare_muxserve.py --choices   # what each choice of its code changes (minutes)
    python scripts/compare_muxserve.py --goodput   # both placements under SLO, best lanes for each
    python scripts/compare_muxserve.py --clear     # how the rule on gains depends on what counts

Two placements are of one class where they use as many meshes of each size.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import geometric_mean

from muxserve_code import PROFILE, PROMPT_TOKENS, Choices, Llm, place

from muxrt.config.cluster import KINDS, Cluster, NodeGroup
from muxrt.config.placement import Slo
from muxrt.cost.memory import MUXSERVE_MEMORY
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Group, Part, packs_pool
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.search import Search
from muxrt.planner.strategies.muxserve import (
    OVERLOAD_PCT,
    SM_PCTS,
    computation,
    muxserve,
    parallel_candidates,
)
from muxrt.planner.throughput import Guest, throughput_rps
from muxrt.planner.workload import Demand, Engine, Lengths, Problem
from muxrt.workload.offered import moments
from muxrt.workload.spec import load_workload

ROOT = Path(__file__).parent.parent
LOGGED = ROOT / "docs" / "benchmarks" / "muxserve_placements.csv"
WORKLOAD = ROOT / "configs" / "workloads" / "muxserve.yaml"
OUTPUT_TOKENS = 338  # ShareGPT's mean; the code has 337
MODELS = ("llama-7b",) * 12 + ("llama-13b",) * 4 + ("llama-30b",) * 2 + ("llama-65b",)
HOTTEST, LARGEST = "llm-0", "llm-18"
# Its scheduler's own time per sequence and decode step, which its planner adds too.
ENGINE = Engine(MUXSERVE_MEMORY, control_s=1e-4)
CLEAR = 0.01  # of a model's rate: a smaller difference between gains is none

Case = tuple[float, float]  # alpha, scale
Units = list[tuple[int, tuple[str, ...]]]  # GPUs of a mesh, its LLMs


def logged() -> dict[Case, Units]:
    """The meshes of each case."""
    with LOGGED.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    found: dict[Case, dict[tuple[str, int], tuple[str, ...]]] = {}
    for line in lines:
        meshes = found.setdefault((float(line["alpha"]), float(line["scale"])), {})
        key = (line["mesh"], int(line["gpus"]))
        meshes[key] = (*meshes.get(key, ()), line["llm"])
    return {
        case: [(gpus, names) for (_, gpus), names in meshes.items()]
        for case, meshes in found.items()
    }


def llms(case: Case) -> list[Llm]:
    """The synthetic workload: popularity by a power law, small models first."""
    alpha, scale = case
    return [
        Llm(f"llm-{index}", model, 40 * scale * (index + 1) ** -alpha)
        for index, model in enumerate(MODELS)
    ]


def problem(case: Case, costs: CostModel, engine: Engine = ENGINE) -> Problem:
    """A case as our strategy sees it. Targets do not matter to it."""
    profile = load_profile(PROFILE)
    prompt, output = (Lengths(float(m), float(m * m)) for m in (PROMPT_TOKENS, OUTPUT_TOKENS))
    demands = [
        Demand(m.name, profile.shapes[m.model], m.rate_rps, prompt, output, Slo(1.0, 0.08), 2048)
        for m in llms(case)
    ]
    cluster = Cluster(nodes=(NodeGroup(gpu="a100-80g", gpus=8, count=4),))
    return Problem(cluster, demands, costs, engine)


def cost_model() -> CostModel:
    """Fits of the A100 profile, to be shared by all cases."""
    return CostModel([load_profile(PROFILE)], KINDS)


def ours(given: Problem) -> Units:
    """What the strategy `muxserve` answers."""
    judge = QueueingJudge(given)
    return [(group.size, group.models) for group in muxserve(given, Search(judge, judge))]


def mesh_class(units: Units, names: Sequence[str] | None = None) -> tuple[int, ...]:
    """Mesh sizes, largest first; only meshes with one of `names`, as logs of some LLMs are lost."""
    kept = (size for size, models in units if names is None or set(models) & set(names))
    return tuple(sorted(kept, reverse=True))


def mesh_of(units: Units, name: str) -> int:
    """GPUs of the mesh that holds an LLM."""
    return next(size for size, models in units if name in models)


def same_class(units: Units, others: Units) -> bool:
    """Whether both use as many meshes of each size, for the LLMs that `others` knows of."""
    names = [name for _, models in others for name in models]
    return mesh_class(units, names) == mesh_class(others)


def is_same(units: Units, others: Units) -> bool:
    """Whether every LLM that `others` knows of has the same neighbours on as many GPUs."""
    names = {name for _, models in others for name in models}
    kept = [(size, names & set(models)) for size, models in units if names & set(models)]
    return all((size, set(models)) in kept for size, models in others)


@dataclass(frozen=True, slots=True)
class Rules:
    """How often a placement breaks what the published algorithm promises."""

    structure: int  # LLMs on no mesh or several; meshes that do not fit the nodes
    memory: int  # meshes
    shares: int  # meshes whose decodes have more SMs together than there are
    rates: int  # LLMs on a degree that misses their rate while another one meets it
    gains: int  # LLMs that would have gained clearly more on another of the same meshes

    @property
    def broken(self) -> list[str]:
        return [f"{getattr(self, f.name)} {f.name}" for f in fields(self) if getattr(self, f.name)]


def check(given: Problem, units: Units, clear: float = CLEAR) -> Rules:
    """The published rules, by muxrt's estimator, for the LLMs that are in `units`."""
    placed = Counter(name for _, models in units for name in models)
    sizes = Counter(size for size, _ in units)
    guests = {
        name: parallel_candidates(given, name, every=True).get((0, mesh_of(units, name)))
        or Guest(name, SM_PCTS[-1])
        for name in placed
    }
    shares = [sum(guests[name].decode_pct for name in models) for _, models in units]
    return Rules(
        structure=sum(count != 1 for count in placed.values())
        + (not packs_pool(sizes, given.pools[0])),
        memory=sum(not given.fits(0, size, models) for size, models in units),
        shares=sum(share > 100 + OVERLOAD_PCT for share in shares),
        rates=sum(
            (0, mesh_of(units, name)) not in parallel_candidates(given, name) for name in placed
        ),
        gains=sum(_misplaced(given, units, guests, clear)),
    )


def _misplaced(
    given: Problem, units: Units, guests: dict[str, Guest], clear: float
) -> Iterator[bool]:
    """For each LLM, in order of demand: whether another mesh would have gained clearly more."""
    filled: list[tuple[int, tuple[Guest, ...]]] = [(size, ()) for size, _ in units]
    home = {name: index for index, (_, models) in enumerate(units) for name in models}
    for name in sorted(home, key=lambda name: (-computation(given, name), name)):
        candidates = parallel_candidates(given, name)
        gains = {
            index: _total(given, size, (*there, candidates[0, size])) - _total(given, size, there)
            for index, (size, there) in enumerate(filled)
            if (0, size) in candidates and _holds(given, size, (*there, candidates[0, size]))
        }
        size, there = filled[home[name]]
        gain = _total(given, size, (*there, guests[name])) - _total(given, size, there)
        yield max(gains.values(), default=gain) > gain + clear * given.demands[name].rate_rps
        filled[home[name]] = size, (*there, guests[name])


def _holds(given: Problem, size: int, guests: tuple[Guest, ...]) -> bool:
    shares = sum(guest.decode_pct for guest in guests)
    return shares <= 100 + OVERLOAD_PCT and given.fits(
        0, size, tuple(guest.model for guest in guests)
    )


def _total(given: Problem, size: int, guests: tuple[Guest, ...]) -> float:
    return sum(throughput_rps(given, 0, size, guests))


def served(given: Problem, units: Units) -> float:
    """Requests/s of a placement by MuxServe's own estimator."""
    return sum(
        _total(
            given,
            size,
            tuple(
                parallel_candidates(given, name, every=True).get(
                    (0, size), Guest(name, SM_PCTS[-1])
                )
                for name in models
            ),
        )
        for size, models in units
    )


def show(sizes: Sequence[int]) -> str:
    """`2x8 1x4`: meshes by size."""
    return " ".join(f"{count}x{size}" for size, count in sorted(Counter(sizes).items())[::-1])


def table() -> Iterator[str]:
    """A line per case."""
    costs = cost_model()
    yield (
        "| alpha, scale | logged meshes | breaks | `muxserve` | hottest on | 65B on | requests/s"
        " | its code, rebuilt |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for case, units in logged().items():
        given = problem(case, costs)
        found, rebuilt = ours(given), place(llms(case), Choices())
        broken = ", ".join(check(given, units).broken) or "nothing"
        same = "the same LLMs" if is_same(rebuilt, units) else show(mesh_class(rebuilt))
        yield (
            f"| {case[0]}, {case[1]} | {show(mesh_class(units))} | {broken}"
            f" | {show(mesh_class(found))}"
            f" | {mesh_of(units, HOTTEST)} / {mesh_of(found, HOTTEST)}"
            f" | {mesh_of(units, LARGEST)} / {mesh_of(found, LARGEST)}"
            f" | {served(given, units):.0f} / {served(given, found):.0f} | {same} |"
        )


SWITCHES = {
    "as its code": {},
    "gains from the mesh they are of": {"stale_gains": False},
    "the sum of throughputs, not the weighted mean": {"weighted_mean": False},
    "straight lines between profiled batches": {"rounds_up": False},
    "only degrees that meet the rate": {"keeps_misses": False},
    "no scheduling time": {"control": False},
    "no limit to the SMs of a mesh": {"overload_pct": 1e3},
    "7.6 GB reserved per LLM (June 2024)": {"reserved_gb": 7.6},
}


def choices() -> Iterator[str]:
    """A line per choice that is undone alone."""
    yield "| the code with | same LLMs | same meshes | hottest on as many GPUs | 65B |"
    yield "|---|---|---|---|---|"
    for name, change in SWITCHES.items():
        pairs = [
            (place(llms(case), replace(Choices(), **change)), units)
            for case, units in logged().items()
        ]
        pairs = [(found, units) for found, units in pairs if found]
        counts = [
            sum(is_same(*pair) for pair in pairs),
            sum(same_class(*pair) for pair in pairs),
            *(
                sum(mesh_of(found, llm) == mesh_of(units, llm) for found, units in pairs)
                for llm in (HOTTEST, LARGEST)
            ),
        ]
        yield f"| {name} | {' | '.join(str(count) for count in counts)} |"


CLEARS = (0.01, 0.05, 0.1, 0.25)
ENGINES = {
    "MuxServe's memory, 0.1 ms": ENGINE,
    "MuxServe's memory, no scheduling time": Engine(MUXSERVE_MEMORY),
    "muxrt's memory, 0.1 ms": Engine(control_s=ENGINE.control_s),
}


def obeying(engine: Engine, clear: float, costs: CostModel) -> list[Case]:
    """The cases whose logged placement breaks no rule."""
    return [
        case
        for case, units in logged().items()
        if not check(problem(case, costs, engine), units, clear).broken
    ]


def sensitivity() -> Iterator[str]:
    """How many logged placements obey all rules, by what gain is clear and what an engine costs."""
    costs = cost_model()
    yield f"| a gain is clear from | {' | '.join(f'{clear:.0%} of the rate' for clear in CLEARS)} |"
    yield "|---|" + "---|" * len(CLEARS)
    for name, engine in ENGINES.items():
        counts = (str(len(obeying(engine, clear, costs))) for clear in CLEARS)
        yield f"| {name} | {' | '.join(counts)} |"


def under_slo(given: Problem, control_s: float) -> Problem:
    """The same rates, with the spread of lengths and the targets of WORKLOAD."""
    traffic = load_workload(WORKLOAD)
    assert traffic.slo is not None
    prompt, output = (
        Lengths(found.mean, found.mean_square)
        for found in (moments(traffic.prompt), moments(traffic.output))
    )
    demands = [
        replace(demand, prompt=prompt, output=output, slo=traffic.slo)
        for demand in given.demands.values()
    ]
    # As little memory as muxrt's own engine needs.
    return Problem(given.cluster, demands, given.cost, Engine(control_s=control_s))


def goodput_ratios(control_s: float) -> dict[Case, float]:
    """Goodput of ours over that of the logged placement, by the queueing estimator."""
    costs, ratios = cost_model(), {}
    for case, units in logged().items():
        if sum(len(models) for _, models in units) < len(MODELS):
            continue  # logs were lost: what those LLMs were served is not known
        given = under_slo(problem(case, costs), control_s)
        judge = QueueingJudge(given)
        capacity = Capacity(given, judge)
        before, after = (
            sum(
                judge.group(
                    capacity.tuned(Group(0, size, tuple(map(Part, sorted(models)))))
                ).goodput_rps
                for size, models in each
            )
            for each in (units, ours(given))
        )
        ratios[case] = after / before
    return ratios


def goodput() -> Iterator[str]:
    """A line per case whose logs are complete, then the mean."""
    found = [goodput_ratios(control_s) for control_s in (ENGINE.control_s, 0.0)]
    yield "| ours / logged | with 0.1 ms of scheduling per sequence and step | with none |"
    yield "|---|---|---|"
    for case in found[0]:
        yield f"| {case[0]}, {case[1]} | {found[0][case]:.2f} | {found[1][case]:.2f} |"
    means = " | ".join(f"{geometric_mean(list(ratios.values())):.2f}" for ratios in found)
    yield f"| geometric mean | {means} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--choices", action="store_true", help="undo each choice of the code alone")
    parser.add_argument("--goodput", action="store_true", help="score both under SLO")
    parser.add_argument("--clear", action="store_true", help="what depends on what a gain is")
    asked = parser.parse_args()
    views = {choices: asked.choices, goodput: asked.goodput, sensitivity: asked.clear}
    for line in next((view for view, wanted in views.items() if wanted), table)():
        print(line, flush=True)


if __name__ == "__main__":
    main()
