"""A profile for people and for machines, with how well its fit predicts unseen cells."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.cli.profile_file import FIGURE_BATCHES, figures
from muxrt.cli.profile_run import Found
from muxrt.cli.profile_source import Subject
from muxrt.core import Phase
from muxrt.cost.fitted import fit
from muxrt.cost.held_out import Error, errors, held_out
from muxrt.cost.profile import Profile
from muxrt.errors import ConfigError

BUSY = 0.5  # load average of the machine from which on figures are not its own


@dataclass(frozen=True, slots=True)
class FitCheck:
    """How far off the fit of one model is on cells that it has not seen."""

    model: str
    num_cells: int
    prefill: Error | None
    decode: Error | None
    problem: str | None  # why there is no fit


def check_fits(profile: Profile, tp: int) -> list[FitCheck]:
    """One cell in five held out, each in turn; a model with too few cells says so."""
    return [_check_fit(profile, model, tp) for model in profile.shapes]


def _check_fit(profile: Profile, model: str, tp: int) -> FitCheck:
    cells = profile.of(model, tp)
    try:
        fit(cells, profile.shapes[model], profile.title)
    except ConfigError as error:
        return FitCheck(model, len(cells), None, None, error.message)
    one = replace(profile, shapes={model: profile.shapes[model]}, cells=cells)
    try:
        found = errors(held_out(one))
    except ConfigError:
        return FitCheck(model, len(cells), None, None, "too few cells to hold any out")
    return FitCheck(model, len(cells), found[Phase.PREFILL], found[Phase.DECODE], None)


def as_data(out: Path, subject: Subject, found: Found, profile: Profile) -> dict[str, Any]:
    """What `--json` prints."""
    assert profile.file is not None, "it was just written"
    return {
        "profile": str(out),
        "is_whole": found.is_whole,
        "cells": len(profile.cells),
        "alike": subject.alike,
        "figures": [asdict(row) for row in figures(subject, found)],
        "fits": [asdict(check) for check in check_fits(profile, found.target.tp)],
        "engine": msgspec.to_builtins(profile.file.engine),
        "side_by_side": msgspec.to_builtins(profile.file.side_by_side),
        "in_service": msgspec.to_builtins(profile.file.in_service),
        "measured": msgspec.to_builtins(profile.file.measured),
    }


def print_found(
    console: Console, out: Path, subject: Subject, found: Found, profile: Profile
) -> None:
    """Figures, fits, what runs side by side, and what to do next."""
    assert profile.file is not None and profile.file.measured is not None, "just written"
    measured, engine = profile.file.measured, profile.file.engine
    console.print(_figures_table(subject, found))
    console.print(_fits_table(check_fits(profile, found.target.tp)))
    for one in profile.file.side_by_side:
        console.print(
            f"side by side: a prefill of {one.prefill} takes {_slower(one.prefill_slowdown)},"
            f" decodes of {one.decode} {_slower(one.decode_slowdown)}",
            highlight=False,
        )
    for ratio in profile.file.in_service:
        console.print(
            f"in service beside other models: a prefill of {ratio.model} takes"
            f" {_slower(ratio.prefill)}, its decode steps {_slower(ratio.decode)}",
            highlight=False,
        )
    if engine.control_s is not None and engine.control_step_s is not None:
        console.print(
            f"beside the kernels the endpoint takes {engine.control_step_s * 1e6:.0f} us of a step"
            f" and {engine.control_s * 1e6:.0f} us per sequence (hidden where a core is free), and"
            f" {1e3 * (engine.request_s or 0.0):.1f} ms per request",
            highlight=False,
        )
    console.print(
        f"repeats of a cell differ by {measured.spread:.1%} in the median,"
        f" {measured.spread_p90:.0%} at the 90th percentile of cells;"
        f" {len(found.bursts)} of {found.num_planned} cells,"
        f" {measured.bursts} bursts each, {measured.seconds:.0f} s",
        highlight=False,
    )
    if measured.load_average > BUSY:
        console.print(
            f"other work ran on this machine (load {measured.load_average:g}): measure again when"
            " it is quiet before you trust these figures, side by side least of all",
            highlight=False,
        )
    for name, kept in subject.alike.items():
        console.print(f"{name} costs what {kept} does: the same shape and dtypes", highlight=False)
    console.print(
        f"written: {out} and {profile.file.table}; in a plan file: profiles: [{out.name}] and"
        f" cluster: {{nodes: [{{gpu: {profile.gpu}, gpus: {found.target.tp}}}]}}",
        highlight=False,
        markup=False,
    )


def _slower(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%} {'longer' if ratio >= 1 else 'less'}"


def _figures_table(subject: Subject, found: Found) -> Table:
    table = _table(
        "model",
        f"lane\n{found.target.word}",
        "prefill\ntokens/s",
        *(f"decode {batch}\nms" for batch in FIGURE_BATCHES),
        "at\ncontext",
        "read at 1\nGB/s",
    )
    for row in figures(subject, found):
        table.add_row(
            row.model,
            f"{row.cores} of {found.target.parts}",
            _number(row.prefill_tokens_per_s, 1, 0),
            *(_number(row.decode_s[batch], 1e3, 2) for batch in FIGURE_BATCHES),
            str(row.context),
            _number(row.bytes_per_s, 1e-9, 1),
        )
    return table


def _fits_table(checks: list[FitCheck]) -> Table:
    table = _table(
        "fit of",
        "cells",
        "prefill: error on held-out\nmedian / p90 / worst",
        "decode: error on held-out\nmedian / p90 / worst",
    )
    for check in checks:
        said = check.problem or "-"
        table.add_row(
            check.model, str(check.num_cells), _error(check.prefill, said), _error(check.decode, "")
        )
    return table


def _error(error: Error | None, otherwise: str) -> str:
    if error is None:
        return otherwise
    return f"{error.median:.1%} / {error.p90:.1%} / {error.worst:.0%}"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right")
    return table
