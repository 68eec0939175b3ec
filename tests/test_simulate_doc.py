"""docs/simulate.md: what it tells people to add works as it is written."""

import re
from pathlib import Path

import pytest
from command_line import CommandLine

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8")
TO_ADD = [
    words
    for line in TEXT.splitlines()
    if line.startswith("| ")
    for words in re.findall(r"`(--[a-z]+(?:-[a-z]+)* \S+)`", line)
]
COMMANDS = re.findall(r"^    muxrt (.*)$", TEXT, re.MULTILINE)
PLAN = """\
cluster: {nodes: [{gpu: a100-80g, gpus: 2}]}
models: [{name: a, preset: llama-7b}, {name: b, preset: llama-7b}]
workload: traffic.yaml
"""
TRAFFIC = """\
duration_s: 3
models: [{name: a, rate_rps: 4}, {name: b, rate_rps: 1}]
slo: {ttft_s: 1, tpot_s: 0.1}
"""
UNIT = """\
  - name: unit-{0}
    models: [{{name: {1}}}]
    memory: {{kv_bytes: 30GiB}}
    mesh: {{device: gpu, kind: a100-80g, node: 0, gpus: [{0}]}}
    lanes: {{kind: stream}}
"""


@pytest.fixture
def command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    models = "models: [{name: a, preset: llama-7b}, {name: b, preset: llama-7b}]\nunits:\n"
    units = [UNIT.format(number, model) for number, model in enumerate("ab")]
    files = {
        "placement.yaml": models + "".join(units),
        "other.yaml": models + units[0].replace("{name: a}", "{name: a}, {name: b}"),
        "plan.yaml": PLAN,
        "traffic.yaml": TRAFFIC,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys)


def test_there_is_something_to_add() -> None:
    assert {words.split()[0] for words in TO_ADD} == {
        "--seeds", "--compare", "--plot", "--find-goodput", "--fail", "--processes",
    }  # fmt: skip
    assert len(COMMANDS) == 2


@pytest.mark.parametrize("words", [*TO_ADD, ""])
def test_it_can_be_added(words: str, command_line: CommandLine) -> None:
    given = ["placement.yaml", "traffic.yaml", "--plan", "plan.yaml"]
    answer = command_line("simulate", *given, *words.split())
    assert (answer.code, answer.err) == (0, "")
    assert "SLO" in answer.out
    if words.startswith("--plot"):
        assert Path("picture.svg").is_file()


def test_the_commands_name_files_that_are_here() -> None:
    files = {word for line in COMMANDS for word in line.split() if word.startswith("configs/")}
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert files and links
    assert all((ROOT / name).is_file() for name in files)
    assert all((ROOT / "docs" / name).exists() for name in links)
