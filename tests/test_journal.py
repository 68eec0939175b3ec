"""What a restart finds out from the journal, wherever its line ends."""

import resource
from pathlib import Path

import pytest
from test_reconcile import deployment

from muxrt.engine.reconcile import diff
from muxrt.errors import ConfigError
from muxrt.server.journal import Journal

OLD, NEW = deployment({"x": "ab"}), deployment({"x": "a", "y": "b"})
CHANGE = diff(OLD, NEW)


def whole(path: Path) -> None:
    journal = Journal(path)
    assert journal.open(OLD) == OLD
    journal.begin(CHANGE)
    for step in CHANGE.steps:
        journal.step(step)
        if step.kind.value == "load" and step.unit == "y":
            journal.switched()
    journal.done()


def test_cut_anywhere_it_gives_the_old_or_the_new_placement_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole(path)
    data, seen = path.read_bytes(), []
    switched = data.index(b'{"event":"switched"}\n') + len(b'{"event":"switched"}\n')
    for end in range(data.index(b"\n") + 1, len(data) + 1, 7):
        path.write_bytes(data[:end])
        current = Journal(path).open(OLD)
        assert current == (CHANGE.after if end >= switched else OLD), end
        seen.append(current)
    assert OLD in seen and CHANGE.after in seen


def test_what_was_undone_never_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open(OLD)
    journal.begin(CHANGE)
    journal.undone("the disk is full")
    assert Journal(tmp_path / "journal").open(OLD) == OLD


def test_half_a_line_on_a_full_disk_does_not_spoil_those_after_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open(OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            journal.begin(CHANGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.undone("no room")
    assert Journal(path).open(OLD) == OLD


def test_an_edited_configuration_goes_before(tmp_path: Path) -> None:
    whole(tmp_path / "journal")
    edited = deployment({"z": "abc"})
    assert Journal(tmp_path / "journal").open(edited) == edited


def test_restarted_twice_it_is_still_there(tmp_path: Path) -> None:
    whole(tmp_path / "journal")
    for _ in range(2):
        assert Journal(tmp_path / "journal").open(OLD) == CHANGE.after


def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("dear diary\n")
    with pytest.raises(ConfigError, match=r"journal:1: no line of a journal"):
        Journal(path).open(OLD)
