"""What `muxrt simulate` does: one placement, several, or the search for the largest rate."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console

from muxrt.cli.show import console
from muxrt.cli.simulate_compare import Comparison, variants
from muxrt.cli.simulate_input import Facts, Known, Load, Variant, load_known, make_case
from muxrt.cli.simulate_pool import Cell, Rate, find_rates, run_cells
from muxrt.cli.simulate_table import print_comparison, print_found, print_report
from muxrt.sim.interval import across_as_json, interval
from muxrt.sim.report import Report, as_json

# What --plot tries where nobody says which speeds.
PLOT_SPEEDS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

# Reports by variant, speed and seed.
Curves = dict[str, list[list[Report]]]


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line."""

    config: Path
    comparison: Comparison
    facts: Facts
    load: Load
    find_goodput: float | None
    plot: Path | None
    processes: int
    as_json: bool

    @property
    def progress(self) -> Console | None:
        """Where a bar goes."""
        return None if self.as_json else console(stderr=True)


def run(asked: Asked) -> None:
    """Simulate and show. Raises ConfigError and typer.BadParameter."""
    if asked.plot is not None:
        from muxrt.cli.simulate_plot import check_plot

        check_plot(asked.plot)
    known = load_known(asked.facts)
    placements = variants(asked.config, asked.comparison, asked.facts.plan, asked.load.workload)
    _check(asked, placements, known)
    if asked.find_goodput is not None:
        _find(asked, placements, known, asked.find_goodput)
        return
    cells = [
        Cell(variant, known, asked.load, speed, number)
        for variant in placements
        for speed in asked.load.speeds
        for number in range(asked.load.num_seeds)
    ]
    reports = iter(run_cells(cells, asked.processes, asked.progress))
    curves = {
        variant.name: [
            [next(reports) for _ in range(asked.load.num_seeds)] for _ in asked.load.speeds
        ]
        for variant in placements
    }
    _show(asked, curves)
    if asked.plot is not None:
        from muxrt.cli.simulate_plot import draw

        draw(asked.plot, asked.load.speeds, curves)


def _check(asked: Asked, placements: list[Variant], known: Known) -> None:
    """Raise where the requests are not what was asked for, before anything takes long."""
    load = asked.load
    names = [variant.name for variant in placements]
    for name in names:
        if names.count(name) > 1:
            raise typer.BadParameter(f"{name} is there twice", param_hint="--compare")
    case = make_case(placements[0], known, load)
    if load.warmup_s >= case.duration_s:
        raise typer.BadParameter(
            f"found {load.warmup_s:g}, expected less than the {case.duration_s:g} s of load",
            param_hint="--warmup",
        )
    if load.num_seeds > 1 and make_case(placements[0], known, load, number=1) == case:
        raise typer.BadParameter(
            "the trace names its models: its requests are the same from every seed",
            param_hint="--seeds",
        )
    if asked.find_goodput is None:
        return
    if not any(case.slos.values()):
        raise typer.BadParameter("no model has an slo", param_hint="--find-goodput")
    if asked.plot is not None or load.speeds != (1.0,):
        raise typer.BadParameter(
            "it tries speeds of its own, and draws nothing: leave --speed and --plot out",
            param_hint="--find-goodput",
        )


def _show(asked: Asked, curves: Curves) -> None:
    speeds = asked.load.speeds
    is_one = len(curves) == 1 and len(speeds) == 1
    if asked.as_json:
        data: Any = {
            name: {f"{s:g}": _data(r) for s, r in zip(speeds, reports, strict=True)}
            for name, reports in curves.items()
        }
        if is_one:
            ((data,),) = [list(by_speed.values()) for by_speed in data.values()]
        _print_json(data)
    elif is_one:
        ((reports,),) = curves.values()
        print_report(console(), reports)
    else:
        print_comparison(console(), speeds, curves)


def _data(reports: list[Report]) -> dict[str, Any]:
    return as_json(reports[0]) if len(reports) == 1 else across_as_json(reports)


def _find(asked: Asked, placements: list[Variant], known: Known, target: float) -> None:
    seeds = range(asked.load.num_seeds)
    cells = [Cell(v, known, asked.load, 1.0, number) for v in placements for number in seeds]
    rates = iter(find_rates(cells, target, asked.processes, asked.progress))
    found = {variant.name: [next(rates) for _ in seeds] for variant in placements}
    if asked.as_json:
        _print_json({name: _found_data(many) for name, many in found.items()})
    else:
        print_found(console(), target, found)


def _found_data(rates: list[Rate]) -> dict[str, Any]:
    if len(rates) == 1:
        return {**asdict(rates[0].found), "rate_rps": rates[0].rate_rps}
    found = interval(rate.rate_rps for rate in rates)
    assert found is not None, "there is a seed"
    return {"rate_rps": asdict(found), "speeds": [rate.found.speed for rate in rates]}


def _print_json(data: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(data)).decode())
