"""How good are placements, and how long do they take?

    python scripts/bench_planner.py cases    # MuxServe's synthetic cases: auto, muxserve, spatial
    python scripts/bench_planner.py simulated  # the same by the simulator
    python scripts/bench_planner.py sustained  # the traffic of which each strategy serves 90 %
    python scripts/bench_planner.py small    # auto against the best of all placements
    python scripts/bench_planner.py scale    # 19 models on 32 GPUs to 1,000 on 4,096
    python scripts/bench_planner.py plot

Goodput is what the queueing estimator says (muxrt/planner/queueing.py). Times include the fit of
the profile, but not the compilation of the estimator: a machine's first plan takes some seconds
longer.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from random import Random
from resource import RUSAGE_SELF, getrusage
from time import perf_counter
from typing import Annotated, Any

import typer
from bench_record import FOLDER, Record, draw
from exhaustive import best_goodput_rps
from planner_worlds import (
    ALPHAS,
    CASES,
    MUXSERVE_CONTROL_S,
    Case,
    large,
    sim_judge,
    small,
    synthetic,
)
from rich.console import Console
from rich.table import Table

from muxrt.errors import ConfigError
from muxrt.planner.assign import in_order, to_placement
from muxrt.planner.draft import Draft, check_draft, num_gpus
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.search import Search
from muxrt.planner.strategies import STRATEGIES
from muxrt.planner.workload import Problem

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Out = Annotated[Path, typer.Option(help="Folder of the JSON and the plots.")]

COMPARED = ("spatial", "muxserve", "auto")
LOAD_S, WARMUP_S = 70.0, 25.0  # simulated; an answer of 338 tokens takes 20 s
ENOUGH, NUM_HALVINGS = 0.9, 7
NUM_WRONG, WRONG = 8, 2.0  # rates that are twice or half of what was planned for
SCALES = ((19, 32), (50, 128), (100, 256), (300, 1024), (1000, 4096))


def place(name: str, problem: Problem) -> tuple[Draft, float]:
    """A strategy's placement, checked, and the seconds that it took."""
    judge = QueueingJudge(problem)
    begun_s = perf_counter()
    draft = STRATEGIES[name](problem, Search(judge, judge))
    took_s = perf_counter() - begun_s
    check_draft(draft, problem)
    return draft, took_s


def robust_rps(problem: Problem, draft: Draft) -> float:
    """Mean goodput when every rate is wrong by a factor of two, up or down."""
    found = []
    for seed in range(NUM_WRONG):
        rng = Random(seed)
        factors = {model: rng.choice((1 / WRONG, WRONG)) for model in problem.demands}
        found.append(QueueingJudge(problem).scaled(factors)(draft).goodput_rps)
    return statistics.fmean(found)


def compare(case: Case, control_s: float) -> dict[str, Any]:
    """The strategies on one case; rates in requests/s."""
    problem = synthetic(case, control_s)
    row: dict[str, Any] = {"alpha": case.alpha, "top_rps": case.top_rps, "control_s": control_s}
    row["offered_rps"] = sum(demand.rate_rps for demand in problem.demands.values())
    for name in COMPARED:
        draft, took_s = place(name, problem)
        row[name] = {
            "goodput_rps": QueueingJudge(problem)(draft).goodput_rps,
            "wrong_rates_rps": robust_rps(problem, draft),
            "gpus": num_gpus(draft),
            "seconds": round(took_s, 3),
        }
    return row


def ratios(rows: list[dict[str, Any]], other: str, what: str = "goodput_rps") -> list[float]:
    """`auto` over another strategy, case by case."""
    return [row["auto"][what] / row[other][what] for row in rows]


@app.command()
def cases(out: Out = FOLDER) -> None:
    """MuxServe's 12 synthetic cases, with and without its engine's control cost."""
    record = Record(out / "planner_cases.json", {"wrong_rates": [NUM_WRONG, WRONG]})
    place("auto", synthetic(CASES[0]))  # compiles
    for control_s in (MUXSERVE_CONTROL_S, 0.0):
        rows = [compare(case, control_s) for case in CASES]
        for row in rows:
            record.add("cases", row)
        summary = {
            f"{what} over {other}": {
                "geometric_mean": round(statistics.geometric_mean(ratios(rows, other, what)), 3),
                "least": round(min(ratios(rows, other, what)), 4),
            }
            for other in ("spatial", "muxserve")
            for what in ("goodput_rps", "wrong_rates_rps")
        }
        record.add("summary", {"control_s": control_s, **summary})
        _show_cases(rows, summary, control_s)


@app.command()
def simulated(
    alphas: Annotated[str, typer.Option(help="Which cases.")] = "0.7,1.3,1.7",
    out: Out = FOLDER,
) -> None:
    """The cases with MuxServe's control cost, by the simulator: another judge than the search's."""
    wanted = {float(alpha) for alpha in alphas.split(",")}
    record = Record(out / "planner_simulated.json", {"load_s": LOAD_S, "warmup_s": WARMUP_S})
    for case in (case for case in CASES if case.alpha in wanted):
        problem = synthetic(case, MUXSERVE_CONTROL_S)
        judge = sim_judge(case, MUXSERVE_CONTROL_S, LOAD_S, WARMUP_S)
        row: dict[str, Any] = {"alpha": case.alpha, "top_rps": case.top_rps}
        for name in COMPARED:
            draft = in_order(problem, place(name, problem)[0])
            score = QueueingJudge(problem)(draft)
            total = judge.report(to_placement(problem, draft, score)).total
            row[name] = {"goodput_rps": total.goodput_rps, "attainment": total.attainment}
            row[name]["estimated_rps"] = score.goodput_rps
        record.add("cases", row)
        Console().print(row)


