"""The example of docs/replan.md: yesterday's placement, a day of other traffic, and `muxrt replan`.

    python scripts/replan_example.py FOLDER

Writes plan.yaml, yesterday.yaml, serve.yaml (by `muxrt plan`), a traffic log, new.yaml and a
picture into FOLDER. Requests are Poisson, by the hours of configs/workloads/diurnal.yaml.
"""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from muxrt.server.traffic_files import Entry, add_history
from muxrt.workload.arrivals import arrivals
from muxrt.workload.spec import Traffic, load_workload

ROOT = Path(__file__).parent.parent
AT = "2026-03-10T12:00"
HOURS = 30.0
YESTERDAY = {"chat": 0.9, "code": 0.3, "digest": 0.15}
SINCE = {"chat": 0.2, "code": 0.6, "digest": 0.1}  # requests/s, before the hour's factor
PLAN = """\
cluster: {nodes: [{gpu: l4-24g, gpus: 4}]}
largest_tp: 1 # no links between these GPUs to speak of
models:
  - {name: chat, preset: llama2-7b}
  - {name: code, preset: llama2-7b}
  - {name: digest, preset: llama2-7b}
workload: yesterday.yaml
"""
WORKLOAD = """\
prompt: {mean_tokens: 250, cv: 0.8, max_tokens: 1500}
output: {mean_tokens: 500, cv: 0.6, max_tokens: 2000}
slo: {ttft_s: 3.0, tpot_s: 0.15}
models:
"""


def write_log(folder: Path) -> None:
    """What came since."""
    hours = load_workload(ROOT / "configs" / "workloads" / "diurnal.yaml").diurnal
    assert hours is not None
    came = msgspec.structs.replace(
        load_workload(folder / "yesterday.yaml"),
        models=tuple(Traffic(name=name, rate_rps=rate) for name, rate in SINCE.items()),
        duration_s=HOURS * 3600,
        diurnal=msgspec.structs.replace(hours, hour_s=3600.0),
        seed=1,
    )
    start_s = datetime.fromisoformat(AT).replace(tzinfo=UTC).timestamp() - HOURS * 3600
    entries = (
        Entry(start_s + one.at_s, one.model, one.prompt_tokens, one.output_tokens,
              None, None, 200, "unit-0", None, 1)
        for one in arrivals(came)
    )  # fmt: skip
    add_history(folder / "traffic", entries)


def main(folder: Annotated[Path, typer.Argument(help="That is made, and must be new.")]) -> None:
    """Write everything and replan."""
    folder.mkdir(parents=True)
    (folder / "plan.yaml").write_text(PLAN)
    models = "".join(f"  - {{name: {n}, rate_rps: {rate}}}\n" for n, rate in YESTERDAY.items())
    (folder / "yesterday.yaml").write_text(WORKLOAD + models)
    write_log(folder)
    for words in (
        ("plan", "plan.yaml", "--out", "serve.yaml"),
        ("traffic", "traffic"),
        ("replan", "serve.yaml", "--traffic", "traffic", "--plan", "plan.yaml", "--at", AT,
         "--out", "new.yaml", "--picture", "replan_example.png"),
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", "muxrt", *words], cwd=folder, check=True)


if __name__ == "__main__":
    typer.run(main)
