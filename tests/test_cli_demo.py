"""`muxrt demo` around a stub server: it starts, asks, loads, reports, and leaves nothing behind."""

import os
import re
import signal
import socket
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from command_line import CommandLine
from model_folders import SERVE_FILE, two_models

from muxrt.bench.client import EndpointError
from muxrt.cli import endpoint
from muxrt.cli.endpoint import choose_port

WORKLOAD = """\
duration_s: 1
power_law: {alpha: 1, rate_rps: 30}
prompt: {mean_tokens: 20}
output: {mean_tokens: 5}
slo: {ttft_s: 5, tpot_s: 1}
"""


@pytest.fixture
def muxrt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> CommandLine:
    stub = str(Path(__file__).parent / "stub_endpoint.py")
    monkeypatch.setattr(endpoint, "SERVE", (sys.executable, stub))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    yield CommandLine(monkeypatch, capsys)  # type: ignore[misc]
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / "azure_conv.yaml").write_text(WORKLOAD)
    two_models(tmp_path)
    return tmp_path


def write(folder: Path, name: str = "serve.yaml") -> Path:
    path = folder / name
    path.write_text(f"endpoint: {{port: {_free_port()}, drain_s: 1}}\n{SERVE_FILE}")
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(url: str) -> bool:
    try:
        with urlopen(f"{url}/v1/models", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _url(out: str) -> str:
    found = re.search(r"(http://\S+)/v1 is ready", out)
    assert found, out
    return found[1]


def test_it_chats_loads_reports_and_stops(muxrt: CommandLine, folder: Path) -> None:
    answer = muxrt("demo", write(folder))
    assert answer.code == 0, answer.err
    for piece in ("small says [x]", "large says [x]", "TTFT", "100.0%", "requests in"):
        assert piece in answer.out
    assert not _listens(_url(answer.out))


def test_it_can_run_twice_while_its_port_is_taken(muxrt: CommandLine, folder: Path) -> None:
    path = write(folder)
    first = muxrt("demo", path, "--keep")
    second = muxrt("demo", path)
    pid = re.search(r"stop it with: kill (\d+)", first.out)
    assert pid is not None
    try:
        assert (first.code, second.code) == (0, 0)
        assert _listens(_url(first.out)) and _url(first.out) != _url(second.out)
        assert f"curl {_url(first.out)}/v1/chat/completions" in first.out
    finally:
        os.kill(int(pid[1]), signal.SIGTERM)
        os.waitpid(int(pid[1]), 0)
    assert not _listens(_url(first.out))


def test_a_refused_request_fails_it(muxrt: CommandLine, folder: Path) -> None:
    # The chat is refused too: the demo says so and stops what it started.
    answer = muxrt("demo", write(folder, "refuses.yaml"))
    assert answer.code == 1
    assert answer.err == "error: small answers 429: told to answer 429\n"
    assert not _listens(_url(answer.out))


def test_a_server_that_gives_up_shows_the_end_of_its_log(muxrt: CommandLine, folder: Path) -> None:
    answer = muxrt("demo", write(folder, "broken.yaml"))
    assert answer.code == 1
    assert "gave up with exit code 1" in answer.err and "told to give up" in answer.err


def test_a_taken_port_is_not_chosen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert choose_port("127.0.0.1", port) not in (0, port)


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(EndpointError, match="cannot listen on 192.0.2.1"):
        choose_port("192.0.2.1", 8000)