@app.command()
def sustained(out: Out = FOLDER) -> None:
    """The largest traffic of which 90 % is served within SLO, placed anew for every rate tried."""
    record = Record(out / "planner_sustained.json", {"attainment": ENOUGH, "steps": NUM_HALVINGS})
    for control_s in (MUXSERVE_CONTROL_S, 0.0):
        for alpha in ALPHAS:
            rates = {name: sustained_rps(name, alpha, control_s) for name in COMPARED}
            record.add("rows", {"alpha": alpha, "control_s": control_s, **rates})
            Console().print(record.data["rows"][-1])
        rows = [row for row in record.data["rows"] if row["control_s"] == control_s]
        for other in ("spatial", "muxserve"):
            mean = statistics.geometric_mean(row["auto"] / row[other] for row in rows)
            record.add("summary", {"control_s": control_s, "over": other, "mean": round(mean, 3)})
    Console().print(record.data["summary"])


def sustained_rps(name: str, alpha: float, control_s: float) -> float:
    """Of the most popular model, requests/s; by bisection, to about 2 %."""
    low, high = 0.0, 160.0
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        problem = synthetic(Case(alpha, middle), control_s)
        try:
            draft, _ = place(name, problem)
        except ConfigError:  # `muxserve` finds no way to place so much
            high = middle
            continue
        offered_rps = sum(demand.rate_rps for demand in problem.demands.values())
        enough = QueueingJudge(problem)(draft).goodput_rps >= ENOUGH * offered_rps
        low, high = (middle, high) if enough else (low, middle)
    return low


def _show_cases(rows: list[dict[str, Any]], summary: dict[str, Any], control_s: float) -> None:
    console = Console()
    table = Table("case", "offered", *COMPARED, "auto's seconds", "GPUs")
    for row in rows:
        table.add_row(
            Case(row["alpha"], row["top_rps"]).title,
            f"{row['offered_rps']:.1f}",
            *(f"{row[name]['goodput_rps']:.1f}" for name in COMPARED),
            f"{row['auto']['seconds']:.1f}",
            str(row["auto"]["gpus"]),
        )
    console.print(f"requests/s within SLO; control {control_s * 1e3:g} ms per sequence and step")
    console.print(table)
    console.print(summary)


@app.command("small")
def small_cases(
    first: Annotated[int, typer.Option(help="Seed of the first case.")] = 0,
    count: Annotated[int, typer.Option(help="How many.")] = 200,
    out: Out = FOLDER,
) -> None:
    """Up to 5 models on up to 4 GPUs: `auto` against the best of all placements."""
    record = Record(out / "planner_small.json", {"first": first, "count": count})
    found = []
    for seed in range(first, first + count):
        problem = small(seed)
        draft, took_s = place("auto", problem)
        best_rps = best_goodput_rps(problem)
        share = QueueingJudge(problem)(draft).goodput_rps / best_rps
        found.append((share, took_s, seed))
    shares = sorted(share for share, _, _ in found)
    summary = {
        "least": round(shares[0], 4),
        "below 0.98": sum(share < 0.98 for share in shares),
        "below 0.995": sum(share < 0.995 for share in shares),
        "median": round(statistics.median(shares), 4),
        "above 1 (finer splits than the grid's)": sum(share > 1 + 1e-9 for share in shares),
        "median seconds": round(statistics.median(took_s for _, took_s, _ in found), 3),
    }
    record.put("summary", summary)
    record.put("worst", [[round(share, 4), seed] for share, _, seed in sorted(found)[:5]])
    Console().print(summary)


@app.command()
def scale(out: Out = FOLDER) -> None:
    """Seconds and memory by size; every size in a process of its own."""
    record = Record(out / "planner_scale.json", {})
    for models, gpus in SCALES:
        command = [sys.executable, __file__, "one", str(models), str(gpus)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(answer.stdout)
        record.add("sizes", row)
        Console().print(row)


@app.command(hidden=True)
def one(models: int, gpus: int) -> None:
    """One size of `scale`."""
    place("auto", small(0))  # compiles
    problem = large(models, gpus)
    draft, took_s = place("auto", problem)
    row = {
        "models": models,
        "gpus": gpus,
        "seconds": round(took_s, 2),
        "peak_mb": round(getrusage(RUSAGE_SELF).ru_maxrss / 1024),
        "units": len(draft),
        "offered_rps": round(sum(demand.rate_rps for demand in problem.demands.values()), 1),
        "goodput_rps": round(QueueingJudge(problem)(draft).goodput_rps, 1),
        "gpus_used": num_gpus(draft),
    }
    print(json.dumps(row))


@app.command()
def plot(out: Out = FOLDER) -> None:
    """Draw what was measured."""
    for name in ("planner_cases", "planner_scale"):
        draw(name, out)


if __name__ == "__main__":
    app()
