"""The same seed gives the same report, byte for byte, however it is computed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Four groups: replicas that share a router, models on two lanes, and two alone.
CONFIG = """\
models:
  - {name: a, preset: llama-7b, slo: {ttft_s: 1, tpot_s: 0.1}}
  - {name: b, preset: llama-7b}
  - {name: c, preset: llama-13b, queue_timeout_s: 1.5}
  - {name: d, preset: llama-7b, slo: {ttft_s: 0.5, tpot_s: 0.05}}
  - {name: e, preset: llama-13b}
units:
"""
UNIT = """\
  - name: u{number}
    models: [{models}]
    memory: {{kv_bytes: 12GiB}}
    mesh: {{device: gpu, kind: a100-80g, node: 0, gpus: [{number}]}}
    lanes: {{kind: green, sm_pct: [40, 60]}}
"""
PLACED = ["a", "a", "b c", "d", "e"]
TRAFFIC = """\
models: [{name: a, rate_rps: 5}, {name: b, rate_rps: 3}, {name: c, rate_rps: 2},
         {name: d, rate_rps: 4}, {name: e, rate_rps: 1}]
duration_s: 12
gap_cv: 2.0
prompt: {mean_tokens: 200, cv: 0.8, max_tokens: 1000}
output: {mean_tokens: 80, cv: 0.8, max_tokens: 400}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("repeats")
    units = [
        UNIT.format(number=n, models=", ".join(f"{{name: {m}}}" for m in names.split()))
        for n, names in enumerate(PLACED)
    ]
    (folder / "placement.yaml").write_text(CONFIG + "".join(units))
    (folder / "traffic.yaml").write_text(TRAFFIC)
    return folder / "placement.yaml", folder / "traffic.yaml"


def report(files: tuple[Path, Path], processes: int, hash_seed: int, seed: int = 1) -> bytes:
    """What `muxrt simulate --json` writes, in an interpreter of its own."""
    command = [sys.executable, "-m", "muxrt", "simulate", *map(str, files), "--json"]
    done = subprocess.run(
        [*command, "--seed", str(seed), "--processes", str(processes)],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def alone(files: tuple[Path, Path]) -> bytes:
    return report(files, processes=1, hash_seed=0)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_and_hash_seeds_change_nothing(
    files: tuple[Path, Path], alone: bytes, processes: int
) -> None:
    assert report(files, processes, hash_seed=40 + processes) == alone
    figures = json.loads(alone)
    assert [unit["unit"] for unit in figures["units"]] == [f"u{n}" for n in range(len(PLACED))]
    assert figures["total"]["answered"] > 100


def test_another_seed_is_another_report(files: tuple[Path, Path], alone: bytes) -> None:
    assert report(files, processes=1, hash_seed=0, seed=2) != alone
