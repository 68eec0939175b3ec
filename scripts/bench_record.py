"""What every benchmark writes: its figures, and what they were measured on."""

import json
import os
import platform
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
CORES = sorted(os.sched_getaffinity(0))


def stop_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does: whatever it started is ended first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def provenance() -> dict[str, Any]:
    """Machine, date, commit, and how busy the machine already is."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True)
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {
        "machine": f"{len(CORES)} cores of {cpu}",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "load_average": round(os.getloadavg()[0], 2),
    }


class Record:
    """A JSON file that is rewritten after every case: a killed run keeps what it has."""

    def __init__(
        self, path: Path, settings: dict[str, Any], kept: dict[str, Any] | None = None
    ) -> None:
        """`kept`: sections of an earlier run to go on from."""
        self.path = path
        self.data: dict[str, Any] = {**(kept or {}), **provenance(), "settings": settings}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Append a case to the list of that name."""
        self.data.setdefault(section, []).append(row)
        self.write()

    def put(self, section: str, value: Any) -> None:
        """Set a section to a value."""
        self.data[section] = value
        self.write()

    def write(self) -> None:
        # Beside it and then in its place: whoever reads meanwhile sees the old one, whole.
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        beside.replace(self.path)


def read(path: Path) -> dict[str, Any]:
    """What a `Record` wrote."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def draw(name: str, folder: Path) -> None:
    """Draw the plot of `name`.json beside it, where matplotlib is installed."""
    try:
        from bench_plots import draw_file
    except ImportError:
        print("no plot: pip install 'muxrt[plot]', then scripts/bench_vs_vllm.py plot")
        return
    print(f"drawn: {draw_file(name, folder)}")
