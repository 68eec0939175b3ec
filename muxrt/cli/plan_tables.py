"""A placement for people, and for machines."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.config.placement import ModelSpec, Placement, UnitSpec
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, Group, Part, num_gpus
from muxrt.planner.explain import SecondBest, group_facts
from muxrt.planner.queueing import GroupScore, PartScore, Score
from muxrt.planner.workload import Problem

GB = 1e9
WIDEST = 10_000  # columns
MAX_LISTED = 8  # names in a sentence
FOOTNOTE = (
    "lanes: % of the SMs for prefills / decodes while both run, or one lane for both in turns;"
    " weights and KV: GB on each GPU; headroom: how many times its traffic a unit could take"
)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Cells of a unit, and of each of its models."""

    unit: tuple[str, str, str]  # name, GPUs, lanes
    memory: tuple[str, str, str]  # KV, how much of it is used, headroom
    models: tuple[tuple[str, ...], ...]  # name, rate, attainment, TTFT, TPOT, weights


UNIT = ("unit", "GPUs", "lanes")
MEMORY = ("KV\nGB", "KV\nused", "head-\nroom")
MODEL = ("model", "rate\n1/s", "attain-\nment", "TTFT\nms", "TPOT\nms", "weights\nGB")
FOLDED = {"model", "best other place: beside"}  # names are people's, of any length
WORDS = {*UNIT, *FOLDED}  # the rest are numbers


def print_headline(console: Console, problem: Problem, draft: Draft, score: Score) -> None:
    """One line for the whole."""
    offered = sum(demand.rate_rps for demand in problem.demands.values())
    console.print(
        f"[bold]{score.goodput_rps:.1f} of {offered:.1f} requests/s within SLO[/bold]"
        f" ({score.goodput_rps / offered:.1%}), {num_gpus(draft)} of {problem.num_gpus} GPUs"
        f" in {len(draft)} units",
        highlight=False,
    )


def print_units(
    console: Console,
    problem: Problem,
    capacity: Capacity,
    draft: Draft,
    score: Score,
    placement: Placement,
) -> None:
    """A line per model; two tables where one would be too wide."""
    rows = [
        _cells(problem, capacity, group, found, unit)
        for group, found, unit in _by_node(draft, score, placement)
    ]
    for table in _fitting(console, rows):
        console.print(table)
    console.print(FOOTNOTE, highlight=False)


def print_overloaded(console: Console, names: Set[str], models: Sequence[ModelSpec]) -> None:
    """Who gets more traffic than the placement serves, and what is done about it."""
    found = [
        f"{model.name} ({model.queue_timeout_s:g} s)"
        for model in models
        if model.name in names and model.queue_timeout_s is not None
    ]
    if not found:
        return
    more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    listed = ", ".join(found[:MAX_LISTED]) + more
    console.print(
        f"[bold]more traffic than is served in time:[/bold] {listed}; requests that wait longer"
        " than this for their first token are refused (queue_timeout_s)",
        highlight=False,
    )


def _fitting(console: Console, rows: Sequence[_Unit]) -> list[Table]:
    """One table, or one of models and one of units."""
    table = _table(*UNIT, *MODEL, *MEMORY)
    for row in rows:
        for index, model in enumerate(row.models):
            first = index == 0
            blank = ("", "", "")
            table.add_row(
                *(row.unit if first else blank), *model, *(row.memory if first else blank)
            )
    unbounded = console.options.update(max_width=WIDEST)
    if console.measure(table, options=unbounded).maximum <= console.width:
        return [table]
    units, models = _table(*UNIT, "models", *MEMORY), _table("unit", *MODEL)
    for row in rows:
        units.add_row(*row.unit, str(len(row.models)), *row.memory)
        for index, model in enumerate(row.models):
            models.add_row(row.unit[0] if index == 0 else "", *model)
    return [models, units]


def _by_node(
    draft: Draft, score: Score, placement: Placement
) -> list[tuple[Group, GroupScore, UnitSpec]]:
    rows = list(zip(draft, score.groups, placement.units, strict=True))
    return sorted(rows, key=lambda row: (row[2].mesh.node or 0, row[2].mesh.gpus or ()))


def _cells(
    problem: Problem, capacity: Capacity, group: Group, score: GroupScore, unit: UnitSpec
) -> _Unit:
    facts = group_facts(problem, capacity, group, score)
    gpus = unit.mesh.gpus or (0,)
    where = f"{unit.mesh.node}:{gpus[0]}" + (f"-{gpus[-1]}" if len(gpus) > 1 else "")
    pct = group.prefill_pct
    by_name = {part.model: part for part in score.parts}
    return _Unit(
        unit=(unit.name, where, "one" if pct is None else f"{pct} / {100 - pct}"),
        memory=(
            f"{facts.kv_bytes / GB:.1f}",
            f"{facts.kv_used_bytes / max(facts.kv_bytes, 1):.0%}",
            f"{facts.headroom:.1f}x" if isfinite(facts.headroom) else "-",
        ),
        models=tuple(
            _model_cells(part, by_name[part.model], facts.weights_bytes[part.model])
            for part in group.parts
        ),
    )


def _model_cells(part: Part, score: PartScore, weights_bytes: int) -> tuple[str, ...]:
    share = "" if part.traffic > 0.9995 else f" ({part.traffic:.0%})"
    served = score.admitted_rps > 0
    attainment = score.goodput_rps / score.rate_rps if score.rate_rps else 0.0
    return (
        part.model + share,
        f"{score.rate_rps:.2f}",
        f"{attainment:.0%}",
        f"{score.ttft_s * 1e3:.0f}" if served else "-",
        f"{score.tpot_s * 1e3:.1f}" if served else "-",
        f"{weights_bytes / GB:.1f}",
    )


def print_second_best(console: Console, others: Sequence[SecondBest]) -> None:
    """What each model would lose in the best of its other places."""
    if not others:
        return
    console.print("\nthe second-best place of each model, and the goodput that moving there costs")
    table = _table("model", "best other place: beside", "costs\nrequests/s", "at twice\nthe rates")
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
    """Words to the left, names folded where they are too long; numbers to the right, whole."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in headers:
        folded = header in FOLDED
        justify: Literal["left", "right"] = "left" if header in WORDS else "right"
        table.add_column(
            header, justify=justify, no_wrap=not folded, overflow="fold" if folded else "ellipsis"
        )
    return table
