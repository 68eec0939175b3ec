"""`muxrt profile --tp`: steps of a mesh of cores are measured, and what is predicted from them."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine

pytest.importorskip("torch")

from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile

CORES = len(os.sched_getaffinity(0))
SERVED = Path(__file__).parent.parent / "configs" / "tensor_parallel.yaml"
TRAFFIC = """\
models:
  - {name: pydoc-s, rate_rps: 0.5}
  - {name: pydoc-m, rate_rps: 0.5}
  - {name: pydoc-l, rate_rps: 0.5}
duration_s: 30
prompt: {mean_tokens: 40, cv: 0.5, max_tokens: 100}
output: {mean_tokens: 20, cv: 0.5, max_tokens: 60}
slo: {ttft_s: 1, tpot_s: 0.1}
"""

pytestmark = pytest.mark.skipif(CORES < 2, reason="one core")


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def simulated(muxrt: CommandLine, profile: Path) -> dict[str, Any]:
    traffic = profile.with_name("traffic.yaml")
    traffic.write_text(TRAFFIC)
    answer = muxrt("simulate", SERVED, traffic, "--profile", profile, "--json")
    assert answer.code == 0, answer.err
    data: dict[str, Any] = json.loads(answer.out)
    return data


def test_ranks_are_profiled_and_the_simulator_goes_by_it(
    muxrt: CommandLine, tmp_path: Path
) -> None:
    """The shipped mesh, by real steps; with steps a hundred times as long it is slower."""
    out = tmp_path / "p.yaml"
    words = ("--tp", 2, "--lanes", 1, "--quick", "--budget", 15, "--out", out, "--json")
    answer = muxrt("profile", SERVED, *words)
    assert answer.code == 0, answer.err
    assert [check["problem"] for check in json.loads(answer.out)["fits"]] == [None] * 3
    found = load_profile(out)
    assert found.keys == (("pydoc-l", 2), ("pydoc-m", 2), ("pydoc-s", 2))
    assert found.file is not None and found.file.kind is not None
    kind = found.file.kind
    assert (kind.name, kind.sms) == (f"cpu-{CORES // 2}c", CORES // 2)
    cost = CostModel([found])
    sources = [cost.steps(found.shapes["pydoc-m"], tp, kind).source for tp in (1, 2)]
    assert sources == ["roofline", found.title]

    served = simulated(muxrt, out)
    assert served["total"]["requests"] > 20
    multiply(tmp_path / "p.csv", 100.0)
    slower = simulated(muxrt, out)
    assert slower["total"]["tpot_s"]["p50"] > 10 * served["total"]["tpot_s"]["p50"]


def multiply(table: Path, factor: float) -> None:
    with table.open() as file:
        rows = list(csv.DictReader(file))
    with table.open("w") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            scaled = {
                name: f"{float(row[name]) * factor:g}" if row[name] else ""
                for name in ("prefill_ms", "decode_ms")
            }
            writer.writerow(row | scaled)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tp", 3], "--tp: found 3, expected 1, 2, 4 or 8 ranks with a core each"),
        (["--tp", 2, "--gpu", 0], "--tp: found 2 and --gpu, expected one of them"),
    ],
)
def test_what_ranks_cannot_be(words: list[object], expected: str, muxrt: CommandLine) -> None:
    answer = muxrt("profile", SERVED, *words)
    assert answer.code == 2 and expected in answer.err and answer.err.count("\n") == 1
