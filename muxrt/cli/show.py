"""How things are shown to people."""

import sys

from rich.console import Console

# Into a file or a pipe: wide enough for every table of ours.
PLAIN_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; colours only there."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH)


def show_bytes(num_bytes: float) -> str:
    """A size for people: `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def show_count(count: float) -> str:
    """A number for people: `27.3 M`."""
    for unit in ("", " K", " M", " B"):
        if count < 1000 or unit == " B":
            break
        count /= 1000
    return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
