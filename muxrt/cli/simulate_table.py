"""Simulated runs as tables for people; with several seeds, means and 95 % intervals."""

from collections.abc import Callable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.cli.simulate_pool import Rate
from muxrt.sim.interval import Interval, interval
from muxrt.sim.report import Report, Row, Spread

# One per seed.
Reports = Sequence[Report]
Rows = Sequence[Row]
# A row's figure; None where it has none.
Figure = Callable[[Row], float | None]


def print_report(console: Console, reports: Reports) -> None:
    """A line for the whole, one per model, one per unit."""
    totals = [report.total for report in reports]
    rate = interval(report.total.requests / report.duration_s for report in reports)
    if totals[0].goodput_rps is not None:
        console.print(
            f"[bold]{_figure(totals, lambda row: row.goodput_rps, '.1f')} of"
            f" {show(rate, '.1f')} requests/s within SLO[/bold]"
            f" ({_figure(totals, lambda row: row.attainment, '.1%')})",
            highlight=False,
        )
    last = interval(report.wall_s for report in reports)
    console.print(
        f"{_figure(totals, lambda row: row.requests)} requests in {reports[0].duration_s:g} s, the"
        f" last token at {show(last, '.1f')} s:"
        f" {_figure(totals, lambda row: row.throughput_rps, '.1f')} requests/s,"
        f" {_figure(totals, lambda row: row.output_tokens_per_s)} tokens/s",
        highlight=False,
    )
    console.print(_models(reports))
    console.print(_units(reports[0]))
    if len(reports) > 1:
        console.print(
            f"{len(reports)} seeds: mean ± half of its 95 % confidence interval (Student's t);"
            " units are those of the first seed"
        )


def print_comparison(
    console: Console, speeds: Sequence[float], curves: Mapping[str, Sequence[Reports]]
) -> None:
    """A line per placement and speed; over seeds also the difference from the first placement."""
    first = next(iter(curves.values()))
    has_difference = len(curves) > 1 and len(first[0]) > 1
    headers = [
        "placement", "speed", "requests\n/s", "in SLO", "goodput\n/s", "TTFT ms\np50 / p99",
        "TPOT ms\np50 / p99", "tokens/s", "pre-\nempted", "re-\nfused",
    ]  # fmt: skip
    everything = [report for many in curves.values() for reports in many for report in reports]
    if has_failed := any(report.total.failed for report in everything):
        headers.append("failed")
    if has_difference:
        headers.insert(5, "goodput/s\nvs first")
    table = _table(*headers)
    for name, by_speed in curves.items():
        for speed, reports, others in zip(speeds, by_speed, first, strict=True):
            rows = [report.total for report in reports]
            rate = interval(report.total.requests / report.duration_s for report in reports)
            cells = [
                name,
                f"{speed:g}",
                _stacked([rate], ".1f"),
                _cell(rows, lambda row: row.attainment, ".1%"),
                _cell(rows, lambda row: row.goodput_rps, ".1f"),
                _pair(rows, lambda row: row.ttft_s, 1e3, ".0f"),
                _pair(rows, lambda row: row.tpot_s, 1e3, ".1f"),
                _cell(rows, lambda row: row.output_tokens_per_s),
                _cell(rows, lambda row: row.preemptions),
                _cell(rows, lambda row: row.refused),
            ]
            if has_failed:
                cells.append(_cell(rows, lambda row: row.failed))
            if has_difference:
                cells.insert(5, "" if reports is others else _difference(reports, others))
            table.add_row(*cells)
    console.print(table)
    if len(first[0]) > 1:
        console.print(
            f"{len(first[0])} seeds: mean ± half of its 95 % confidence interval (Student's t);"
            " differences are those under the same requests"
        )


def print_found(console: Console, target: float, found: Mapping[str, Sequence[Rate]]) -> None:
    """A line per placement."""
    for name, rates in found.items():
        one = rates[0].found
        if len(rates) > 1:
            rate, speed = (
                interval(rate.rate_rps for rate in rates),
                interval(rate.found.speed for rate in rates),
            )
            console.print(
                f"{name}: [bold]{show(rate, '.1f')} requests/s[/bold] with {target:.0%} within SLO:"
                f" {show(speed, '.3g')} times the rates given ({len(rates)} seeds, 95 %)",
                highlight=False,
            )
        elif one.speed:
            console.print(
                f"{name}: [bold]{rates[0].rate_rps:.1f} requests/s[/bold] with {target:.0%} within"
                f" SLO: {one.speed:.3g} times the rates given ({one.too_fast:.3g} is too much;"
                f" {one.num_tried} tried)",
                highlight=False,
            )
        else:
            console.print(
                f"{name}: less than {target:.0%} within SLO even at {one.too_fast:.2g} times the"
                " rates given",
                highlight=False,
            )


