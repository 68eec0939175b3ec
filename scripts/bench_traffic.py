"""What does the traffic log cost per request? Two servers side by side, one of them with it.

    python scripts/bench_traffic.py --out docs/benchmarks

Both are `muxrt serve --null-executor 0`: tokens cost nothing, so what is left is the endpoint. They
are asked in turns (with, without, without, with), and what their API processes compute per request
is compared, the log's thread included. The cost of `add` alone is measured in this process.
"""

import asyncio
import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, time
from timeit import repeat
from typing import Annotated

import aiohttp
import typer
from bench_record import FOLDER, Record
from rich.console import Console

from muxrt.cli.endpoint import OwnEndpoint, start_endpoint
from muxrt.config.load import load
from muxrt.config.serve import TrafficFolder
from muxrt.server.traffic import TrafficLog
from muxrt.server.traffic_files import Entry, log_files, read_entries

MODEL = Path(__file__).parent.parent / "configs" / "demo_models" / "pydoc-s"
CONFIG = """
endpoint: {{port: 0}}
models: [{{name: "null", path: {path}, max_queue: 4096}}]
units:
  - {{name: main, models: [{{name: "null"}}], memory: {{kv_bytes: 256MiB}}}}
"""
TRAFFIC = "traffic: {path: log}\n"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NUM_ADDS = 20_000


@dataclass(frozen=True, slots=True)
class Window:
    """One server under load for a while."""

    has_log: bool
    requests: int
    cpu_us: float  # of the API process, per request
    requests_per_s: float


def start(stack: ExitStack, folder: Path, has_log: bool) -> OwnEndpoint:
    """A server of its own folder."""
    folder.mkdir()
    file = folder / "serve.yaml"
    file.write_text(CONFIG.format(path=MODEL) + (TRAFFIC if has_log else ""))
    server = start_endpoint(file, load(file), folder / "log.txt", "--null-executor", "0")
    stack.callback(server.stop)
    server.wait_ready(lambda said: None)
    return server


def cpu_s(pid: int) -> float:
    """Seconds that all threads of a process computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


async def ask(url: str, clients: int, max_tokens: int, seconds: float) -> int:
    """Ask from so many connections, each again when it is answered; how many were."""
    body = {"model": "null", "prompt": "What does os.path.join do?", "max_tokens": max_tokens}
    data, count, end_s = json.dumps(body).encode(), 0, perf_counter() + seconds

    async def client(http: aiohttp.ClientSession) -> None:
        nonlocal count
        while perf_counter() < end_s:
            head = {"Content-Type": "application/json"}
            async with http.post(f"{url}/v1/completions", data=data, headers=head) as response:
                await response.read()
                assert response.status == 200
            count += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return count


def window(server: OwnEndpoint, has_log: bool, clients: int, tokens: int, seconds: float) -> Window:
    """Load one server and count what it computes."""
    before, begun_s = cpu_s(server.process.pid), perf_counter()
    requests = asyncio.run(ask(server.url, clients, tokens, seconds))
    took_s, spent_s = perf_counter() - begun_s, cpu_s(server.process.pid) - before
    return Window(has_log, requests, 1e6 * spent_s / requests, requests / took_s)


def add_us() -> float:
    """Of an entry and its `add`, the best of some runs; nothing is written meanwhile."""
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            log = TrafficLog(TrafficFolder(path=folder))
            for _ in range(NUM_ADDS):
                log.add(Entry(time(), "null", 12, 16, 0.1, 0.01, 200, "main", None, 1))

        return 1e6 * min(repeat(run, number=1, repeat=7)) / NUM_ADDS


def main(
    out: Annotated[Path, typer.Option(help="Folder of traffic.json.")] = FOLDER,
    rounds: Annotated[int, typer.Option(help="Of four windows each.")] = 6,
    seconds: Annotated[float, typer.Option(help="Of a window.")] = 3.0,
    clients: int = 32,
    max_tokens: int = 16,
) -> None:
    """Measure and write traffic.json."""
    settings = {"seconds": seconds, "clients": clients, "max_tokens": max_tokens}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        servers = {has: start(stack, folder / str(has), has) for has in (True, False)}
        for has, server in servers.items():
            window(server, has, clients, max_tokens, 1.0)  # warm
        windows = [
            window(servers[has], has, clients, max_tokens, seconds)
            for _ in range(rounds)
            for has in (True, False, False, True)
        ]
        servers[True].stop()
        rows = sum(1 for _ in read_entries(folder / "True" / "log"))
        num_bytes = sum(file.num_bytes for file in log_files(folder / "True" / "log"))
    on, off = (median(w.cpu_us for w in windows if w.has_log is has) for has in (True, False))
    record = Record(out / "traffic.json", settings)
    record.put("windows", [asdict(one) for one in windows])
    figures = {
        "cpu_us_with": on,
        "cpu_us_without": off,
        "ratio": on / off,
        "add_us": add_us(),
        "bytes_per_request": num_bytes / rows,
    }
    record.put("figures", figures)
    Console().print(figures)


if __name__ == "__main__":
    typer.run(main)
