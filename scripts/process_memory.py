"""How much memory a server takes: all its processes together, shared pages counted once."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class TreeMemory:
    """Of processes and all their descendants."""

    processes: int
    rss_bytes: int
    pss_bytes: int  # a page that n processes share counts as 1/n for each


def tree_memory(roots: Iterable[int]) -> TreeMemory:
    """What the processes `roots` and their descendants hold now."""
    pids = _descendants(set(roots))
    totals = {"Rss": 0, "Pss": 0}
    for pid in pids:
        try:
            for kind, num_bytes in _mappings((PROC / str(pid) / "smaps").read_text()):
                totals[kind] += num_bytes
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return TreeMemory(len(pids), totals["Rss"], totals["Pss"])


def _mappings(smaps: str) -> Iterable[tuple[str, int]]:
    for match in re.finditer(r"^(Rss|Pss): +(\d+) kB", smaps, re.MULTILINE):
        yield match[1], int(match[2]) * KIB


def _descendants(pids: set[int]) -> set[int]:
    parents = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            # The name in parentheses may hold anything; what follows it does not.
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(folder.name)] = int(stat[1])
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found
