"""A simulated run as tables for people."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.sim.report import Report, Row, Spread
from muxrt.sim.search import Found


def print_report(console: Console, report: Report) -> None:
    """A line for the whole, one per model, one per unit."""
    total = report.total
    rate = total.requests / report.duration_s
    if total.goodput_rps is not None and total.attainment is not None:
        console.print(
            f"[bold]{total.goodput_rps:.1f} of {rate:.1f} requests/s within SLO[/bold]"
            f" ({total.attainment:.1%})",
            highlight=False,
        )
    console.print(
        f"{total.requests} requests in {report.duration_s:g} s, the last token at"
        f" {report.wall_s:.1f} s: {total.throughput_rps:.1f} requests/s,"
        f" {total.output_tokens_per_s:.0f} tokens/s",
        highlight=False,
    )
    console.print(_models(report))
    console.print(_units(report))


def print_comparison(
    console: Console, speeds: Sequence[float], curves: Mapping[str, Sequence[Report]]
) -> None:
    """A line per placement and speed."""
    table = _table(
        "placement", "speed", "requests/s", "in SLO", "goodput/s", "TTFT ms\np50 / p99",
        "TPOT ms\np50 / p99", "tokens/s", "preempted", "refused",
    )  # fmt: skip
    for name, reports in curves.items():
        for speed, report in zip(speeds, reports, strict=True):
            total = report.total
            table.add_row(
                name,
                f"{speed:g}",
                f"{total.requests / report.duration_s:.1f}",
                "-" if total.attainment is None else f"{total.attainment:.1%}",
                "-" if total.goodput_rps is None else f"{total.goodput_rps:.1f}",
                _pair(total.ttft_s, 1e3, 0),
                _pair(total.tpot_s, 1e3, 1),
                f"{total.output_tokens_per_s:.0f}",
                str(total.preemptions),
                str(total.refused),
            )
    console.print(table)


def print_found(
    console: Console, target: float, found: Mapping[str, Found], rates: Mapping[str, float]
) -> None:
    """A line per placement."""
    for name, one in found.items():
        if one.speed:
            console.print(
                f"{name}: [bold]{rates[name]:.1f} requests/s[/bold] with {target:.0%} within SLO:"
                f" {one.speed:.3g} times the rates given ({one.too_fast:.3g} is too much;"
                f" {one.num_tried} tried)",
                highlight=False,
            )
        else:
            console.print(
                f"{name}: less than {target:.0%} within SLO even at {one.too_fast:.2g} times the"
                " rates given",
                highlight=False,
            )


def _models(report: Report) -> Table:
    table = _table(
        "model", "requests", "refused", "TTFT ms\np50 / p99", "TPOT ms\np50 / p99",
        "E2E s\np50 / p99", "in SLO", "tokens/s", "preempted",
    )  # fmt: skip
    for row in report.rows:
        table.add_row(*_cells(row))
    if len(report.rows) > 1:
        table.add_section()
        table.add_row(*_cells(report.total))
    return table


def _cells(row: Row) -> list[str]:
    return [
        row.model,
        str(row.requests),
        str(row.refused),
        _pair(row.ttft_s, 1e3, 0),
        _pair(row.tpot_s, 1e3, 1),
        _pair(row.e2e_s, 1.0, 1),
        "-" if row.attainment is None else f"{row.attainment:.1%}",
        f"{row.output_tokens_per_s:.0f}",
        str(row.preemptions),
    ]


def _pair(spread: Spread, scale: float, digits: int) -> str:
    if spread.p50 is None or spread.p99 is None:
        return "-"
    return f"{spread.p50 * scale:.{digits}f} / {spread.p99 * scale:.{digits}f}"


def _units(report: Report) -> Table:
    table = _table("unit", "models", "lanes busy", "KV mean / peak", "batches")
    for unit in report.units:
        table.add_row(
            unit.unit,
            ", ".join(use.model for use in unit.models),
            " ".join(f"{busy:.0%}" for busy in unit.lanes_busy),
            f"{unit.kv_mean:.0%} / {unit.kv_peak:.0%}",
            str(unit.num_batches),
        )
    return table


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table
