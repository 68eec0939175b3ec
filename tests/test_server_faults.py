"""Real processes under load: killed units, clients that leave, signals, orphans."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import aiohttp
import msgspec
import pytest
from real_server import RealServer, real_config, real_server
from tiny_folder import write_model

BACK_S = 10.0  # a killed unit serves again within this time
BUSY = 2.0  # ... or, on a busy machine, within so many times what its first start took
NUM_LEAVERS = 200
WAIT_S = 180.0  # a first start compiles


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("models")
    config = real_config(folder, {"first": ["a"], "second": ["b"]}, max_queue=1000)
    with real_server(config) as server:
        yield server


async def generate(
    http: aiohttp.ClientSession, model: str, max_tokens: int = 20, stream: bool = True
) -> str:
    """One request; how it ended: ok, 503, error (in the stream), or broken."""
    body = {
        "model": model,
        "prompt": "the quick brown fox jumps",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    try:
        async with http.post("/v1/completions", json=body) as response:
            text = await response.text()
    except aiohttp.ClientError:
        return "broken"
    if response.status != 200:
        assert "error" in msgspec.json.decode(text) and "Retry-After" in response.headers
        return str(response.status)
    if not stream or text.endswith("data: [DONE]\n\n"):
        return "ok"
    return "error" if '"error"' in text.rstrip().rpartition("\n")[2] else "broken"


def test_a_killed_unit_comes_back_and_the_other_never_notices(endpoint: RealServer) -> None:
    async def load(model: str, until: asyncio.Event, stream: bool) -> Counter[str]:
        seen: Counter[str] = Counter()
        async with aiohttp.ClientSession(endpoint.url) as http:
            while not until.is_set():
                how = await generate(http, model, stream=stream)
                seen[how] += 1
                if how == "503":
                    await asyncio.sleep(0.2)  # what Retry-After asks for, in a hurry
        return seen

    async def scenario() -> tuple[Counter[str], Counter[str], float]:
        over = asyncio.Event()
        lost = [asyncio.create_task(load("a", over, stream)) for stream in (True, False) * 2]
        kept = [asyncio.create_task(load("b", over, stream)) for stream in (True, False)]
        async with aiohttp.ClientSession(endpoint.url) as http:
            for _ in range(5):
                assert await generate(http, "a") == "ok"
            os.kill(endpoint.pid("first"), signal.SIGKILL)
            killed_s = time.monotonic()
            while (how := await generate(http, "a")) != "ok":
                assert how in ("503", "error")
                await asyncio.sleep(0.05)
            back_s = time.monotonic() - killed_s
            for _ in range(5):
                assert await generate(http, "a") == "ok"
        over.set()
        return (
            sum(await asyncio.gather(*lost), Counter()),
            sum(await asyncio.gather(*kept), Counter()),
            back_s,
        )

    limit_s = max(BACK_S, BUSY * endpoint.server.supervisor.units["first"].load_s)
    lost, kept, back_s = asyncio.run(scenario())
    print(f"back after {back_s:.1f} s; its clients saw {dict(lost)}, the others {dict(kept)}")
    assert back_s < limit_s
    assert kept.keys() == {"ok"}
    assert lost.keys() <= {"ok", "503", "error"} and lost["ok"] and lost["503"]
    assert endpoint.server.supervisor.units["first"].num_restarts == 1
    assert endpoint.server.supervisor.units["second"].num_restarts == 0
    endpoint.check_nothing_leaked()


def test_clients_that_leave_at_random_leave_nothing_behind(
    endpoint: RealServer, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(7)

    async def leave(http: aiohttp.ClientSession, after_s: float, stream: bool) -> bool:
        """Ask for more than there is time for; whether we left before the end."""
        try:
            async with asyncio.timeout(after_s):
                await generate(http, rng.choice("ab"), max_tokens=200, stream=stream)
        except TimeoutError:
            return True
        return False

    async def scenario() -> int:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(endpoint.url, connector=connector) as http:
            leavers = [leave(http, rng.uniform(0, 1), i % 2 == 0) for i in range(NUM_LEAVERS)]
            num_left = sum(await asyncio.gather(*leavers))
            # The report on these is younger than every abort.
            for model in "ab":
                assert await generate(http, model, max_tokens=2) == "ok"
        return num_left

    num_left = asyncio.run(scenario())
    print(f"{num_left} of {NUM_LEAVERS} left early")
    assert num_left > NUM_LEAVERS / 4
    endpoint.check_nothing_leaked()
    assert endpoint.blocks_used() == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# -- whole servers ---------------------------------------------------------------------------

YAML = """
endpoint: {{port: 0, drain_s: {drain_s}}}
models:
  - {{name: tiny, path: {path}}}
