"""Which policy serves most requests in time? Simulates the cases of policy_cases.py under each.

    python scripts/compare_policies.py --out docs/benchmarks/policies.json
    python scripts/compare_policies.py --cases calm,skewed --seeds 1 --policies adbs,slo
    python scripts/compare_policies.py --find 0.9 --out docs/benchmarks/policies_rates.json
    python scripts/compare_policies.py --cases paper-30b-13b-7b --speeds 0.2,0.4,0.6,0.8,1 \
        --seeds 12 --out docs/benchmarks/policies_cache.json

All policies get the same requests. No GPU is needed; docs/policies.md has what was assumed.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from math import exp, log
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Annotated, Any

import typer
from bench_record import Record, draw
from policy_cases import CASES, SEEDS, TUNED_SEEDS, Case
from rich.console import Console
from rich.progress import track
from rich.table import Table

from muxrt.sim.group import Simulation, groups
from muxrt.sim.report import make_report
from muxrt.sim.search import attains, find_speed
from muxrt.workload.arrivals import Arrival

POLICIES = ("adbs", "fcfs", "round-robin", "slo")
BASE = "adbs"
PICTURES = ("policies", "policies_cache")  # scripts/bench_plots.py draws these


@dataclass(frozen=True)
class Score:
    """One case under one policy, one seed."""

    case: str
    policy: str
    seed: int
    speed: float  # of the case's rates
    offered_rps: float
    goodput_rps: float
    attainment: float
    output_tokens_per_s: float
    ttft_p99_s: float | None
    tpot_p99_s: float | None
    attainments: dict[str, float]  # by model
    cache: dict[str, float]  # mean share of the unit's KV blocks while requests come, by model
    needed: dict[str, float]  # likewise, if the same were dealt by what requests fill
    fairness: float  # of the two: Jain's index of use / need, 1 = in proportion to what is asked
    preemptions: int
    cpu_s: float


class Watched(Simulation):
    """A simulation that notes what each model holds, once a second while requests come."""

    until_s = 0.0
    used: dict[str, list[float]]

    def _sample(self) -> None:
        super()._sample()
        if self.loop.now_s <= self.until_s:
            for unit in self.units.values():
                pool = unit.unit.scheduler.memory.pool
                for name, account in pool.accounts.items():
                    self.used[name].append(account.used / pool.num_blocks)


def score(case: Case, policy: str, seed: int, speed: float = 1.0) -> Score:
    """Simulate one run at `speed` times the case's rates."""
    begun_s = process_time()
    config, asked = case.config(policy), case.requests(seed, speed)
    (group,) = groups(config.units, config.models)
    simulation = Watched(group, case.setting())
    simulation.until_s, simulation.used = case.traffic.duration_s, {n: [] for n in case.models}
    result = simulation.run(list(enumerate(asked)))
    report = make_report(result.served, result.units, case.slos, case.traffic.duration_s)
    total = report.total
    cache = {name: mean(shares) if shares else 0.0 for name, shares in simulation.used.items()}
    fills = needs(case, simulation, asked)
    scale = sum(cache.values()) / sum(fills.values())
    return Score(
        case.name,
        policy,
        seed,
        speed,
        len(asked) / case.traffic.duration_s,
        total.goodput_rps or 0.0,
        total.attainment or 0.0,
        total.output_tokens_per_s,
        total.ttft_s.p99,
        total.tpot_s.p99,
        {row.model: row.attainment for row in report.rows if row.attainment is not None},
        cache,
        {name: scale * blocks for name, blocks in fills.items()},
        fairness(cache, fills),
        total.preemptions,
        process_time() - begun_s,
    )


def needs(case: Case, simulation: Simulation, asked: Sequence[Arrival]) -> dict[str, float]:
    """The blocks that the requests of each model fill: what a fair share goes by (MuxServe 3.3)."""
    (unit,) = simulation.units.values()
    found = dict.fromkeys(case.models, 0.0)
    for arrival in asked:
        layout = unit.plan.models[arrival.model].layout
        found[arrival.model] += layout.num_blocks(arrival.prompt_tokens + arrival.output_tokens)
    return found


def fairness(cache: Mapping[str, float], needed: Mapping[str, float]) -> float:
    """Jain's index of use per need (Jain, Chiu, Hawe 1984): 1 = all alike, 1/n = one has all."""
    ratios = [cache[name] / need for name, need in needed.items() if need]
    squares = sum(ratio * ratio for ratio in ratios)
    return sum(ratios) ** 2 / (len(ratios) * squares) if squares else 1.0


def _score(job: tuple[str, str, int, float]) -> dict[str, Any]:
    name, policy, seed, speed = job
    return asdict(score(CASES[name], policy, seed, speed))


def largest_rate(case: Case, policy: str, seed: int, target: float) -> float:
    """Requests/s at which `target` of them are in time, all rates scaled alike."""
    config, setting = case.config(policy), case.setting()

    def holds(speed: float) -> bool:
        asked = case.requests(seed, speed)
        return bool(asked) and attains(config, setting, asked, case.slos, target)

    speed = find_speed(holds).speed
    return len(case.requests(seed, speed)) / case.traffic.duration_s if speed else 0.0


def _rate(job: tuple[str, str, int, float]) -> dict[str, Any]:
    name, policy, seed, target = job
    found = largest_rate(CASES[name], policy, seed, target)
    return {"case": name, "policy": policy, "seed": seed, "target": target, "rate_rps": found}


