"""The progress bar of a replay."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from muxrt.bench.job import Progress, Status

# The bar shares the cores with the server it measures.
REFRESH_PER_S = 4


@contextmanager
def replaying(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Shows a bar while requests are answered; yields what to call when their counts change."""
    bar = Bar(
        TextColumn("answered"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[counts]}"),
        console=console,
        refresh_per_second=REFRESH_PER_S,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None, counts="")

        def changed(progress: Progress) -> None:
            bar.update(task, total=progress.total, completed=progress.done, counts=_say(progress))

        yield changed


def _say(progress: Progress) -> str:
    failed, refused = progress.counts[Status.FAILED], progress.counts[Status.REFUSED]
    parts = [f"{progress.sent - progress.done} running"]
    parts += [f"[red]{failed} failed[/red]"] if failed else []
    parts += [f"[yellow]{refused} refused[/yellow]"] if refused else []
    return ", ".join(parts)
