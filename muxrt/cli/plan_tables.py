"""A placement for people, and for machines."""

from collections.abc import Sequence
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.config.placement import Placement, UnitSpec
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, Group, num_gpus
from muxrt.planner.explain import SecondBest, group_facts
from muxrt.planner.queueing import GroupScore, Score
from muxrt.planner.workload import Problem

GB = 1e9


def print_plan(
    console: Console,
    problem: Problem,
    capacity: Capacity,
    draft: Draft,
    score: Score,
    placement: Placement,
) -> None:
    """One line for the whole, then a line per model and unit."""
    offered = sum(demand.rate_rps for demand in problem.demands.values())
    console.print(
        f"[bold]{score.goodput_rps:.1f} of {offered:.1f} requests/s within SLO[/bold]"
        f" ({score.goodput_rps / offered:.1%}), {num_gpus(draft)} of {problem.num_gpus} GPUs"
        f" in {len(draft)} units",
        highlight=False,
    )
    table = _table(
        "unit", "GPUs", "lanes", "model", "rate/s", "in SLO", "TTFT ms", "TPOT ms", "weights GB",
        "KV GB", "used", "headroom",
    )  # fmt: skip
    for group, found, unit in _by_node(draft, score, placement):
        _add_unit(table, problem, capacity, group, found, unit)
    console.print(table)
    console.print("KV, weights: per GPU; headroom: how many times its traffic a unit could take")


def _by_node(
    draft: Draft, score: Score, placement: Placement
) -> list[tuple[Group, GroupScore, UnitSpec]]:
    rows = list(zip(draft, score.groups, placement.units, strict=True))
    return sorted(rows, key=lambda row: (row[2].mesh.node or 0, row[2].mesh.gpus or ()))


def _add_unit(
    table: Table,
    problem: Problem,
    capacity: Capacity,
    group: Group,
    score: GroupScore,
    unit: UnitSpec,
) -> None:
    facts = group_facts(problem, capacity, group, score)
    gpus = unit.mesh.gpus or (0,)
    where = f"{unit.mesh.node}:{gpus[0]}" + (f"-{gpus[-1]}" if len(gpus) > 1 else "")
    lanes = "in turns" if group.prefill_pct is None else f"{group.prefill_pct}+rest"
    by_name = {part.model: part for part in score.parts}
    for row, part in enumerate(group.parts):
        found = by_name[part.model]
        share = "" if part.traffic > 0.9995 else f" ({part.traffic:.0%})"
        served = found.admitted_rps > 0
        table.add_row(
            unit.name if not row else "",
            where if not row else "",
            lanes if not row else "",
            part.model + share,
            f"{found.rate_rps:.2f}",
            f"{found.goodput_rps / found.rate_rps:.0%}",
            f"{found.ttft_s * 1e3:.0f}" if served else "-",
            f"{found.tpot_s * 1e3:.1f}" if served else "-",
            f"{facts.weights_bytes[part.model] / GB:.1f}",
            f"{facts.kv_bytes / GB:.1f}" if not row else "",
            f"{facts.kv_used_bytes / max(facts.kv_bytes, 1):.0%}" if not row else "",
            f"{facts.headroom:.1f}x" if not row else "",
        )


def print_second_best(console: Console, others: Sequence[SecondBest]) -> None:
    """What each model would lose in the best of its other places."""
    if not others:
        return
    table = _table(
        "model",
        "second-best place: beside",
        "costs requests/s in SLO",
        "at twice the rates",
    )
    for other in others:
        onto = "nowhere else" if other.onto is None else ", ".join(other.onto)
        table.add_row(other.model, onto, f"{other.loss_rps:.2f}", f"{other.loss_doubled_rps:.2f}")
    console.print(table)


def as_data(
    problem: Problem,
    capacity: Capacity,
    draft: Draft,
    score: Score,
    placement: Placement,
    others: Sequence[SecondBest],
) -> dict[str, Any]:
    """What `--json` prints; the placement is in the schema of `muxrt serve`."""
    return {
        "goodput_rps": score.goodput_rps,
        "offered_rps": sum(demand.rate_rps for demand in problem.demands.values()),
        "gpus": problem.num_gpus,
        "gpus_used": num_gpus(draft),
        "memory_source": problem.engine.memory.source,
        "units": [
            {
                "unit": msgspec.to_builtins(unit),
                "headroom": facts.headroom,
                "weights_bytes": facts.weights_bytes,
                "kv_bytes_per_gpu": facts.kv_bytes,
                "kv_used_bytes_per_gpu": facts.kv_used_bytes,
                "other_bytes_per_gpu": facts.other_bytes,
                "prefill_busy": found.prefill_busy,
                "times_from": facts.source,
            }
            for group, found, unit in zip(draft, score.groups, placement.units, strict=True)
            if (facts := group_facts(problem, capacity, group, found))
        ],
        "second_best": [
            {
                "model": other.model,
                "beside": other.onto,
                "loss_rps": other.loss_rps,
                "loss_doubled_rps": other.loss_doubled_rps,
            }
            for other in others
        ],
    }


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, header in enumerate(headers):
        left = index == 0 or header in ("GPUs", "lanes", "model", "second-best place: beside")
        table.add_column(header, justify="left" if left else "right")
    return table
