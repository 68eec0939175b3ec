"""Disaggregated placements beside what DistServe and Splitwise published.

    python scripts/compare_disagg.py example      # 512 in / 64 out: 2 prefill GPUs to 1 decode GPU
    python scripts/compare_disagg.py distserve    # OPT-13B and 66B: parallelism that is chosen
    python scripts/compare_disagg.py splitwise    # BLOOM-176B: designs at equal power and cost
    python scripts/compare_disagg.py throughput   # the same: least power and cost for 70 requests/s
    python scripts/compare_disagg.py search       # CPU seconds for 32 GPUs
    python scripts/compare_disagg.py routing      # policies of the router, on a mix that shifts
    python scripts/compare_disagg.py auto         # ten workloads: both kinds beside each alone
    python scripts/compare_disagg.py tables       # all of them as Markdown

Each but the last prints its figures as JSON and adds them to docs/benchmarks/disagg.json.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

from auto_worlds import LOADS, SINGLES, WORLDS, beside, compare
from bloom_world import machine, provisioner
from opt_world import LAYERS_HIDDEN, LONGEST, all_alike, coefficients, instance, kv_capacity
from routing_world import MARKS, POLICIES, TRAFFICS, marked, over_seeds, placement

from muxrt.config.placement import Slo
from muxrt.cost.coefficients import Line, LinearSteps
from muxrt.planner.disaggregate import (
    Phases,
    Space,
    Split,
    high_affinity,
    low_affinity,
    phases,
    simulated,
)
from muxrt.planner.phase_tables import Limits, costs_of
from muxrt.planner.phases import COMPAT, Instance, Judge, Rules, draw, saturating_tokens
from muxrt.planner.provision import A100, H100, Budget, Cluster, equal_count
from muxrt.planner.workload import Lengths

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "disagg.json"
EXAMPLE = Slo(ttft_s=0.4, tpot_s=0.04)
# Model, its SLOs' source, TTFT and TPOT, and the published tp and pp of both phases.
OPT_CASES = (
    ("opt-13b", "OSDI", 0.25, 0.1, ((2, 1), (1, 1))),
    ("opt-66b", "OSDI", 2.5, 0.15, ((4, 1), (2, 2))),
    ("opt-66b", "artifact", 0.4, 0.1, ((4, 1), (2, 2))),
)
TPS = {"opt-13b": (1, 2, 4), "opt-66b": (2, 3, 4, 8)}
# Mean and squared variation of prompts and answers. The means of the paper's figure 7 could not be
# read: these are two guesses at ShareGPT, many turns joined or few.
CHATS = {"long chats": ((755, 0.7), (200, 1.0)), "short chats": ((300, 1.0), (250, 1.0))}
# Prompt and token machines of the paper (its repository's notebook), conversation.
PAPER_SPLITS = {
    Budget.POWER: {"AA": (45, 25), "HH": (25, 15), "HA": (25, 26), "HHcap": (25, 21)},
    Budget.COST: {"AA": (51, 35), "HH": (25, 15), "HA": (30, 21), "HHcap": (30, 10)},
}
DESIGNS = {
    "AA": ("A100", "A100"),
    "HH": ("H100", "H100"),
    "HA": ("H100", "A100"),
    "HHcap": ("H100", "H100 capped"),
}
NUM_H100 = 40
RATE_RPS, MOST = 70.0, 160  # of equal throughput; machines of a kind


def example() -> dict[str, Any]:
    """One A100 for each instance, and with steps scaled to the paper's 5.6 and 10 requests/s."""
    traffic = all_alike(512, 64)
    own = coefficients("own")["opt-13b", 1]
    alone = Judge(traffic, EXAMPLE, rules=Rules(joint=False))  # each phase by itself, as the paper
    found = {}
    for name, steps in (
        ("DistServe's coefficients", own),
        ("vLLM's coefficients", coefficients("vllm")["opt-13b", 1]),
        ("scaled to 5.6 and 10 requests/s", _scaled(own, alone)),
    ):
        gpu, judge = _gpu(steps), Judge(traffic, EXAMPLE)
        ratios = {
            f"{n}:{m}": judge.split_rps(gpu, n, gpu, m) / (n + m)
            for n, m in ((1, 1), (2, 1), (3, 1), (3, 2), (1, 2))
        }
        colocated = judge.colocated_rps(gpu)
        found[name] = {
            "prefill_rps": alone.prefill_rps(gpu),
            "decode_rps": alone.decode_rps(gpu),
            "colocated_rps": colocated,
            "per_gpu": ratios,
            "ratio_2_1": ratios["2:1"] / colocated,
        }
    return found


