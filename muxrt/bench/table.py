"""A report as a table for people."""

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.bench.report import Report, Row

Column = tuple[str, Callable[[Row], str]]

# Above this the client itself was too busy to be on time, and the figures say so.
LAG_WARNING_S = 0.05
MAX_ERRORS_SHOWN = 3


def print_report(console: Console, report: Report) -> None:
    """The table, and below it what a reader should know before believing it."""
    console.print(make_table(report))
    for line in notes(report):
        console.print(line, highlight=False, markup=False)


def make_table(report: Report) -> Table:
    """One line per model and one for all; columns without any figure are left out."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    columns = _columns(report)
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(row.model, *(cell(row) for _, cell in columns))
    if len(report.rows) > 1:
        table.add_section()
        table.add_row(report.total.model, *(cell(report.total) for _, cell in columns))
    return table


def _columns(report: Report) -> list[Column]:
    return [
        ("requests", lambda row: str(row.requests)),
        ("failed", lambda row: str(row.failed)),
        *([("refused", _refused)] if report.total.refused else []),
        ("TTFT ms\np50 / p99", lambda row: _pair_ms(row.ttft_p50_s, row.ttft_p99_s)),
        ("TPOT ms\np50 / p99", lambda row: _pair_ms(row.tpot_p50_s, row.tpot_p99_s)),
        *([("in SLO", _attainment)] if report.total.attainment is not None else []),
        ("tokens\n/s", lambda row: f"{row.output_tokens_per_s:.0f}"),
        *(_block_columns() if report.total.blocks else []),
    ]


def _block_columns() -> list[Column]:
    return [
        ("blocks used/\nquota/borrowed", _blocks),
        ("pre-\nempted", lambda row: str(row.blocks.preempted) if row.blocks else ""),
    ]


def _refused(row: Row) -> str:
    return str(row.refused)


def _attainment(row: Row) -> str:
    return "" if row.attainment is None else f"{row.attainment:.1%}"


def _blocks(row: Row) -> str:
    blocks = row.blocks
    return f"{blocks.used}/{blocks.quota}/{blocks.borrowed}" if blocks else ""


def _pair_ms(low_s: float | None, high_s: float | None) -> str:
    """Two percentiles in one cell, milliseconds."""
    if low_s is None or high_s is None:
        return ""
    return f"{_ms(low_s)} / {_ms(high_s)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.{1 if seconds < 0.01 else 0}f}"


def notes(report: Report) -> list[str]:
    """Sentences below the table: goodput, errors by frequency, a late client."""
    lines = [f"{report.total.requests} requests in {report.wall_s:.1f} s"]
    if report.total.goodput_rps is not None:
        lines[0] += f", {report.total.goodput_rps:.2f} requests/s within their SLO"
    if report.total.blocks is not None:
        lines.append("blocks: the most used at one time / quota at the end / the most borrowed")
    if report.num_not_sent:
        lines.append(f"cut short: {report.num_not_sent} requests were not sent or not finished")
    if report.client_lag_p99_s > LAG_WARNING_S:
        lines.append(
            f"this client sent late (p99 {report.client_lag_p99_s:.2f} s):"
            " give it a core of its own"
        )
    shown = list(report.errors.items())[:MAX_ERRORS_SHOWN]
    lines += [f"{count} x {error}" for error, count in shown]
    if len(report.errors) > len(shown):
        lines.append(f"and {len(report.errors) - len(shown)} other errors")
    return lines
