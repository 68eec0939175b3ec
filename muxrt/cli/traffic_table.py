"""A traffic log in figures: per model, and per model and hour."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.cli.show import show_count
from muxrt.config.placement import Slo
from muxrt.metrics import Timing, is_met, percentile
from muxrt.server.traffic_files import Entry

HOUR_S = 3600
BARS = "▁▂▃▄▅▆▇█"
MAX_BARS = 48  # hours that a line shows, the newest
ALL = "all"
OK, CLIENT_LEFT = 200, 499


@dataclass(frozen=True, slots=True)
class Hour:
    """One model in one hour of the clock."""

    start_s: int  # seconds since 1970
    requests: int
    prompt_tokens: int
    output_tokens: int
    errors: int


@dataclass(frozen=True, slots=True)
class Line:
    """One model, or all."""

    model: str
    requests: int
    rate_rps: float
    prompt_tokens: int
    output_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    attainment: float | None  # of all but those whose clients left; None without targets
    errors: int  # answered with anything but 200, clients that left aside
    left: int
    hours: tuple[Hour, ...]  # every hour from the log's first to its last


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole log."""

    first_s: float
    last_s: float
    lines: tuple[Line, ...]  # by requests, the most first
    total: Line


def summarise(entries: Sequence[Entry], slos: Mapping[str, Slo | None]) -> Summary:
    """Figures of requests in order of time, at least one; attainment of models with targets."""
    first_s, last_s = entries[0].at_s, entries[-1].at_s
    by_model: dict[str, list[Entry]] = {}
    for entry in entries:
        by_model.setdefault(entry.model, []).append(entry)
    lines = [_line(name, mine, first_s, last_s, slos) for name, mine in by_model.items()]
    lines.sort(key=lambda line: -line.requests)
    return Summary(first_s, last_s, tuple(lines), _line(ALL, entries, first_s, last_s, slos))


def _line(
    name: str,
    entries: Sequence[Entry],
    first_s: float,
    last_s: float,
    slos: Mapping[str, Slo | None],
) -> Line:
    hours = range(int(first_s // HOUR_S), int(last_s // HOUR_S) + 1)
    dealt: dict[int, list[Entry]] = {hour: [] for hour in hours}
    for entry in entries:
        dealt[int(entry.at_s // HOUR_S)].append(entry)
    ttfts = sorted(entry.ttft_s for entry in entries if entry.ttft_s is not None)
    return Line(
        model=name,
        requests=len(entries),
        rate_rps=len(entries) / max(last_s - first_s, 1.0),
        prompt_tokens=sum(entry.prompt_tokens or 0 for entry in entries),
        output_tokens=sum(entry.output_tokens for entry in entries),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        attainment=_attainment(entries, slos),
        errors=_errors(entries),
        left=sum(entry.status == CLIENT_LEFT for entry in entries),
        hours=tuple(
            Hour(
                hour * HOUR_S,
                len(mine),
                sum(entry.prompt_tokens or 0 for entry in mine),
                sum(entry.output_tokens for entry in mine),
                _errors(mine),
            )
            for hour, mine in dealt.items()
        ),
    )


def _errors(entries: Sequence[Entry]) -> int:
    return sum(entry.status not in (OK, CLIENT_LEFT) for entry in entries)


def _attainment(entries: Sequence[Entry], slos: Mapping[str, Slo | None]) -> float | None:
    """Share of requests within both targets; those that a trace brought have no times."""
    met = []
    for entry in entries:
        slo = slos.get(entry.model)
        is_timed = entry.unit is not None or entry.status != OK
        if slo is not None and is_timed and entry.status != CLIENT_LEFT:
            met.append(entry.status == OK and is_met(Timing(entry.ttft_s, entry.tpot_s), slo))
    return sum(met) / len(met) if met else None


def print_summary(console: Console, log: Path, summary: Summary) -> None:
    """A line per model with its hours, and the total."""
    first, last = (datetime.fromtimestamp(s, UTC) for s in (summary.first_s, summary.last_s))
    console.print(
        f"[bold]{summary.total.requests} requests[/bold] in {log}, {first:%Y-%m-%d %H:%M} to"
        f" {last:%Y-%m-%d %H:%M} UTC",
        highlight=False,
        soft_wrap=True,
    )
    has_slo = summary.total.attainment is not None
    headers = ["model", "requests", "1/s", "tokens\nin", "tokens\nout", "TTFT ms\np50 / p99"]
    headers += ["in SLO"] if has_slo else []
    headers += ["errors", "left", "requests by hour"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in headers:
        words = header in ("model", "requests by hour")
        table.add_column(header, justify="left" if words else "right", no_wrap=True)
    for line in summary.lines:
        table.add_row(*_cells(line, has_slo))
    if len(summary.lines) > 1:
        table.add_section()
        table.add_row(*_cells(summary.total, has_slo))
    console.print(table)
    hours = summary.total.hours
    if len(hours) > 1:
        shown = hours[-MAX_BARS:]
        busiest = max(hours, key=lambda hour: hour.requests)
        begin, top = (datetime.fromtimestamp(h.start_s, UTC) for h in (shown[0], busiest))
        console.print(
            f"hours (UTC) from {begin:%Y-%m-%d %H}:00; the busiest is {top:%Y-%m-%d %H}:00 with"
            f" {busiest.requests} requests",
            highlight=False,
        )


def _cells(line: Line, has_slo: bool) -> list[str]:
    ttft = "-"
    if line.ttft_p50_s is not None and line.ttft_p99_s is not None:
        ttft = f"{1e3 * line.ttft_p50_s:.0f} / {1e3 * line.ttft_p99_s:.0f}"
    cells = [
        line.model,
        str(line.requests),
        f"{line.rate_rps:.3g}",
        show_count(line.prompt_tokens),
        show_count(line.output_tokens),
        ttft,
    ]
    if has_slo:
        cells.append("-" if line.attainment is None else f"{line.attainment:.1%}")
    counts = [hour.requests for hour in line.hours[-MAX_BARS:]]
    return [*cells, str(line.errors), str(line.left), sparkline(counts)]


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, the highest for the largest; a blank for nothing."""
    top = max(values, default=0.0)
    return "".join(
        BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] if value else " " for value in values
    )


def as_data(summary: Summary) -> dict[str, Any]:
    """What `--json` prints."""
    return asdict(summary)
