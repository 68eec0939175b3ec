"""How many tokens per second does the control path carry? Many streams, tokens at no cost.

    python scripts/bench_endpoint.py --out docs/benchmarks

Starts `muxrt serve --null-executor` with its unit process on one core and reads the streams on
another: every token is an event of its own. The events of every stream are counted, and of one
stream in `--parse-every` each event is parsed and its text compared with the answer in one piece.
"""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from urllib.request import Request, urlopen

import typer
from bench_lanes import provenance
from rich.console import Console
from rich.table import Table

from muxrt.cli.endpoint import OwnEndpoint, choose_port

HOST = "127.0.0.1"
MODEL = Path(__file__).parent.parent / "configs" / "demo_models" / "pydoc-s"
MESSAGES = [{"role": "user", "content": "What does os.path.join do?"}]
CONFIG = """
endpoint: {{port: {port}}}
models:
  - {{name: "null", path: {path}, max_queue: 4096}}
units:
  - name: main
    models: [{{name: "null"}}]
    memory: {{kv_bytes: 1GiB}}
    scheduling: {{max_sequences: {streams}}}
"""
EVENT_END, LAST_CHUNK = b"\n\n", b"\r\n0\r\n\r\n"
CHUNK_BYTES = 1 << 16
# As fast as it goes: steps pile up, and many events of a stream leave in one write. And with time
# between steps, as real ones have it: each event leaves by itself.
STEPS_MS = (0.0, 4.0, 7.0)
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run offers."""

    streams: int
    max_tokens: int
    seconds: float
    warm_s: float
    parse_every: int
    step_ms: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the window gave. CPU is microseconds per token, in the processes and in the kernel."""

    tokens_per_s: float
    events_per_read: float
    api_us: float
    api_kernel_us: float
    unit_us: float
    unit_kernel_us: float
    client_us: float
    client_kernel_us: float
    streams_finished: int
    streams_parsed: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything that was counted up to one moment."""

    at_s: float
    tokens: int
    reads: int
    cpu_s: list[float]  # of API, unit and client: user, system


class Stream:
    """One keep-alive connection that asks again whenever its answer ends."""

    def __init__(self, address: tuple[str, int], ask: bytes) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ask = ask
        self.answer = bytearray()

    def ask(self) -> None:
        self.answer.clear()
        self.socket.sendall(self._ask)

    def read(self) -> bool:
        """Take what has come; True if the answer is complete."""
        data = self.socket.recv(CHUNK_BYTES)
        if not data:
            raise RuntimeError(f"the server hung up after {bytes(self.answer[-200:])!r}")
        self.answer += data
        return self.answer.endswith(LAST_CHUNK)

    @property
    def num_events(self) -> int:
        return self.answer.count(EVENT_END)


class Load:
    """All streams, read by one epoll loop."""

    def __init__(self, streams: list[Stream], max_tokens: int, parse_every: int, text: str) -> None:
        self._streams = {stream.socket.fileno(): stream for stream in streams}
        self._max_tokens = max_tokens
        self._parse_every = parse_every
        self._text = text
        self.num_finished = self.num_parsed = self.num_reads = 0

    def begin(self) -> None:
        for stream in self._streams.values():
            stream.ask()

    def run(self, seconds: float) -> None:
        with select.epoll() as epoll:
            for descriptor in self._streams:
                epoll.register(descriptor, select.EPOLLIN)
            until_s = time.monotonic() + seconds
            while time.monotonic() < until_s:
                for descriptor, _ in epoll.poll(1.0):
                    stream = self._streams[descriptor]
                    self.num_reads += 1
                    if stream.read():
                        self._finish(stream)

    def num_tokens(self) -> int:
        """Token events so far, of streams under way as well."""
        under_way = sum(stream.num_events for stream in self._streams.values())
        return self.num_finished * self._max_tokens + under_way

    def _finish(self, stream: Stream) -> None:
        """An event per token and [DONE], or the figures mean nothing."""
        if stream.num_events != self._max_tokens + 1 or b"data: [DONE]" not in stream.answer[-32:]:
            raise RuntimeError(f"{stream.num_events} events: {bytes(stream.answer[:500])!r}")
        if self.num_finished % self._parse_every == 0:
            self.num_parsed += 1
            check_events(bytes(stream.answer), self._max_tokens, self._text)
        self.num_finished += 1
        stream.ask()


def check_events(answer: bytes, max_tokens: int, text: str) -> None:
    """Every event of a stream, parsed: one piece of `text` each, the role first, the end last."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    *events, done = b"".join(dechunk(body)).split(EVENT_END)[:-1]
    choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    pieces = [choice["delta"]["content"] for choice in choices]
    assert done == b"data: [DONE]" and len(pieces) == max_tokens and all(pieces)
    assert "".join(pieces) == text, "the stream says something else than the answer in one piece"
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices] == [None] * (max_tokens - 1) + ["length"]


