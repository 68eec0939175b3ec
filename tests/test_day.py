"""scripts/day.py, two hours of four seconds: real servers, a real replan, nobody dropped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "configs" / "demo_models" / "pydoc-s"
PROFILE = ROOT / "configs" / "replan" / "core.yaml"
# So slow in the planner's eyes that a few requests/s fill a core; the real ones are quick.
SLOW = 100.0


def slow_profile(folder: Path) -> Path:
    """The shipped profile of one core, its steps made long."""
    data = yaml.safe_load(PROFILE.read_text())
    data["table"] = str(PROFILE.parent / data["table"])
    data["in_service"] = [{"model": MODEL.name, "prefill": SLOW, "decode": SLOW}]
    path = folder / "slow.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.skipif(not {0, 1} <= os.sched_getaffinity(0), reason="sets of cores 0 and 1")
def test_two_short_hours(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "day.py", "measure", "--out", tmp_path]
    # A start takes as long as such an hour: by its real price nothing would ever move.
    day = ["--rate", 3, "--hour", 4, "--hours", 2, "--move", 0]
    known = ["--model", MODEL, "--profile", slow_profile(tmp_path)]
    words = [str(word) for word in (*command, *day, *known)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "day.json").read_text())
    for name in ("static", "replanned"):
        assert not data[name]["failed"] and len(data[name]["hours"]) == 2
        assert all(hour["goodput_rps"] > 0 for hour in data[name]["hours"])
    decisions = data["replanned"]["decisions"]
    assert decisions and not any("error" in one for one in decisions), decisions
    assert any(one["is_worth"] for one in decisions), "yesterday's plan is not today's"
    assert (tmp_path / "day.png").stat().st_size > 10_000
