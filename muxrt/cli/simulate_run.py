"""What `muxrt simulate` does: one placement, several, or the search for the largest rate."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import typer

from muxrt.cli.show import console
from muxrt.cli.simulate_input import Case, Facts, Load, load_case
from muxrt.cli.simulate_table import print_comparison, print_found, print_report
from muxrt.sim.report import Report, as_json, make_report
from muxrt.sim.search import Found, attains, find_speed
from muxrt.sim.simulate import Map, simulate


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line."""

    configs: tuple[Path, ...]
    facts: Facts
    load: Load
    find_goodput: float | None
    plot: Path | None
    processes: int
    as_json: bool


def run(asked: Asked) -> None:
    """Simulate and show. Raises ConfigError and typer.BadParameter."""
    if len(asked.load.speeds) > 1 and asked.plot is None:
        raise typer.BadParameter("several are for --plot", param_hint="--speed")
    if asked.find_goodput is not None:
        _find(asked, asked.find_goodput)
        return
    with _pool(asked.processes) as map_:
        curves = {
            str(path): [_report(asked, path, speed, map_) for speed in asked.load.speeds]
            for path in asked.configs
        }
    _show(asked, curves)
    if asked.plot is not None:
        from muxrt.cli.simulate_plot import draw

        draw(asked.plot, curves)


@contextmanager
def _pool(processes: int) -> Iterator[Map]:
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes) as pool:
        yield pool.map


def _report(asked: Asked, path: Path, speed: float, map_: Map) -> Report:
    case = _case(asked, path, speed)
    done = simulate(case.config, case.setting, case.arrivals, map_)
    return make_report(done.served, done.units, case.slos, case.duration_s, asked.load.warmup_s)


def _case(asked: Asked, path: Path, speed: float) -> Case:
    case = load_case(path, asked.facts, asked.load, speed)
    if asked.load.warmup_s >= case.duration_s:
        raise typer.BadParameter(
            f"found {asked.load.warmup_s:g}, expected less than the {case.duration_s:g} s of load",
            param_hint="--warmup",
        )
    return case


def _show(asked: Asked, curves: dict[str, list[Report]]) -> None:
    if asked.as_json:
        data: Any = {
            path: {f"{s:g}": as_json(r) for s, r in zip(asked.load.speeds, reports, strict=True)}
            for path, reports in curves.items()
        }
        if len(curves) == 1 and len(asked.load.speeds) == 1:
            ((data,),) = [list(by_speed.values()) for by_speed in data.values()]
        _print_json(data)
    elif len(curves) == 1 and len(asked.load.speeds) == 1:
        ((report,),) = curves.values()
        print_report(console(), report)
    else:
        print_comparison(console(), asked.load.speeds, curves)


def _find(asked: Asked, target: float) -> None:
    found: dict[str, Found] = {}
    rates: dict[str, float] = {}
    for path in asked.configs:

        def holds(speed: float, path: Path = path) -> bool:
            case = _case(asked, path, speed)
            if not any(case.slos.values()):
                raise typer.BadParameter("no model has an slo", param_hint="--find-goodput")
            return attains(case.config, case.setting, case.arrivals, case.slos, target)

        found[str(path)] = find_speed(holds)
        case = _case(asked, path, found[str(path)].speed or 1.0)
        rates[str(path)] = len(case.arrivals) / case.duration_s if found[str(path)].speed else 0.0
    if asked.as_json:
        _print_json({p: {**asdict(f), "rate_rps": rates[p]} for p, f in found.items()})
    else:
        print_found(console(), target, found, rates)


def _print_json(data: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(data)).decode())