def ratios(rows: Sequence[Mapping[str, Any]], measure: str, policy: str) -> dict[str, float]:
    """Mean over seeds of `policy` over that of the base, by case; where the base has any."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        found[row["case"], row["policy"]].append(row[measure])
    names = dict.fromkeys(row["case"] for row in rows)
    return {
        name: mean(found[name, policy]) / mean(found[name, BASE])
        for name in names
        if found.get((name, policy)) and mean(found.get((name, BASE), [0.0]))
    }


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; one zero makes it zero."""
    return exp(mean(map(log, values))) if values and min(values) > 0 else 0.0


def show(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line per case and policy, then how ours compares."""
    table = Table("case", "policy", "goodput", "of", "in time", "tokens/s", "TTFT p99", "TPOT p99",
                  "cache fair", "by model")  # fmt: skip
    groups_: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups_[row["case"], row["policy"]].append(row)
    for (name, policy), mine in groups_.items():
        models = " ".join(
            f"{100 * mean(r['attainments'].get(m, 0.0) for r in mine):.0f}"
            for m in mine[0]["attainments"]
        )
        figures = [
            mean(row[key] or 0.0 for row in mine)
            for key in ("goodput_rps", "offered_rps", "attainment", "output_tokens_per_s",
                        "ttft_p99_s", "tpot_p99_s", "fairness")
        ]  # fmt: skip
        texts = ("{:.2f}", "{:.2f}", "{:.1%}", "{:.0f}", "{:.2f}", "{:.4f}", "{:.2f}")
        table.add_row(name, policy, *(t.format(f) for t, f in zip(texts, figures, strict=True)),
                      models)  # fmt: skip
    console.print(table)
    for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != BASE):
        good, tokens = (ratios(rows, m, policy) for m in ("goodput_rps", "output_tokens_per_s"))
        for kind, chosen in (("tuned", True), ("held out", False)):
            part = {n: r for n, r in good.items() if CASES[n].is_tuned is chosen}
            if part:
                worst, whole = min(part, key=part.__getitem__), geometric_mean(list(part.values()))
                slow = min(tokens[n] for n in part)
                console.print(
                    f"{policy} over {BASE}, {kind}: goodput x {whole:.3f}"
                    f" (geometric mean of {len(part)}), least {part[worst]:.3f} ({worst});"
                    f" tokens/s at least x {slow:.3f}",
                    highlight=False,
                )


def page_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/policies.md: means over seeds, and ours over the base."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["case"], row["policy"]].append(row)
    good, tokens = (ratios(rows, m, "slo") for m in ("goodput_rps", "output_tokens_per_s"))
    lines = [
        "| case | requests/s | " + " | ".join(POLICIES) + " | slo / adbs | tokens/s |",
        "|---" * (len(POLICIES) + 4) + "|",
    ]
    for name in dict.fromkeys(row["case"] for row in rows):
        offered = mean(row["offered_rps"] for row in found[name, BASE])
        shares = [f"{mean(r['attainment'] for r in found[name, p]):.1%}" for p in POLICIES]
        mark = " *" if CASES[name].is_tuned else ""
        lines.append(
            f"| {name}{mark} | {offered:.1f} | {' | '.join(shares)} | {good[name]:.2f} |"
            f" {tokens[name]:.3f} |"
        )
    return "\n".join(lines)


def main(
    cases: Annotated[str, typer.Option(help="Names, or tuned, or all.")] = "all",
    policies: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(POLICIES),
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(map(str, SEEDS)),
    speeds: Annotated[str, typer.Option(help="Of the cases' rates, separated by commas.")] = "1",
    find: Annotated[
        float | None, typer.Option(help="The largest rate with this attainment instead: 0.9.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON; a picture is drawn beside it.")] = None,
) -> None:
    """Compare policies on the same requests."""
    names = {"all": list(CASES), "tuned": [n for n in CASES if CASES[n].is_tuned]}.get(
        cases, cases.split(",")
    )
    last = [find] if find else list(map(float, speeds.split(",")))
    jobs = list(product(names, policies.split(","), map(int, seeds.split(",")), last))
    record = None
    if out is not None:
        about = {name: {"what": CASES[name].what, "tuned": CASES[name].is_tuned} for name in names}
        record = Record(out, {"cases": about, "tuned_seeds": TUNED_SEEDS})
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes) as pool:
        for row in track(pool.map(_rate if find else _score, jobs), "simulating", len(jobs)):
            rows.append(row)
            if record is not None:
                record.add("rates" if find else "runs", row)
    if out is not None and out.stem in PICTURES:
        draw(out.stem, out.parent)
    console = Console(width=150)
    if find is None:
        show(console, rows)
        if out is not None and set(POLICIES) <= set(policies.split(",")) and "," not in speeds:
            print(page_table(rows))
    else:
        show_rates(console, rows, find)


def show_rates(console: Console, rows: Sequence[Mapping[str, Any]], target: float) -> None:
    """The largest rates, by case and policy."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        found[row["case"], row["policy"]].append(row["rate_rps"])
    table = Table(f"requests/s with {target:.0%} in time", *policies)
    for name in dict.fromkeys(row["case"] for row in rows):
        table.add_row(name, *(f"{mean(found[name, policy]):.2f}" for policy in policies))
    console.print(table)
    for policy in policies:
        values = list(ratios(rows, "rate_rps", policy).values())
        if policy != BASE:
            print(f"{policy} over {BASE}: x {geometric_mean(values):.3f} (of {len(values)} cases)")


if __name__ == "__main__":
    typer.run(main)