def _gpu(steps: LinearSteps) -> Instance:
    limits = Limits(LONGEST, LONGEST, 1024, kv_capacity("opt-13b", 1, 1))
    saturating = saturating_tokens(steps.prefill_s, LONGEST)
    return Instance(1, 1, costs_of(steps.at(1.0), limits), limits, saturating)


def _scaled(steps: LinearSteps, judge: Judge) -> LinearSteps:
    """Prefills and decodes slower by the factors that make them sustain 5.6 and 10 requests/s."""
    sets = steps.published

    def times(line: Line, factor: float) -> Line:
        return Line(*(factor * value for value in line))

    def slower(prefill: float, decode: float) -> LinearSteps:
        small, large = times(sets.small, decode), times(sets.large, decode)
        published = replace(sets, prefill=times(sets.prefill, prefill), small=small, large=large)
        return replace(steps, published=published)

    prefill = _factor(lambda f: judge.prefill_rps(_gpu(slower(f, 1.0))), 5.6)
    decode = _factor(lambda f: judge.decode_rps(_gpu(slower(1.0, f))), 10.0)
    return slower(prefill, decode)


def _factor(rps: Callable[[float], float], wanted: float) -> float:
    low, high = 0.25, 4.0
    for _ in range(10):
        middle = sqrt(low * high)
        low, high = (middle, high) if rps(middle) > wanted else (low, middle)
    return low


def distserve() -> list[dict[str, Any]]:
    """The chosen parallelism per case, by the paper's own simulator and by ours."""
    found = []
    for chats, (prompt, output) in CHATS.items():
        traffic = draw(_lengths(*prompt), _lengths(*output), LONGEST)
        for model, source, ttft_s, tpot_s, parallelism in OPT_CASES:
            slo = Slo(ttft_s=ttft_s, tpot_s=tpot_s)
            for compat in (True, False):
                judge = Judge(traffic, slo, rules=COMPAT if compat else Rules())
                row = {"chats": chats, "model": model, "slo": source, "compat": compat}
                found.append(row | _case(model, judge, parallelism, compat))
                print(json.dumps(found[-1]), flush=True)
    return found


def _lengths(mean: float, squared_cv: float) -> Lengths:
    return Lengths(mean, (1 + squared_cv) * mean**2)


def _case(
    model: str,
    judge: Judge,
    parallelism: tuple[tuple[int, int], tuple[int, int]],
    compat: bool,
) -> dict[str, Any]:
    started = process_time()
    layers, _ = LAYERS_HIDDEN[model]

    def catalog(tp: int, pp: int) -> Instance | None:
        return instance(model, tp, pp, compat=compat)

    apart = phases(catalog, Space(TPS[model], layers, 8, 4), judge)
    high = high_affinity(apart, judge, 32)
    low = low_affinity(catalog, Space(TPS[model], layers, 8, 1), judge)
    prefill, decode = (catalog(*one) for one in parallelism)
    assert prefill is not None and decode is not None
    theirs = simulated(Split(prefill, 1, decode, 1, 0.0), judge)
    return {
        "phases": _ranked(apart),
        "high": _shown(high),
        "low_one_node": _shown(low),
        "published": _shown(theirs),
        "cpu_s": round(process_time() - started, 2),
    }