def dechunk(body: bytes) -> Iterator[bytes]:
    """The chunks of a chunked HTTP body."""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            return
        yield body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]


def cpu_s(pid: int) -> list[float]:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [int(ticks) / TICKS_PER_S for ticks in fields[11:13]]


def unit_pid(api_pid: int) -> int:
    tasks = Path(f"/proc/{api_pid}/task").iterdir()
    (child,) = {pid for task in tasks for pid in (task / "children").read_text().split()}
    return int(child)


def start_server(folder: Path, model: Path, plan: Plan) -> OwnEndpoint:
    """`muxrt serve --null-executor`; it and its unit stay on the cores that we have now."""
    port, log, file = choose_port(HOST, 0), folder / "log", folder / "endpoint.yaml"
    file.write_text(CONFIG.format(port=port, path=model.resolve(), streams=plan.streams))
    command = [sys.executable, "-m", "muxrt", "serve", str(file)]
    command += ["--null-executor", str(plan.step_ms / 1e3)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=output, start_new_session=True
        )
    return OwnEndpoint(process, f"http://{HOST}:{port}", log, drain_s=1.0)


def whole_answer(url: str, body: dict[str, object]) -> str:
    """The text of the same request in one piece."""
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def http_request(body: dict[str, object]) -> bytes:
    data = json.dumps(body | {"stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def run(model: Path, plan: Plan, folder: Path, cores: list[int]) -> Figures:
    """One endpoint, from its start to its end; it on the first core, this process on the second."""
    body: dict[str, object] = {"model": "null", "messages": MESSAGES}
    body["max_tokens"] = plan.max_tokens
    with ExitStack() as stack:
        os.sched_setaffinity(0, {cores[0]})
        server = start_server(folder, model, plan)
        stack.callback(server.stop)
        os.sched_setaffinity(0, {cores[1]})
        server.wait_ready(lambda said: None)
        text = whole_answer(server.url, body)
        address = (HOST, int(server.url.rpartition(":")[2]))
        asking = http_request(body)
        streams = [Stream(address, asking) for _ in range(plan.streams)]
        load = Load(streams, plan.max_tokens, plan.parse_every, text)
        return measure(load, server.process.pid, plan)


def measure(load: Load, api_pid: int, plan: Plan) -> Figures:
    """Run the load and compare the counts before and after the window."""
    pids = (api_pid, unit_pid(api_pid), os.getpid())

    def reading() -> Reading:
        spent = [seconds for pid in pids for seconds in cpu_s(pid)]
        return Reading(time.monotonic(), load.num_tokens(), load.num_reads, spent)

    load.begin()
    load.run(plan.warm_s)
    before = reading()
    load.run(plan.seconds)
    after = reading()
    tokens = after.tokens - before.tokens
    spent = [1e6 * (b - a) / tokens for a, b in zip(before.cpu_s, after.cpu_s, strict=True)]
    return Figures(
        tokens / (after.at_s - before.at_s),
        tokens / (after.reads - before.reads),
        *spent,
        streams_finished=load.num_finished,
        streams_parsed=load.num_parsed,
    )


def main(
    streams: Annotated[int, typer.Option(help="Streams at the same time.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 256,
    seconds: Annotated[float, typer.Option(help="Of the measured window.")] = 10.0,
    warm: Annotated[float, typer.Option(help="Seconds of load before it.")] = 3.0,
    parse_every: Annotated[int, typer.Option(help="One stream in so many is parsed.")] = 50,
    step_ms: Annotated[
        list[float] | None, typer.Option(help="Of the null executor; 0 = as fast as it goes.")
    ] = None,
    model: Annotated[Path, typer.Option(help="Folder; its weights are not read.")] = MODEL,
    out: Annotated[Path | None, typer.Option(help="Folder for endpoint.json.")] = None,
) -> None:
    """Stream from an endpoint whose tokens cost nothing."""
    cores, found = sorted(os.sched_getaffinity(0)), {}
    for step in step_ms or STEPS_MS:
        plan = Plan(streams, max_tokens, seconds, warm, parse_every, step)
        with tempfile.TemporaryDirectory() as folder:
            found[step] = run(model, plan, Path(folder), cores)
    show(found)
    if out:
        settings = {"streams": streams, "max_tokens": max_tokens, "seconds": seconds}
        rows = [{"step_ms": step, **asdict(row)} for step, row in found.items()]
        report = {**provenance(), **settings, "model": model.name, "runs": rows}
        out.mkdir(parents=True, exist_ok=True)
        (out / "endpoint.json").write_text(json.dumps(report, indent=2) + "\n")


def show(found: dict[float, Figures]) -> None:
    table = Table("what", *(f"step {step:g} ms" for step in found))
    rows = [asdict(row) for row in found.values()]
    for name in rows[0]:
        table.add_row(name, *(f"{row[name]:,.1f}" for row in rows))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
