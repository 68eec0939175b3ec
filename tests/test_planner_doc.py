"""docs/planner.md: its files and commands work as they are written."""

import json
import re
from pathlib import Path

import pytest
from command_line import CommandLine

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = re.findall(r"```sh\nmuxrt (.*?)\n```", TEXT, re.DOTALL)


def test_there_are_commands_and_files() -> None:
    assert len(COMMANDS) == 4 and set(FILES) == {"plan.yaml", "traffic.yaml", "models.yaml"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    answer = CommandLine(monkeypatch, capsys)(*command.split())
    assert answer.code == 0, answer.err
    if "--json" in command:
        assert json.loads(answer.out)["goodput_rps"] > 0
    else:
        assert "requests/s within SLO" in answer.out
    for name in re.findall(r"\S+\.(?:png)|placement\.yaml", command):
        assert (tmp_path / name).stat().st_size > 0


def test_named_files_exist() -> None:
    for name in re.findall(r"`((?:docs|configs|scripts|tests)/[\w./]+)`", TEXT):
        assert (ROOT / name).exists(), name
    workloads = {path.name for path in (ROOT / "configs" / "workloads").iterdir()}
    named = set(re.findall(r"`(\w+\.yaml)`", TEXT)) - {"placement.yaml"}
    assert named and named <= workloads