kv_bytes: 1MiB
"""


class Program:
    """`muxrt serve` as users run it."""

    def __init__(self, folder: Path, drain_s: float = 30.0) -> None:
        (folder / "serve.yaml").write_text(YAML.format(path=folder / "tiny", drain_s=drain_s))
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "muxrt", "serve", str(folder / "serve.yaml")]
            self.process = subprocess.Popen(
                command, cwd=Path(__file__).parent.parent, stderr=log, stdin=subprocess.DEVNULL
            )

    def wait_for(self, text: str) -> str:
        """The line of the log that holds `text`, once it is there."""
        wait_until(lambda: text in self.log.read_text() or self.process.poll() is not None)
        found = [line for line in self.log.read_text().splitlines() if text in line]
        assert found, self.log.read_text()
        return found[0]

    def url(self) -> str:
        return self.wait_for("event=ready url=").partition("url=")[2].split()[0]

    def units(self) -> list[int]:
        """Process ids of the units that it started."""
        lines = self.log.read_text().splitlines()
        started = [line for line in lines if "event=unit_started" in line]
        return [int(line.partition("pid=")[2]) for line in started]

    def end(self) -> int:
        return self.process.wait(WAIT_S)


def wait_until(is_true: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Poll what has no event to wait for: logs and processes of others."""
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie, which a container's init may leave behind."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def ready_status(url: str) -> int:
    try:
        with urlopen(f"{url}/ready") as response:
            return int(response.status)
    except URLError as error:
        return int(getattr(error, "code", 0))


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    write_model(tmp_path / "tiny")
    program = Program(tmp_path)
    yield program
    program.process.kill()
    program.process.wait()


def test_sigterm_lets_streams_finish(program: Program) -> None:
    url = program.url()
    units = program.units()

    async def scenario() -> str:
        async with aiohttp.ClientSession(url) as http:
            body = {"model": "tiny", "prompt": [5], "max_tokens": 250, "ignore_eos": True}
            async with http.post("/v1/completions", json=body | {"stream": True}) as response:
                await response.content.readline()
                program.process.terminate()
                await asyncio.to_thread(program.wait_for, "event=drain ")
                said = await response.text()
        return said

    said = asyncio.run(scenario())
    assert said.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in said
    assert program.end() == 0
    assert not any(map(is_running, units))
    assert ready_status(url) == 0


def test_a_second_signal_does_not_wait(program: Program) -> None:
    url = program.url()

    async def scenario() -> str:
        async with aiohttp.ClientSession(url) as http:
            body = {"model": "tiny", "prompt": ["a"] * 200, "max_tokens": 250, "ignore_eos": True}
            asked = asyncio.ensure_future(http.post("/v1/completions", json=body))
            await asyncio.to_thread(wait_until, lambda: "queued" in metrics(url))
            program.process.terminate()
            await asyncio.to_thread(program.wait_for, "event=drain ")
            assert ready_status(url) == 503
            program.process.terminate()
            async with await asked as response:
                return f"{response.status} {await response.text()}"

    assert "503" in asyncio.run(scenario())
    assert program.end() == 0


def metrics(url: str) -> str:
    """ "queued" once a request of the scenario is live."""
    with urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("muxrt_requests_")]
    return "queued" if any(not line.endswith(" 0.0") for line in lines) else ""


def test_units_do_not_outlive_a_killed_server(program: Program) -> None:
    program.url()
    units = program.units()
    assert units
    program.process.kill()
    program.end()
    wait_until(lambda: not any(map(is_running, units)))


def test_a_broken_model_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"\xff" * 64)
    program = Program(tmp_path)
    assert program.end() != 0
    last = program.log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ") and "model.safetensors" in last
