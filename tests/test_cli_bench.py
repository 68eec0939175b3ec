"""`muxrt bench` as its users run it: table, JSON, exit code."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import CommandLine
from stub_endpoint import Stub, running

WORKLOAD = """\
duration_s: 0.5
power_law: {alpha: 1, rate_rps: 60}
prompt: {mean_tokens: 20}
output: {mean_tokens: 5}
slo: {ttft_s: 5, tpot_s: 1}
"""


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.yaml"
    path.write_text(WORKLOAD)
    return path


@contextmanager
def serving(stub: Stub) -> Iterator[str]:
    """`stub` in a thread of its own: the command has the event loop of this one."""
    loop, ready, left = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def live() -> None:
        async with running(stub):
            ready.set()
            await left.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),))
    thread.start()
    ready.wait()
    try:
        yield stub.url
    finally:
        loop.call_soon_threadsafe(left.set)
        thread.join()
        loop.close()


def test_a_table_and_a_file_of_figures(muxrt: CommandLine, workload: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    with serving(Stub()) as url:
        answer = muxrt("bench", workload, "--url", url, "--json", figures)
    assert answer.code == 0
    assert "TTFT" in answer.out and "100.0%" in answer.out
    data = json.loads(figures.read_text())
    assert data["total"]["requests"] == sum(row["requests"] for row in data["rows"])
    assert f"{data['total']['requests']} requests in" in answer.out


def test_a_failed_request_fails_the_command(muxrt: CommandLine, workload: Path) -> None:
    with serving(Stub(breaks={"b": "500"})) as url:
        answer = muxrt("bench", workload, "--url", url)
    assert answer.code == 1 and "x 500: told to answer 500" in answer.out


def test_a_refused_request_is_counted_apart(muxrt: CommandLine, workload: Path) -> None:
    with serving(Stub(breaks={"b": "429"})) as url:
        answer = muxrt("bench", workload, "--url", url)
    assert answer.code == 0 and "refused" in answer.out


def test_more_than_one_endpoint(muxrt: CommandLine, workload: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    with serving(Stub(models=("a",))) as one, serving(Stub(models=("b",))) as two:
        answer = muxrt("bench", workload, "--url", one, "--url", two, "--json", figures)
    assert answer.code == 0
    rows = json.loads(figures.read_text())["rows"]
    assert {row["model"] for row in rows if row["requests"]} == {"a", "b"}


def test_nobody_there(muxrt: CommandLine, workload: Path) -> None:
    answer = muxrt("bench", workload, "--url", "http://127.0.0.1:9")
    assert answer.code == 1
    assert "error: http://127.0.0.1:9 cannot be reached" in answer.err


def test_a_missing_workload(muxrt: CommandLine) -> None:
    answer = muxrt("bench", "nowhere.yaml")
    assert (answer.code, answer.err) == (2, "error: nowhere.yaml: no such file\n")


def test_models_of_an_endpoint(muxrt: CommandLine) -> None:
    with serving(Stub(models=("x", "y"))) as url:
        assert muxrt("models", url).out == "x\ny\n"
        assert muxrt("models", f"{url}/v1", "--json").out == '["x","y"]\n'
