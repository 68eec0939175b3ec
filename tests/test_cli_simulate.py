"""`muxrt simulate` as people run it."""

import json
from pathlib import Path

import pytest
from command_line import CommandLine

CONFIG = """\
models:
  - {name: hot, preset: llama-7b, slo: {ttft_s: 1, tpot_s: 0.1}}
  - {name: cold, preset: llama-13b}
units:
  - name: both
    models: [{name: hot}, {name: cold}]
    memory: {kv_bytes: 30GiB}
    mesh: {device: gpu, kind: a100-80g, node: 0, gpus: [0]}
    lanes: {kind: green, sm_pct: [40, 60]}
"""
TRAFFIC = """\
models: [{name: hot, rate_rps: 4}, {name: cold, rate_rps: 1}]
duration_s: 10
prompt: {mean_tokens: 100, cv: 0.5}
output: {mean_tokens: 30, cv: 0.5}
slo: {ttft_s: 2, tpot_s: 0.2}
"""
PLAN = """\
cluster:
  nodes: [{gpu: tiny, gpus: 1}]
  kinds: [{name: tiny, memory_bytes: 80GB, bandwidth_bytes_per_s: 1.0e+12, flops: 1.0e+14, sms: 100,
           link_bytes_per_s: 1.0e+11, power_w: 100}]
models: [{name: hot, preset: llama-7b}]
engine: {control_s: 0.01}
"""


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "traffic.yaml").write_text(TRAFFIC)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "config.yaml", tmp_path / "traffic.yaml"


def test_a_table_for_people(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    answer = command_line("simulate", *files)
    assert answer.code == 0
    assert "requests/s within SLO" in answer.out
    for word in ("hot", "cold", "all", "both", "TTFT", "KV mean / peak"):
        assert word in answer.out


def test_figures_for_machines_repeat(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    first, again, other = (
        command_line("simulate", *files, "--json", "--seed", seed) for seed in (1, 1, 2)
    )
    assert first.out == again.out != other.out
    data = json.loads(first.out)
    assert data["total"]["requests"] == sum(row["requests"] for row in data["rows"])
    assert 0 < data["total"]["ttft_s"]["p50"] <= data["total"]["ttft_s"]["p99"]
    assert data["units"][0]["kv_peak"] > 0


def test_a_warm_up_is_not_counted(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    whole, late = (
        json.loads(command_line("simulate", *files, "--json", *more).out)
        for more in ([], ["--warmup", 6])
    )
    assert 0 < late["total"]["requests"] < 0.7 * whole["total"]["requests"]
    assert late["duration_s"] == 4


def test_the_plan_tells_gpus_and_engine(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    files[0].write_text(CONFIG.replace("a100-80g", "tiny"))
    answer = command_line("simulate", *files)
    assert (answer.code, "found a mesh of tiny" in answer.err) == (2, True)
    known = ("simulate", *files, "--json", "--plan", tmp_path / "plan.yaml")
    slow, quick = (json.loads(command_line(*known, *more).out) for more in ([], ["--control", 0]))
    assert slow["total"]["tpot_s"]["p50"] > quick["total"]["tpot_s"]["p50"] + 0.009


@pytest.mark.parametrize(
    ("find", "put", "says"),
    [
        ("preset: llama-13b", "preset: llama-13", "did you mean llama-13b"),
        ("kv_bytes: 30GiB", "kv_bytes: 1GiB", "one sequence of maximum length per model"),
        ("device: gpu", "device: cpu", "both: found a mesh of"),
    ],
)
def test_a_wrong_file_is_one_line(
    command_line: CommandLine, files: tuple[Path, Path], find: str, put: str, says: str
) -> None:
    files[0].write_text(CONFIG.replace(find, put))
    answer = command_line("simulate", *files)
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert says in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_too_long_a_warm_up_is_misuse(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    answer = command_line("simulate", *files, "--warmup", 10)
    assert answer.code == 2
    assert "less than the 10 s of load" in answer.err


def test_processes_change_nothing(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    units = files[0].read_text()
    apart = units.replace(", {name: cold}]", "]") + "  - name: second\n" + "".join(
        line.replace("name: hot", "name: cold") + "\n"
        for line in units.replace(", {name: cold}]", "]").splitlines()[5:]
    )  # fmt: skip
    files[0].write_text(apart)
    one, two = (command_line("simulate", *files, "--json", "--processes", n) for n in (1, 2))
    assert one.code == two.code == 0
    assert one.out == two.out
    assert len(json.loads(one.out)["units"]) == 2


def test_placements_are_compared_and_drawn(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(CONFIG.replace("gpus: [0]", "gpus: [0, 1]"))
    more = ("--compare", other, "--speed", 1, "--speed", 9, "--plot", tmp_path / "curves.svg")
    answer = command_line("simulate", *files, *more)
    assert answer.code == 0
    assert answer.out.count("other.yaml") == 2
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    data = json.loads(command_line("simulate", *files, "--json", *more).out)
    slow, fast = (data[str(path)]["9"]["total"]["tpot_s"]["p50"] for path in (files[0], other))
    assert fast < slow


def test_the_largest_rate_is_found(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    answer = command_line("simulate", *files, "--find-goodput", 0.9, "--json", "--duration", 5)
    (found,) = json.loads(answer.out).values()
    assert 1 < found["speed"] < found["too_fast"] <= 1.02 * found["speed"]
    assert found["rate_rps"] > 5


def test_who_would_be_late_is_refused(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    files[1].write_text(TRAFFIC.replace("rate_rps: 4", "rate_rps: 60"))
    patient, strict = (
        json.loads(command_line("simulate", *files, "--json", *more).out)["rows"][0]
        for more in ([], ["--refuse-late"])
    )
    assert strict["refused"] > patient["refused"]
    assert strict["ttft_s"]["p99"] < 1.2 < patient["ttft_s"]["p99"]
    assert strict["goodput_rps"] > patient["goodput_rps"]


def test_several_speeds_want_a_plot(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    answer = command_line("simulate", *files, "--speed", 1, "--speed", 2)
    assert (answer.code, "several are for --plot" in answer.err) == (2, True)
