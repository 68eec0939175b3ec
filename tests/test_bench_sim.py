"""`scripts/bench_sim.py` at a small size: what it measures is there and adds up."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from bench_sim import app

TRACE = Path(__file__).parent.parent / "configs" / "traces" / "azure_conv_excerpt.csv"


def written(part: str, folder: Path, *words: object) -> dict[str, object]:
    """What a part of the script leaves in its file."""
    done = CliRunner().invoke(app, [part, *map(str, words), "--out", str(folder)])
    assert done.exit_code == 0, done.output
    data = json.loads((folder / "sim_speed.json").read_text())[part]
    assert {"machine", "date", "commit"} <= data.keys()
    return data


def test_azure(tmp_path: Path) -> None:
    data = written("azure", tmp_path, TRACE, "--duration", 8, "--repeat", 2)
    for case in data["cases"]:  # type: ignore[attr-defined]
        assert case["answered"] == case["requests"] > 20
        assert case["cpu_s"] == min(case["all_cpu_s"]) and len(case["all_cpu_s"]) == 2
    assert len({case["tokens"] for case in data["cases"]}) == 1  # type: ignore[attr-defined]


def test_a_large_cluster_in_two_processes(tmp_path: Path) -> None:
    data = written("million", tmp_path, "--requests", 300, "--models", 12, "--gpus", 16)
    assert data["answered"] == data["requests"] == 300
    assert data["peak_pss_mib"] > 100  # type: ignore[operator]


def test_simpy_serves_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("simpy")
    data = written("simpy", tmp_path, TRACE, "--duration", 16, "--repeat", 1)
    for case in data["cases"]:  # type: ignore[attr-defined]
        assert case["simpy_tokens"] == case["tokens"]
        assert case["simpy_steps"] > 100