def _ranked(found: Phases) -> dict[str, list[tuple[str, float]]]:
    sides = {"prefill": found.prefill, "decode": found.decode}
    return {
        side: [(one.instance.name, round(one.per_gpu, 2)) for one in rated[:3]]
        for side, rated in sides.items()
    }


def _shown(split: Split | None) -> dict[str, Any] | None:
    if split is None:
        return None
    return {"split": split.name, "gpus": split.gpus, "rps_per_gpu": round(split.per_gpu, 3)}


def splitwise(num: int) -> dict[str, Any]:
    """Throughput of the designs: at the paper's counts, and at the best ones."""
    counts = {budget.value: equal_count(A100, H100, NUM_H100, budget) for budget in Budget}
    found: dict[str, Any] = {"a100_for_40_h100": counts, "requests": num, "cases": []}
    for released, budgets in ((True, list(Budget)), (False, [Budget.POWER])):
        given = provisioner("conv", released=released, num=num)
        for budget in budgets:
            num_a100 = counts[budget.value]
            bases = (("A100", num_a100), ("H100", NUM_H100))
            for name, count in bases:
                rps = given.baseline_rps(machine(name, released=released), count)
                alone = _row(
                    released, f"Baseline-{name}", (count,), equal=budget.value, rps=round(rps, 1)
                )
                found["cases"].append(alone)
            total = NUM_H100 * H100.takes(budget)
            for design, kinds in DESIGNS.items():
                prompt, token = (machine(kind, released=released) for kind in kinds)
                paper = Cluster(prompt, PAPER_SPLITS[budget][design][0], token,
                                PAPER_SPLITS[budget][design][1])  # fmt: skip
                best = given.best(prompt, token, budget, total)
                chosen = best.cluster.num_prompt, best.cluster.num_token
                row = _row(released, design, chosen, equal=budget.value, rps=round(best.rps, 1))
                row["paper_counts"] = PAPER_SPLITS[budget][design]
                row["rps_at_paper_counts"] = round(given.split_rps(paper), 1)
                found["cases"].append(row)
    return found


def _row(
    released: bool, design: str, counts: tuple[int, ...], **figures: str | float
) -> dict[str, Any]:
    row = {
        "model": "released" if released else "repaired",
        "design": design,
        "machines": counts,
        **figures,
    }
    print(json.dumps(row), flush=True)
    return row


def throughput(num: int) -> list[dict[str, Any]]:
    """The least that keeps 70 requests/s, with the released model and the repaired one."""
    found = []
    for released in (True, False):
        given = provisioner("conv", released=released, num=num)
        for name, kind in (("A100", A100), ("H100", H100)):
            count = given.least_baseline(machine(name, released=released), RATE_RPS, MOST)
            if count is not None:
                for budget in Budget:
                    takes = round(count * kind.takes(budget), 1)
                    alone = (released, f"Baseline-{name}", (count,))
                    found.append(_row(*alone, least=budget.value, takes=takes))
        for design, kinds in DESIGNS.items():
            prompt, token = (machine(kind, released=released) for kind in kinds)
            for budget in Budget:
                least = given.least(prompt, token, budget, RATE_RPS, MOST)
                if least is not None:
                    counts = least.num_prompt, least.num_token
                    takes = round(least.takes(budget), 1)
                    row = _row(released, design, counts, least=budget.value, takes=takes)
                    found.append(row)
    return found


