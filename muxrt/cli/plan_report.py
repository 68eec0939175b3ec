"""What `muxrt plan` shows and writes of a placement of one kind or both."""

from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from muxrt.cli.plan_disagg import models_data, phase_table
from muxrt.cli.plan_input import Asked
from muxrt.cli.plan_strategy import impatient, to_config
from muxrt.cli.plan_tables import (
    as_data,
    print_headline,
    print_overloaded,
    print_second_best,
    print_units,
)
from muxrt.cli.show import console
from muxrt.config.load import dump
from muxrt.config.placement import Placement, UnitSpec
from muxrt.planner.capacity import Capacity
from muxrt.planner.explain import SecondBest, second_best
from muxrt.planner.mix import Mix
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.strategies.mixed import Found


def report(
    asked: Asked,
    found: Found,
    *,
    out: Path | None = None,
    picture: Path | None = None,
    explain: bool = False,
    as_json: bool = False,
) -> None:
    """Write the placement, say what it is, draw it."""
    mix, config = found.mix, to_config(asked, found.mix)
    capacity = Capacity(mix.rest.problem, QueueingJudge(mix.rest.problem))
    others: list[SecondBest] = []
    if explain and mix.together:
        others = second_best(mix.rest.problem, capacity, mix.together)
    if out is not None:
        out.write_text(dump(config))
    if as_json:
        data = _data(asked, found, capacity, config.units, others)
        print(msgspec.json.format(msgspec.json.encode(data)).decode())
    else:
        to = console()
        _print_units(to, asked, mix, capacity, config.units)
        _print_reasons(to, found)
        print_overloaded(to, impatient(mix), config.models)
        print_second_best(to, others)
    if picture is not None:
        from muxrt.cli.plan_picture import apart_blocks, blocks, draw

        by_node = blocks(mix.rest.problem, mix.together, mix.score, _together(config.units))
        by_node += apart_blocks(asked.problem, mix.apart, config.units)
        draw(picture, asked.problem, by_node, mix.predicted(asked.problem).goodput_rps)


def _together(units: tuple[UnitSpec, ...]) -> tuple[UnitSpec, ...]:
    """Those in which models do both phases."""
    return tuple(unit for unit in units if not unit.has_roles)


def _data(
    asked: Asked,
    found: Found,
    capacity: Capacity,
    units: tuple[UnitSpec, ...],
    others: list[SecondBest],
) -> dict[str, Any]:
    """What `--json` prints: of all models, then of those colocated, then of those apart."""
    mix, problem = found.mix, asked.problem
    placement = Placement(_together(units))
    together = as_data(mix.rest.problem, capacity, mix.together, mix.score, placement, others)
    return together | {
        "goodput_rps": mix.predicted(problem).goodput_rps,
        "offered_rps": sum(demand.rate_rps for demand in problem.demands.values()),
        "gpus": problem.num_gpus,
        "gpus_used": mix.num_gpus,
        "simulated_goodput_rps": found.kept and found.kept.goodput_rps,
        "apart": {
            "models": models_data(problem, mix.apart),
            "units": [msgspec.to_builtins(unit) for unit in units if unit.has_roles],
        },
        "reasons": found.reasons,
        "notes": found.notes,
    }


def _print_units(
    to: Console, asked: Asked, mix: Mix, capacity: Capacity, units: tuple[UnitSpec, ...]
) -> None:
    """The tables of both kinds; of one kind alone as ever."""
    problem, rest = asked.problem, mix.rest.problem
    placement = Placement(_together(units))
    if not mix.apart.models:
        print_headline(to, problem, mix.together, mix.score)
        print_units(to, rest, capacity, mix.together, mix.score, placement)
        return
    offered = sum(demand.rate_rps for demand in problem.demands.values())
    goodput = mix.predicted(problem).goodput_rps
    together = mix.num_gpus - mix.apart.num_gpus
    to.print(
        f"[bold]{goodput:.1f} of {offered:.1f} requests/s within SLO[/bold]"
        f" ({goodput / offered:.1%}), {mix.num_gpus} of {problem.num_gpus} GPUs: prefills and"
        f" decodes apart on {mix.apart.num_gpus}, colocated on {together}",
        highlight=False,
    )
    to.print(phase_table(problem, mix.apart))
    if mix.together:
        print_units(to, rest, capacity, mix.together, mix.score, placement)


def _print_reasons(to: Console, found: Found) -> None:
    for model, reason in found.reasons.items():
        to.print(f"{model}: {reason}", highlight=False)
    if found.kept is not None:
        kept = found.kept
        to.print(
            f"the simulator, which chose among {found.num_judged}, gives it"
            f" {kept.goodput_rps:.1f} requests/s",
            highlight=False,
        )
    for note in found.notes:
        to.print(f"not looked at: {note}", highlight=False)
