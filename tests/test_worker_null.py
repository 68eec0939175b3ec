"""Tokens that no model made: the null executor, alone and behind a whole endpoint."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import msgspec
import pytest
from command_line import CommandLine
from readable import is_readable
from real_server import RealServer, real_config, real_server
from tiny_folder import byte_level, sentencepiece_like, write_model, write_tokenizer

from muxrt.config.placement import MIB
from muxrt.core import (
    Batch,
    BatchEntry,
    Layers,
    Phase,
    Prompt,
    Result,
    SamplingParams,
    SlotOpen,
    Work,
)
from muxrt.errors import ConfigError
from muxrt.server.detokenize import Detokenizer
from muxrt.server.tokenizer import load_tokenizer
from muxrt.server.unit_process import spawn_null
from muxrt.worker.null import NullExecutor, load_words

WAIT_S = 10.0


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.mark.parametrize("core", [byte_level(), sentencepiece_like()], ids=["bytes", "pieces"])
def test_every_word_is_text_by_itself(tmp_path: Path, core: Any) -> None:
    write_tokenizer(tmp_path, core)
    words, tokenizer = load_words(tmp_path), load_tokenizer(tmp_path)
    texts = [Detokenizer(tokenizer).push(word) for word in words]
    assert len(words) > 3 and all(text.strip().isalpha() and text.isascii() for text in texts)


@pytest.mark.parametrize("vocab", [{"\u00e9": 1, "7": 2}, {}, []])
def test_a_vocabulary_without_words_is_one_clear_error(tmp_path: Path, vocab: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    with pytest.raises(ConfigError, match="the null executor"):
        load_words(tmp_path)


def batch(number: int, entries: tuple[BatchEntry, ...], **sampling: Any) -> Batch:
    payload = msgspec.msgpack.encode(Prompt(b"", SamplingParams(**sampling)))
    return Batch(number, 0, "m", Phase.PREFILL, entries, (SlotOpen(0, payload),))


def run(executor: NullExecutor, works: list[Work]) -> list[Result]:
    results: list[Result] = []
    for work in works:
        executor.launch(work, lambda work, result: results.append(result))
        assert not results, "done was called inside launch"
    while len(results) < len(works):
        assert is_readable(executor.fileno(), WAIT_S)
        executor.drain()
    return results


def test_position_decides_the_word() -> None:
    executor = NullExecutor({"m": [10, 11, 12]})
    entries = (BatchEntry(0, 0, 4, True), BatchEntry(1, 0, 4, False), BatchEntry(2, 5, 1, True))
    (result,) = run(executor, [batch(0, entries)])
    assert result == Result((11, None, 10), (False, False, False))
    executor.close()


def test_works_take_their_time_one_after_the_other() -> None:
    executor, start_s = NullExecutor({"m": [10]}, step_s=0.05), monotonic()
    run(executor, [batch(number, (BatchEntry(0, 0, 1, True),)) for number in range(4)])
    assert monotonic() - start_s >= 0.2
    executor.close()


def test_parts_of_a_pass_take_their_share_and_the_last_one_speaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept = list[float]()
    monkeypatch.setattr("muxrt.worker.null.sleep", slept.append)
    executor = NullExecutor({"m": [10]}, step_s=8.0)
    silent, asking = (BatchEntry(0, 0, 4, asks) for asks in (False, True))
    works: list[Work] = [
        msgspec.structs.replace(batch(0, (silent,)), layers=Layers(0, 1, 4)),
        msgspec.structs.replace(batch(1, (asking,)), layers=Layers(1, 4, 4)),
    ]
    assert [result.tokens for result in run(executor, works)] == [(None,), (10,)]
    assert slept[0] <= 2.0 < slept[1] <= 8.0
    executor.close()


def test_what_has_no_probabilities_says_so() -> None:
    executor = NullExecutor({"m": [10]})
    (result,) = run(executor, [batch(0, (BatchEntry(0, 0, 1, True),), logprobs=0)])
    assert result.error is not None and "logprobs" in result.error
    executor.close()


def test_it_needs_no_torch() -> None:
    code = "import sys, muxrt.worker.null; assert not {'torch', 'numba'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- behind an endpoint ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("null")
    config = real_config(folder, {"main": ["tiny"]}, kv_bytes=64 * MIB, has_weights=False)
    with real_server(config, spawn=spawn_null(0.0)) as server:
        yield server


def get(url: str) -> Any:
    with urlopen(url, timeout=WAIT_S) as response:
        return json.load(response)


def post(url: str, **fields: Any) -> str:
    body = json.dumps({"model": "tiny", "prompt": [5, 6, 7], **fields}).encode()
    with urlopen(HttpRequest(url + "/v1/completions", body), timeout=WAIT_S) as response:
        return str(response.read().decode())


def test_the_endpoint_says_that_tokens_are_made_up(endpoint: RealServer) -> None:
    assert "MADE UP" in get(endpoint.url + "/ready")["message"]
    assert get(endpoint.url + "/v1/models")["data"][0]["made_up"] is True


def test_every_token_is_an_event(endpoint: RealServer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level())
    words = load_words(tmp_path)
    expected = [words[position % len(words)] for position in range(3, 103)]
    *events, done, rest = post(endpoint.url, max_tokens=100, stream=True).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert len(texts) == 100 and "".join(texts) == byte_level().decode(expected)
    endpoint.check_nothing_leaked()


def test_a_client_that_does_not_read_is_waited_for(endpoint: RealServer) -> None:
    """More than the kernel holds: the rest stays as outputs, and nothing of it is lost."""
    body = {"model": "tiny", "prompt": [5], "max_tokens": 250, "n": 128, "stream": True}
    data = json.dumps(body).encode()
    with socket.socket() as client:
        # Not smaller: a window below the segment size is only served by a timer, a segment a time.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        client.connect(("127.0.0.1", int(endpoint.url.rpartition(":")[2])))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        answer, unsent = bytearray(client.recv(1)), 0  # all 128 are live by now
        endpoint.check_nothing_leaked()  # the unit has said everything
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            unsent = max(unsent, endpoint.run(lambda: unsent_bytes(endpoint)))
            answer += client.recv(1 << 16)
    assert 0 < unsent < 1 << 20
    whole = json.loads(post(endpoint.url, prompt=[5], max_tokens=250))
    texts: dict[int, str] = {}
    for line in answer.split(b"\n"):
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert len(texts) == 128 and set(texts.values()) == {whole["choices"][0]["text"]}


async def unsent_bytes(endpoint: RealServer) -> int:
    """Of all connections, written but not yet taken by the kernel."""
    runner = endpoint.server._runner
    assert runner is not None and runner.server is not None
    transports = [connection.transport for connection in runner.server.connections]
    return sum(t.get_write_buffer_size() for t in transports if t is not None)


def test_a_request_for_probabilities_is_refused(endpoint: RealServer) -> None:
    with pytest.raises(HTTPError, match="500") as caught:
        post(endpoint.url, logprobs=1)
    assert "logprobs" in caught.value.read().decode()


def test_the_command_makes_tokens_up_and_says_so(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    text = "endpoint: {port: 0}\nmodels: [{name: tiny, path: tiny}]\nkv_bytes: 1MiB\n"
    (tmp_path / "serve.yaml").write_text(text)
    command = [sys.executable, "-m", "muxrt", "serve", str(tmp_path / "serve.yaml")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [*command, "--null-executor", "0"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "event=ready url=" in line:
                    break
            url = lines[-1].partition("url=")[2].split()[0]
            assert any("level=WARNING" in line and "MADE UP" in line for line in lines)
            assert get(url + "/v1/models")["data"][0]["made_up"] is True
        finally:
            process.terminate()


def test_a_check_starts_nothing_so_it_takes_no_executor(muxrt: CommandLine) -> None:
    answer = muxrt("serve", "any.yaml", "--check", "--null-executor", "0")
    assert answer.code == 2 and "--check starts nothing" in answer.err