def search() -> dict[str, float]:
    """CPU seconds of both algorithms for OPT-66B on 4 nodes of 8, every tp and pp."""
    traffic = draw(_lengths(*CHATS["long chats"][0]), _lengths(*CHATS["long chats"][1]), LONGEST)
    judge = Judge(traffic, Slo(ttft_s=0.4, tpot_s=0.1))
    judge.split_rps(
        _gpu(coefficients("own")["opt-13b", 1]), 1, _gpu(coefficients("own")["opt-13b", 1]), 1
    )
    found = {}
    for model in ("opt-13b", "opt-66b"):
        space = Space(TPS[model], LAYERS_HIDDEN[model][0], 8, 4)
        started = process_time()

        def catalog(tp: int, pp: int, model: str = model) -> Instance | None:
            return instance(model, tp, pp)

        high_affinity(phases(catalog, space, judge), judge, 32)
        middle = process_time()
        low_affinity(catalog, space, judge)
        found[f"{model} high"] = round(middle - started, 2)
        found[f"{model} low"] = round(process_time() - middle, 2)
    return found


def routing(seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Policies of the router under a mix that shifts and others, and marks under the first."""
    found: dict[str, list[dict[str, Any]]] = {"policies": [], "marks": []}
    for traffic, halves in TRAFFICS.items():
        for policy, config in POLICIES.items():
            row = {"traffic": traffic, "policy": policy} | over_seeds(config, halves, seeds)
            found["policies"].append(row)
            print(json.dumps(row), flush=True)
    for marks in MARKS:
        served = over_seeds(placement(marked(*marks)), TRAFFICS["shifting"], seeds)
        found["marks"].append({"marks": marks} | served)
        print(json.dumps(found["marks"][-1]), flush=True)
    return found


def auto() -> list[dict[str, Any]]:
    """Ten workloads: goodput of `auto` and of the strategies of one kind (`auto_worlds.py`)."""
    found = []
    for load in LOADS:
        for world in WORLDS:
            found.append(compare(world, load))
            print(json.dumps(found[-1]), flush=True)
    return found


def tables(kept: dict[str, Any]) -> dict[str, list[str]]:
    """The lines of docs/disaggregation.md, by part."""
    return {
        "example": _example_table(kept["example"]),
        "distserve": _distserve_table(kept["distserve"]),
        "splitwise": _splitwise_table(kept["splitwise"]["cases"]),
        "throughput": _throughput_table(kept["throughput"]),
        "auto": _auto_table(kept["auto"]),
        "search": _markdown(
            ("", "seconds"), [(name, f"{cpu_s:.1f}") for name, cpu_s in kept["search"].items()]
        ),
        "routing": _routing_table(kept["routing"]["policies"]),
        "marks": _marks_table(kept["routing"]["marks"]),
    }


def _markdown(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [headers, ("---",) * len(headers), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _example_table(found: dict[str, Any]) -> list[str]:
    ratios = ("1:1", "2:1", "3:1", "3:2")
    rows = [("paper", "5.6", "10", "1.6", "", "3.3", "", "", "2.1")]
    rows += [
        (
            name,
            *(f"{one[key]:.1f}" for key in ("prefill_rps", "decode_rps", "colocated_rps")),
            *(f"{one['per_gpu'][ratio]:.1f}" for ratio in ratios),
            f"{one['ratio_2_1']:.1f}",
        )
        for name, one in found.items()
    ]
    return _markdown(("", "prefill", "decode", "colocated", *ratios, "2:1 / colocated"), rows)


def _distserve_table(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for one in found:
        best = [f"{name} ({rps:.1f})" for name, rps in (
            one["phases"]["prefill"][0], one["phases"]["decode"][0]
        )]  # fmt: skip
        rows.append(
            (
                f"{one['model']}, {one['slo']} SLO, {one['chats']}",
                "paper's" if one["compat"] else "ours",
                *best,
                f"{one['published']['rps_per_gpu']:.2f}",
                f"{one['low_one_node']['split']}: {one['low_one_node']['rps_per_gpu']:.2f}",
                f"{one['high']['split']}: {one['high']['rps_per_gpu']:.2f}",
            )
        )
    headers = ("", "simulator", "prefills alone", "decodes alone", "published", "one node")
    return _markdown((*headers, "n to m, 32 GPUs"), rows)


def _throughput_table(cases: list[dict[str, Any]]) -> list[str]:
    base = {
        (one["model"], one["least"]): one["takes"]
        for one in cases
        if one["design"] == "Baseline-H100"
    }
    rows = [
        (
            f"{one['model']}, least {one['least']}",
            one["design"],
            ", ".join(str(count) for count in one["machines"]),
            f"{one['takes']:.0f}",
            f"{one['takes'] / base[one['model'], one['least']]:.2f}",
        )
        for one in cases
    ]
    return _markdown(("decode model", "design", "machines", "takes", "of Baseline-H100"), rows)


def _splitwise_table(cases: list[dict[str, Any]]) -> list[str]:
    rows = []
    for one in cases:
        paper = one.get("paper_counts")
        rows.append(
            (
                f"{one['model']}, equal {one['equal']}",
                one["design"],
                ", ".join(str(count) for count in one["machines"]),
                f"{one['rps']:.0f}",
                ", ".join(str(count) for count in paper) if paper else "",
                f"{one['rps_at_paper_counts']:.0f}" if paper else "",
            )
        )
    return _markdown(
        ("decode model", "design", "machines", "requests/s", "paper's machines", "requests/s"), rows
    )


def _served(row: dict[str, Any]) -> tuple[str, ...]:
    ttft = ", ".join(f"{1e3 * value:.0f}" for value in row["ttft_p90_s"])
    tpot = ", ".join(f"{1e3 * value:.0f}" for value in row["tpot_p90_s"])
    shares = (f"{share:.1%}" for share in row["attainment"])
    return (*shares, ttft, tpot, f"{row['borrowed']:.0f}")


SERVED = ("first half", "second half", "all", "TTFT p90, ms", "TPOT p90, ms", "borrowed")


def _routing_table(found: list[dict[str, Any]]) -> list[str]:
    rows = [(one["traffic"], one["policy"], *_served(one)) for one in found]
    return _markdown(("traffic", "routing", *SERVED), rows)


def _marks_table(found: list[dict[str, Any]]) -> list[str]:
    rows = [(*(f"{mark:g}" for mark in one["marks"]), *_served(one)) for one in found]
    names = ("borrow_batches", "return_batches", "borrow_kv", "return_kv")
    return _markdown((*names, *SERVED), rows)


def _auto_table(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for row in found:
        goodput, by = row["goodput_rps"], beside(row)
        means = [
            "" if goodput[name] is None else f"{fmean(goodput[name]):.1f}"
            for name in (*SINGLES, "auto")
        ]
        apart = ", ".join(f"{model} {split}" for model, split in row["chosen"]["apart"].items())
        rows.append(
            (
                f"{row['workload']}, {row['slo']}, {row['gpus']} GPUs",
                f"{row['load']:g}",
                f"{row['offered_rps']:.1f}",
                *means,
                f"{by.difference_rps:+.2f} ({2 * by.error_rps:.2f})",
                apart or "nobody",
            )
        )
    headers = ("", "load", "offered", *SINGLES, "auto", "auto - best (noise)", "apart")
    return _markdown(headers, rows)


def main() -> None:
    """One part, into the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "part",
        choices=(
            *("example", "distserve", "splitwise", "throughput", "search", "routing", "auto"),
            "tables",
        ),
    )
    parser.add_argument("--requests", type=int, default=10_000, help="of Splitwise's traffic")
    parser.add_argument("--seeds", type=int, default=3, help="of the traffic of `routing`")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    kept = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    if asked.part == "tables":
        for name, lines in tables(kept).items():
            print(name, *lines, sep="\n")
        return
    parts: dict[str, Callable[[], Any]] = {
        "example": example,
        "distserve": distserve,
        "splitwise": lambda: splitwise(asked.requests),
        "throughput": lambda: throughput(asked.requests),
        "search": search,
        "routing": lambda: routing(asked.seeds),
        "auto": auto,
    }
    found = parts[asked.part]()
    kept[asked.part] = found
    asked.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
