"""docs/profile.md: its commands work as they are written, one after the other."""

import os
import re
from pathlib import Path

import pytest
from command_line import CommandLine

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "profile.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))
# What it says of ranks is run by test_profile_ranks.py.
ONE_RANK, _, RANKS = TEXT.partition("## Models over several ranks")
COMMANDS = re.findall(r"```sh\nmuxrt (.*?)\n```", ONE_RANK, re.DOTALL)


def test_profile_plan_and_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cores = len(os.sched_getaffinity(0))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.replace("cpu-2c", f"cpu-{cores}c"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    muxrt = CommandLine(monkeypatch, capsys)
    assert [command.split()[0] for command in COMMANDS] == ["profile", "plan", "simulate", "serve"]
    profiled, planned, simulated, checked = (muxrt(*command.split()) for command in COMMANDS)
    assert profiled.code == 0 and "error on held-out" in profiled.out, profiled.err
    assert planned.code == 0 and "requests/s within SLO" in planned.out, planned.err
    assert simulated.code == 0 and "tokens/s" in simulated.out, simulated.err
    assert checked.code == 0 and "can be served" in checked.out, checked.err


def test_what_it_says_of_ranks_are_commands() -> None:
    commands = re.findall(r"```sh\nmuxrt (.*?)\n```", RANKS, re.DOTALL)
    assert [command.split()[0] for command in commands] == ["profile", "simulate"]
    assert "--tp 2" in commands[0] and all("configs/tensor_parallel.yaml" in c for c in commands)


def test_options_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    muxrt = CommandLine(monkeypatch, capsys)
    help_text = "".join(muxrt(verb, "--help").out for verb in ("profile", "simulate"))
    for option in set(re.findall(r"`(--[a-z]+)", TEXT)):
        assert option in help_text, option


def test_named_files_exist() -> None:
    for name in re.findall(r"((?:docs|configs|scripts|tests)/[\w./-]+)", TEXT):
        assert (ROOT / name.rstrip(".")).exists(), name
