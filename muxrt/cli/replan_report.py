"""What `muxrt replan` says, writes and draws."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.cli.admin_client import AdminClient, AdminError
from muxrt.cli.replan_run import Candidate, Replan
from muxrt.cli.show import console
from muxrt.config.load import dump
from muxrt.config.placement import UnitSpec
from muxrt.config.serve import ServeConfig
from muxrt.errors import ConfigError
from muxrt.planner.diff import Fate, UnitDiff

GB = 1e9
MOST_MODELS = 12  # of a unit, that a table names


def check_paths(out: Path | None, picture: Path | None) -> None:
    """Raise ConfigError for a file that cannot be written, before anything takes long."""
    from muxrt.cli.plan_picture import check_name

    for path in (out, picture):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: found no folder {path.parent}, expected it to exist")
    if picture is not None:
        check_name(picture)


def carried_out(
    admin: AdminClient | None, found: Replan, before: tuple[UnitSpec, ...] | None
) -> ServeConfig:
    """The new file: as the server has it, which serves it now where that is worth it.

    `before` is what it served when that was planned. Raises what AdminClient does, and AdminError
    where it serves something else by now; then nothing is changed.
    """
    if admin is None or not found.best.decision.is_worth:
        return found.config
    if admin.units() != before:
        raise AdminError(
            f"{admin.url}: the placement was changed while another one was planned: it stays"
        )
    units = admin.apply(found.best.units)
    print(f"{admin.url} serves the new placement", file=sys.stderr)
    return msgspec.structs.replace(found.config, units=units)


def report(
    found: Replan, config: ServeConfig, *, out: Path | None, picture: Path | None, as_json: bool
) -> None:
    """Write `config` if the change is worth it, say what it is, draw it."""
    is_written = out is not None and found.best.decision.is_worth
    if out is not None and is_written:
        out.write_text(dump(config))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(as_data(found))).decode())
    else:
        _print(console(), found)
        if out is not None:
            print(f"{out} is written" if is_written else f"{out} is not written")
    if picture is not None:
        from muxrt.cli.replan_picture import draw

        draw(picture, found)


def _print(to: Console, found: Replan) -> None:
    best, decision = found.best, found.best.decision
    word = "change" if decision.is_worth else "stay"
    to.print(f"[bold]{word}[/bold]: {decision.reason}", highlight=False)
    to.print(_forecast_line(found), highlight=False)
    before, after = found.before.goodput_rps[0], best.served.goodput_rps[0]
    to.print(
        f"goodput {before:.2f} -> {after:.2f} of {found.before.offered_rps:.2f} requests/s by the"
        f" simulator ({best.name}); {_cost_line(best)}",
        highlight=False,
    )
    to.print(_units(best))
    to.print(_models(found))
    for note in found.notes:
        to.print(f"not planned: {note}", highlight=False)
    if found.outlook.unknown:
        to.print(f"in the log, not served: {', '.join(found.outlook.unknown)}", highlight=False)


def _forecast_line(found: Replan) -> str:
    outlook = found.outlook
    days = outlook.forecast.num_days
    source = f"the last {days} days" if days > 1 else "a day" if days else "a recent mean"
    weekly, models = len(outlook.forecast.weekly), len(outlook.served.models)
    source += f" (weekends apart for {weekly} of {models} models)" if weekly else ""
    busiest, quietest = outlook.bands[0], outlook.bands[-1]
    return (
        f"forecast by {source}, {outlook.requests} requests: {busiest.total_rps:.2f} requests/s in"
        f" the busiest {busiest.hours:g} h of the window, {quietest.total_rps:.2f} in the quietest"
    )


def _cost_line(best: Candidate) -> str:
    cost = best.cost
    if best.diff.is_empty:
        return "nothing moves"
    return (
        f"{cost.total_bytes / GB:.1f} GB of weights to load, {cost.reduced_s:.0f} s with less"
        f" capacity, at most {cost.lost_requests:.0f} requests lost"
    )


def _units(best: Candidate) -> Table:
    table = _table("unit", "is", "GPUs", "models", "load GB")
    for unit in best.diff.units:
        spec = unit.new or unit.old
        assert spec is not None, "it is in one of the placements"
        loaded = best.cost.loaded_bytes.get(unit.name, 0)
        table.add_row(
            unit.name,
            unit.fate.value,
            _where(unit),
            _contents(unit),
            f"{loaded / GB:.1f}" if loaded else "",
        )
    return table


def _where(unit: UnitDiff) -> str:
    places = [_mesh(spec) for spec in (unit.old, unit.new) if spec is not None]
    return " -> ".join(dict.fromkeys(places))


def _mesh(spec: UnitSpec) -> str:
    gpus = spec.mesh.gpus or (0,)
    return f"{spec.mesh.node or 0}:{gpus[0]}" + (f"-{gpus[-1]}" if len(gpus) > 1 else "")


def _contents(unit: UnitDiff) -> str:
    """What it holds, and what it held where that is something else."""
    before = [part.name for part in unit.old.models] if unit.old else []
    after = [part.name for part in unit.new.models] if unit.new else []
    if unit.fate is not Fate.CHANGED or sorted(before) == sorted(after):
        return _listed(after or before)
    return f"{_listed(before)} -> {_listed(after)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_MODELS} more" if len(names) > MOST_MODELS else ""
    return ", ".join(names[:MOST_MODELS]) + more


def _models(found: Replan) -> Table:
    table = _table("model", "rate 1/s\nthen", "now", "in SLO\nthen", "now", "units\nthen", "now")
    for model in found.outlook.served.config.models:
        name = model.name
        was, now = found.before.attainment[name], found.best.served.attainment[name]
        table.add_row(
            name,
            f"{model.rate_rps:.2f}",
            f"{found.outlook.bands[0].rates_rps[name]:.2f}",
            f"{was:.0%}",
            f"{now:.0%}",
            str(_count(found.outlook.served.config.units, name)),
            str(_count(found.best.units, name)),
        )
    return table


def _count(units: tuple[UnitSpec, ...], model: str) -> int:
    return sum(part.name == model for unit in units for part in unit.models)


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    words = ("unit", "is", "GPUs", "models", "model")
    for header in headers:
        table.add_column(header, justify="left" if header in words else "right", overflow="fold")
    return table


def as_data(found: Replan) -> dict[str, Any]:
    """What `--json` prints; units are in the schema of `muxrt serve`."""
    best, outlook = found.best, found.outlook
    return {
        "is_worth": best.decision.is_worth,
        "reason": best.decision.reason,
        "planned_for": best.name,
        "gain_rps": best.decision.gain_rps,
        "goodput_rps": {
            "before": found.before.goodput_rps[0],
            "after": best.served.goodput_rps[0],
            "offered": found.before.offered_rps,
        },
        "cost": asdict(best.cost) | {"total_bytes": best.cost.total_bytes},
        "forecast": {
            "days": outlook.forecast.num_days,
            "weekends_apart": outlook.forecast.weekly,
            "requests": outlook.requests,
            "bands": [asdict(band) for band in outlook.bands],
        },
        "models": list(_models_data(found)),
        "units": [
            {
                "unit": unit.name,
                "is": unit.fate.value,
                "before": unit.old and msgspec.to_builtins(unit.old),
                "after": unit.new and msgspec.to_builtins(unit.new),
            }
            for unit in best.diff.units
        ],
        "placement": msgspec.to_builtins(found.config.units),
        "moves": [asdict(move) for move in best.diff.moves],
        "notes": found.notes,
        "unknown_models": outlook.unknown,
    }


def _models_data(found: Replan) -> Iterator[dict[str, Any]]:
    for model in found.outlook.served.config.models:
        yield {
            "model": model.name,
            "rate_rps": {
                "before": model.rate_rps,
                "after": found.outlook.bands[0].rates_rps[model.name],
            },
            "attainment": {
                "before": found.before.attainment[model.name],
                "after": found.best.served.attainment[model.name],
            },
        }
