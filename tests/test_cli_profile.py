"""`muxrt profile` as people run it, on a model that takes no time."""

import json
import os
import shutil
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from tiny_folder import write_model

from muxrt.cli import profile_run, profile_target
from muxrt.cli.profile_service import Service
from muxrt.core import Phase
from muxrt.cost.grid import Pass, levels
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.errors import MuxrtError
from muxrt.worker.probe import Beside, OnCores, Probe

CORES = len(os.sched_getaffinity(0))
SERVE = """\
models:
  - {name: one, path: tiny}
  - {name: two, path: other}
  - {name: int8, path: tiny, weights: int8}
units:
  - {name: main, memory: {kv_bytes: 4MiB}, models: [{name: one}, {name: two}, {name: int8}]}
"""


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of one shape, and a file that serves one of them twice."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "tiny", 0)
    write_model(folder / "other", 1)
    (folder / "serve.yaml").write_text(SERVE)
    return folder


def test_a_profile_is_measured_written_and_can_be_planned_with(
    muxrt: CommandLine, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.yaml"
    answer = muxrt("profile", home / "tiny", "--out", out, "--quick", "--budget", 240, "--json")
    assert answer.code == 0, answer.err
    data, found = json.loads(answer.out), load_profile(out)
    assert data["is_whole"] and data["cells"] == len(found.cells) > 20
    assert {cell.sm_pct for cell in found.cells} == {round(100 * n / CORES) for n in lanes()}
    (check,) = data["fits"]
    assert check["problem"] is None and check["decode"]["num_cells"] > 10
    assert found.file is not None and found.file.measured is not None
    assert found.file.measured.cores == CORES and found.file.measured.bursts == 3
    assert (found.file.models[0].weights, found.file.models[0].kv_dtype) == ("float32", "float32")
    kind = found.file.kind
    assert kind is not None and (kind.device, kind.sms) == ("cpu", CORES)
    steps = CostModel([found]).steps(found.shapes["tiny"], 1, kind)
    assert steps.source == found.title
    assert steps.at(1.0).prefill_s(128, 128**2) > steps.at(1.0).prefill_s(16, 16**2) > 0
    assert len(found.file.side_by_side) == (CORES > 1)
    assert "not measured" not in answer.err, answer.err
    (ratio,) = found.file.in_service
    assert ratio.model == "tiny" and 0 < ratio.prefill != 1 and 0 < ratio.decode != 1
    assert data["in_service"][0]["prefill"] == ratio.prefill


def lanes() -> list[int]:
    return sorted({max(1, CORES // 4), max(1, CORES // 2), CORES})


def test_models_that_cost_the_same_are_measured_once(
    muxrt: CommandLine, home: Path, tmp_path: Path, steady: list[Pass]
) -> None:
    answer = muxrt("profile", home / "serve.yaml", "--out", tmp_path / "p.yaml", "--quick")
    assert answer.code == 0, answer.err
    assert "two costs what one does" in answer.out
    found = load_profile(tmp_path / "p.yaml")
    assert set(found.shapes) == {"one", "int8"} and found.file is not None
    assert [model.weights for model in found.file.models] == ["float32", "int8"]


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """Every burst takes what its tokens say; the passes asked for, in order."""
    asked: list[Pass] = []

    def burst(self: Probe, lane: int, model: str, one: Pass) -> float:
        asked.append(one)
        return 1e-3 + 1e-6 * one.tokens

    monkeypatch.setattr(Probe, "burst", burst)
    monkeypatch.setattr(Probe, "beside", lambda *_: Beside(1e-2, 1e-3, 1.2e-2, 1.1e-3))
    # Bursts that are made up say nothing of what a server takes.
    monkeypatch.setattr(profile_run, "measure_service", no_service)
    return asked


def no_service(*_: object) -> Service:
    raise MuxrtError("not here")


def test_rounds_go_there_and_back_and_add_finer_levels(
    muxrt: CommandLine, home: Path, tmp_path: Path, steady: list[Pass]
) -> None:
    first, second, _ = levels(256, 10**6)
    answer = muxrt("profile", home / "tiny", "--out", tmp_path / "p.yaml", "--quick", "--lanes", 1)
    assert answer.code == 0
    assert steady[: len(first)] == first
    both = [*first, *second]
    assert steady[len(first) : len(first) + len(both)] == both[::-1]
    assert [steady.count(one) for one in both] == [3] * len(both)


def test_what_was_measured_is_written_as_it_was(
    muxrt: CommandLine, home: Path, tmp_path: Path, steady: list[Pass]
) -> None:
    answer = muxrt("profile", home / "tiny", "--out", tmp_path / "p.yaml", "--json")
    found = load_profile(tmp_path / "p.yaml")
    assert all(
        time == pytest.approx(1e-3 + 1e-6 * cell.tokens, rel=1e-5)
        for cell in found.cells
        for time in (cell.prefill_s, cell.decode_s)
        if time is not None
    )
    data = json.loads(answer.out)
    assert data["fits"][0]["decode"]["median"] < 0.05 and data["measured"]["spread"] == 0
    if CORES > 1:
        assert data["engine"]["interference"] == pytest.approx(0.15)
        assert data["engine"]["prefill_interference"] == pytest.approx(0.2)
        assert data["engine"]["decode_interference"] == pytest.approx(0.1)
        assert data["side_by_side"][0]["prefill_tokens"] == 128
    assert 0 < data["engine"]["control_s"] + data["engine"]["control_step_s"] < 0.1
    assert 0 < data["engine"]["request_s"] < 1.0


@pytest.mark.parametrize(("presses_at", "code"), [(7, 0), (0, 1)])
def test_ctrl_c_keeps_what_was_measured(
    presses_at: int,
    code: int,
    muxrt: CommandLine,
    home: Path,
    tmp_path: Path,
    steady: list[Pass],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    counted = Probe.burst
    load_model = profile_target.load_model

    def burst(self: Probe, lane: int, model: str, one: Pass) -> float:
        if len(steady) + 1 == presses_at:
            signal.raise_signal(signal.SIGINT)
        return counted(self, lane, model, one)

    def load(*args: Any) -> Any:
        if not presses_at:
            signal.raise_signal(signal.SIGINT)
        return load_model(*args)

    monkeypatch.setattr(Probe, "burst", burst)
    monkeypatch.setattr(profile_target, "load_model", load)
    out = tmp_path / "p.yaml"
    answer = muxrt("profile", home / "tiny", "--out", out, "--lanes", 1, "--json")
    assert answer.code == code and "interrupted" in answer.err
    if code:
        assert "nothing was measured" in answer.err and not out.exists()
        return
    assert len(steady) == presses_at and len(load_profile(out).cells) <= presses_at
    data = json.loads(answer.out)
    assert not data["is_whole"] and data["engine"]["control_s"] is None
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_budget_ends_it_with_the_most_telling_cells(
    muxrt: CommandLine,
    home: Path,
    tmp_path: Path,
    steady: list[Pass],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that moves by a second whenever it is read."""
    seconds = count()
    monkeypatch.setattr(profile_run, "monotonic", lambda: float(next(seconds)))
    out = tmp_path / "p.yaml"
    answer = muxrt("profile", home / "tiny", "--out", out, "--lanes", 1, "--budget", 10, "--json")
    assert answer.code == 0 and not json.loads(answer.out)["is_whole"]
    assert steady == levels(256, 10**6)[0][:8]


@pytest.mark.parametrize(("load", "warns"), [(0.1, False), (2.5, True)])
def test_a_busy_machine_is_said_to_be_busy(
    load: float,
    warns: bool,
    muxrt: CommandLine,
    home: Path,
    tmp_path: Path,
    steady: list[Pass],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    answer = muxrt("profile", home / "tiny", "--out", tmp_path / "p.yaml", "--quick")
    assert answer.code == 0 and ("other work ran" in answer.out) == warns


BAD = {
    "a source that is not there": (["nowhere"], "nowhere: found nothing, expected a YAML file"),
    "a folder without a model": (["."], "config.json: no such file"),
    "lanes of no core": (["tiny", "--lanes", "0"], "--lanes: found '0', expected numbers of"),
    "lanes of too many": (["tiny", "--lanes", "1,9999"], "--lanes: found '1,9999', expected"),
    "lanes that are words": (["tiny", "--lanes", "all"], "--lanes: found 'all', expected"),
    "memory that is no size": (["tiny", "--kv", "much"], "--kv: found 'much', expected a size"),
    "memory for nothing": (["tiny", "--kv", "1KiB"], "--kv: tiny has room for 4 tokens"),
    "an output without a folder": (["tiny", "--out", "no/p.yaml"], "--out: found no/p.yaml"),
    "an output that is no YAML": (["tiny", "--out", "p.csv"], "--out: found p.csv, expected *.y"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(
    case: str, muxrt: CommandLine, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "tiny", tmp_path / "tiny")
    answer = muxrt("profile", *words)
    assert answer.code == 2 and expected in answer.err and answer.err.count("\n") == 1


def test_a_probe_runs_the_passes_that_it_times(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries, positions and phases of what the lanes get; no block belongs to two sequences."""
    from muxrt.cli.profile_source import load_source
    from muxrt.core import Batch, unpack_ids
    from muxrt.worker.executor import LaneExecutor
    from muxrt.worker.load import load_model

    ran: list[Batch] = []
    run = LaneExecutor.run

    def spy(self: LaneExecutor, works: list[Batch]) -> Any:
        ran.extend(works)
        return run(self, works)

    monkeypatch.setattr(LaneExecutor, "run", spy)
    subject = load_source(home / "tiny")
    model = load_model("test", subject.specs[0], subject.shapes["tiny"], lambda _: None)
    decode, prefill = Pass(Phase.DECODE, 3, 40), Pass(Phase.PREFILL, 2, 30)
    cores = sorted(os.sched_getaffinity(0))
    place = OnCores({"tiny": model}, [cores[:1]])
    with Probe(subject.specs, subject.shapes, place, {"tiny": [decode, prefill]}) as probe:
        ids = [i for batch in ran for e in batch.entries for i in unpack_ids(e.blocks).tolist()]
        assert sorted(ids) == list(range(probe.plan.num_blocks))
        ran.clear()
        assert probe.burst(0, "tiny", decode) > 0
        assert len(ran) > 3  # warm-up, one that does not count, those that do
        for batch in ran:
            entries = [(e.slot, e.start, e.num_tokens, e.samples) for e in batch.entries]
            assert entries == [(slot, 39, 1, True) for slot in range(3)]
        ran.clear()
        assert probe.burst(0, "tiny", prefill) > 0
        after_decodes = ran[2::2]  # the first has no decode step before it
        assert after_decodes and all(batch.phase is Phase.DECODE for batch in ran[1::2])
        for batch in (ran[0], *after_decodes):
            entries = [(e.slot, e.start, e.num_tokens, e.samples) for e in batch.entries]
            assert entries == [(slot, 0, 30, True) for slot in (3, 4)]