def show(found: Interval | None, form: str) -> str:
    """`12.3`, or `12.3 ± 0.4`; `-` of nothing."""
    return _stacked([found], form).replace("\n", " ")


def _stacked(found: Sequence[Interval | None], form: str) -> str:
    """Means beside each other, and below them how far off they may be, where it is known."""
    known = [one for one in found if one is not None]
    if not known:
        return "-"
    means = " / ".join(format(one.mean, form) for one in known)
    if not any(one.half for one in known):
        return means
    # The sign is that of the mean's form only.
    halves = " / ".join(format(one.half or 0.0, form.lstrip("+")) for one in known)
    return f"{means}\n± {halves}"


def _figure(rows: Rows, figure: Figure, form: str = ".0f") -> str:
    return show(interval(figure(row) for row in rows), form)


def _cell(rows: Rows, figure: Figure, form: str = ".0f") -> str:
    return _stacked([interval(figure(row) for row in rows)], form)


def _pair(rows: Rows, spread: Callable[[Row], Spread], scale: float, form: str) -> str:
    """The median, and the 99th percentile."""

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * scale

    p50 = interval(scaled(spread(row).p50) for row in rows)
    p99 = interval(scaled(spread(row).p99) for row in rows)
    return _stacked([p50, p99], form)


def _difference(reports: Reports, others: Reports) -> str:
    """Of goodput, seed by seed: what the requests have in common cancels out."""
    pairs = zip(reports, others, strict=True)
    found = interval(
        None
        if mine.total.goodput_rps is None or other.total.goodput_rps is None
        else mine.total.goodput_rps - other.total.goodput_rps
        for mine, other in pairs
    )
    return _stacked([found], "+.1f")


def _models(reports: Reports) -> Table:
    headers = [
        "model", "requests", "refused", "TTFT ms\np50 / p99", "TPOT ms\np50 / p99",
        "E2E s\np50 / p99", "in SLO", "tokens/s", "preempted",
    ]  # fmt: skip
    if has_failed := any(report.total.failed or report.total.retried for report in reports):
        headers += ["failed", "retried"]
    table = _table(*headers)
    by_model = list(zip(*(report.rows for report in reports), strict=True))
    for rows in by_model:
        table.add_row(*_cells(rows, has_failed))
    if len(by_model) > 1:
        table.add_section()
        table.add_row(*_cells([report.total for report in reports], has_failed))
    return table


def _cells(rows: Rows, has_failed: bool) -> list[str]:
    cells = [
        rows[0].model,
        _cell(rows, lambda row: row.requests),
        _cell(rows, lambda row: row.refused),
        _pair(rows, lambda row: row.ttft_s, 1e3, ".0f"),
        _pair(rows, lambda row: row.tpot_s, 1e3, ".1f"),
        _pair(rows, lambda row: row.e2e_s, 1.0, ".1f"),
        _cell(rows, lambda row: row.attainment, ".1%"),
        _cell(rows, lambda row: row.output_tokens_per_s),
        _cell(rows, lambda row: row.preemptions),
    ]
    if has_failed:
        cells += [_cell(rows, lambda row: row.failed), _cell(rows, lambda row: row.retried)]
    return cells


def _units(report: Report) -> Table:
    headers = ["unit", "models", "lanes busy", "KV mean / peak", "batches"]
    if has_died := any(unit.deaths for unit in report.units):
        headers.append("down s")
    table = _table(*headers)
    for unit in report.units:
        cells = [
            unit.unit,
            ", ".join(use.model for use in unit.models),
            " ".join(f"{busy:.0%}" for busy in unit.lanes_busy),
            f"{unit.kv_mean:.0%} / {unit.kv_peak:.0%}",
            str(unit.num_batches),
        ]
        if has_died:
            cells.append(f"{unit.down_s:.1f}" if unit.deaths else "-")
        table.add_row(*cells)
    return table


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table
