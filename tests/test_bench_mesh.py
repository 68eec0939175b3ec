"""`scripts/bench_mesh.py` at a small size: what it measures is there, and comes from runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

from bench_mesh import CHANNELS, HIDDEN, decode_step  # noqa: E402

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")

SEQUENCES = 8


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("out")
    model = ROOT / "configs" / "demo_models" / "pydoc-s"
    words = ["--model", model, "--sequences", SEQUENCES, "--rounds", 10, "--out", folder]
    command = [sys.executable, ROOT / "scripts" / "bench_mesh.py", *words]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "telling a rank" in done.stdout and "all-reduce" in done.stdout
    data: dict[str, Any] = json.loads((folder / "mesh.json").read_text())
    return data


def assert_spread(times: dict[str, float]) -> None:
    assert 0 < times["p50"] <= times["p90"] <= times["p99"]


def test_it_says_what_it_ran_on(found: dict[str, Any]) -> None:
    assert {"machine", "date", "commit", "load_average"} <= found.keys()
    assert found["settings"]["sequences"] == SEQUENCES and found["settings"]["rounds"] == 10


def test_telling_is_measured_over_every_channel(found: dict[str, Any]) -> None:
    assert [row["channel"] for row in found["tell"]] == list(CHANNELS)
    size = len(msgspec.msgpack.encode(decode_step(SEQUENCES)))
    for row in found["tell"]:
        assert row["bytes"] == size
        assert_spread(row["sent_us"])
        assert_spread(row["answered_us"])
        assert row["sent_us"]["p50"] < row["answered_us"]["p50"]  # the answer comes after


def test_sums_are_measured_both_ways(found: dict[str, Any]) -> None:
    rows = {(row["kind"], row["tokens"]): row["us"] for row in found["exchange"]}
    assert rows.keys() == {(kind, n) for kind in ("shared", "gloo") for n in (1, 16, 256)}
    assert {row["hidden"] for row in found["exchange"]} == {HIDDEN}
    for times in rows.values():
        assert_spread(times)
    assert rows["shared", 256]["p50"] > rows["shared", 1]["p50"]  # 256 times as much to add


def test_steps_are_measured_on_one_rank_and_on_two(found: dict[str, Any]) -> None:
    rows = {(row["step"], row["ranks"]): row for row in found["steps"]}
    ways = {"1 rank", "2, shared", "2, gloo"}
    steps = {"prefill, 1 x 256", "decode, 1 x 1", "decode, 16 x 1"}
    assert rows.keys() == {(step, way) for step in steps for way in ways}
    for row in rows.values():
        assert 0 < row["best_ms"] <= row["median_ms"]
    # 256 tokens are more than one; on a busy machine ranks may wait longer than they compute.
    alone = {step: rows[step, "1 rank"]["best_ms"] for step in steps}
    assert alone["prefill, 1 x 256"] > alone["decode, 1 x 1"]
