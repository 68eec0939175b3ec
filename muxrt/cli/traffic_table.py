"""A traffic log in figures: per model, and per model and hour."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.cli.show import show_count
from muxrt.config.placement import Slo
from muxrt.metrics import Timing, is_met
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


@dataclass(slots=True)
class _Tally:
    """What is added up of one model, request by request."""

    requests: int = 0
    left: int = 0
    timed: int = 0  # that count for attainment
    met: int = 0
    ttfts_s: "array[float]" = field(default_factory=lambda: array("f"))
    hours: dict[int, list[int]] = field(default_factory=dict)  # as `Hour` has them

    def add(self, entry: Entry, slo: Slo | None) -> None:
        is_left, is_ok = entry.status == CLIENT_LEFT, entry.status == OK
        hour = self.hours.setdefault(int(entry.at_s // HOUR_S), [0, 0, 0, 0])
        hour[0] += 1
        hour[1] += entry.prompt_tokens or 0
        hour[2] += entry.output_tokens
        hour[3] += not (is_ok or is_left)
        self.requests += 1
        self.left += is_left
        if entry.ttft_s is not None:
            self.ttfts_s.append(entry.ttft_s)
        # Those that a trace brought have no times, and no unit.
        if slo is not None and not is_left and (entry.unit is not None or not is_ok):
            self.timed += 1
            self.met += is_ok and is_met(Timing(entry.ttft_s, entry.tpot_s), slo)

    def merge(self, other: "_Tally") -> None:
        self.requests += other.requests
        self.left += other.left
        self.timed += other.timed
        self.met += other.met
        self.ttfts_s += other.ttfts_s
        for hour, counts in other.hours.items():
            mine = self.hours.get(hour, [0] * len(counts))
            self.hours[hour] = [a + b for a, b in zip(mine, counts, strict=True)]

    def line(self, name: str, first_s: float, last_s: float) -> Line:
        ttfts_s = np.sort(np.array(self.ttfts_s))
        hours = [
            Hour(hour * HOUR_S, *self.hours.get(hour, (0, 0, 0, 0)))
            for hour in range(int(first_s // HOUR_S), int(last_s // HOUR_S) + 1)
        ]
        return Line(
            model=name,
            requests=self.requests,
            rate_rps=self.requests / max(last_s - first_s, 1.0),
            prompt_tokens=sum(hour.prompt_tokens for hour in hours),
            output_tokens=sum(hour.output_tokens for hour in hours),
            ttft_p50_s=_percentile(ttfts_s, 50),
            ttft_p99_s=_percentile(ttfts_s, 99),
            attainment=self.met / self.timed if self.timed else None,
            errors=sum(hour.errors for hour in hours),
            left=self.left,
            hours=tuple(hours),
        )


def _percentile(ordered: npt.NDArray[np.float32], pct: float) -> float | None:
    return float(np.percentile(ordered, pct)) if len(ordered) else None


def summarise(entries: Iterable[Entry], slos: Mapping[str, Slo | None]) -> Summary:
    """Figures of requests, at least one, in any order; attainment of models with targets."""
    tallies: dict[str, _Tally] = {}
    first_s, last_s = inf, -inf
    for entry in entries:
        first_s, last_s = min(first_s, entry.at_s), max(last_s, entry.at_s)
        tallies.setdefault(entry.model, _Tally()).add(entry, slos.get(entry.model))
    total = _Tally()
    for tally in tallies.values():
        total.merge(tally)
    lines = [tally.line(name, first_s, last_s) for name, tally in tallies.items()]
    lines.sort(key=lambda line: -line.requests)
    return Summary(first_s, last_s, tuple(lines), total.line(ALL, first_s, last_s))


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
