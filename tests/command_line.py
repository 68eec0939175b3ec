"""Runs `muxrt` as its users do, without a process of its own."""

import sys
from dataclasses import dataclass

import pytest

from muxrt.cli.main import main


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class CommandLine:
    """Call it with the words after `muxrt`."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: object) -> Answer:
        self.monkeypatch.setattr(sys, "argv", ["muxrt", *map(str, words)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        said = self.capsys.readouterr()
        return Answer(int(left.value.code or 0), said.out, said.err)
