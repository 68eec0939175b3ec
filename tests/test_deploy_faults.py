"""Real processes, a placement applied under load, somebody killed at every step of it.

Afterwards the placement is the old or the new one, whole; every request was answered by its own
model or cleanly refused; no process is left.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from test_server_faults import is_running
from tiny_folder import write_model

KEY = "only-for-administrators"
WAIT_S = 180.0  # a first start compiles
OLD, NEW = {"main": "ab"}, {"one": "a", "two": "b"}
# Lines of the journal, in order; somebody is killed when one is there.
POINTS = ("begun", "load one", "load two", "switched", "drain main", "free main", "done")
MODELS = "ab"


def some(*always: str) -> list[Any]:
    """`POINTS`, of which all but `always` are skipped where nobody asks for them."""
    rare = pytest.mark.skipif("MUXRT_ALL_FAULTS" not in os.environ, reason="MUXRT_ALL_FAULTS=1")
    return [point if point in always else pytest.param(point, marks=rare) for point in POINTS]


def units_of(placement: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "models": [{"name": model} for model in models],
            "memory": {"kv_bytes": "1MiB"},
        }
        for name, models in placement.items()
    ]


class Place:
    """A folder with models, configuration and journal, and the server that runs there."""

    def __init__(self, home: Path) -> None:
        self.journal = home / "journal"
        (home / "keys").write_text(KEY)
        for seed, name in enumerate(MODELS):
            write_model(home / name, seed)
        config = {
            "endpoint": {"port": 0},
            "admin": {"keys": {"file": "keys"}, "journal": "journal"},
            "models": [{"name": name, "path": name} for name in MODELS],
            "units": units_of(OLD),
        }
        (home / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
        self._home = home
        self.pids: set[int] = set()  # of units that ever were
        self.start()

    def start(self) -> None:
        self.log = self._home / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "muxrt", "serve", str(self._home / "serve.yaml")]
            self.process = subprocess.Popen(
                command, cwd=Path(__file__).parent.parent, stderr=log, stdin=subprocess.DEVNULL
            )
        wait_until(lambda: "event=ready url=" in self.log.read_text(), self.process)
        self.url = self.log.read_text().partition("event=ready url=")[2].split()[0]

    def points(self, begun: int = 0) -> list[str]:
        """What the journal says of the last change, as `POINTS` have it.

        Nothing where fewer than `begun` changes have begun.
        """
        found: list[str] = []
        for text in self.journal.read_text().splitlines():
            line = json.loads(text)
            step = line.get("step", {})
            if line["event"] == "begun":
                found, begun = [], begun - 1
            if line["event"] == "step" and step["kind"] != "switch":
                found.append(f"{step['kind']} {step['unit'].partition('.')[0]}")
            elif line["event"] not in ("step", "serving"):
                found.append(line["event"])
        return found if begun <= 0 else []

    def num_changes(self) -> int:
        """That the journal knows of."""
        return self.journal.read_text().count('{"event":"begun"')

    def note_pids(self) -> None:
        lines = self.log.read_text().splitlines()
        started = [line for line in lines if "event=unit_started" in line]
        self.pids |= {int(line.partition("pid=")[2]) for line in started}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Poll what has no event to wait for: logs and processes of others."""
    until_s = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < until_s, "waited in vain"
        assert process is None or process.poll() is None, "the server gave up"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("place"))
    yield place
    place.end()


@pytest.fixture(autouse=True)
def alive(place: Place) -> None:
    """Whatever a test before left, the server runs, with the old placement."""
    if place.process.poll() is not None:
        place.journal.unlink()
        place.start()


async def complete(http: aiohttp.ClientSession, model: str, max_tokens: int = 12) -> str:
    """The text, or how it was refused."""
    body = {
        "model": model,
        "prompt": "the quick brown",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with http.post("/v1/completions", json=body) as response:
        answer = await response.json()
        if response.status == 200:
            return str(answer["choices"][0]["text"])
        assert "Retry-After" in response.headers, answer
        return str(response.status)


async def admin(http: aiohttp.ClientSession, path: str, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {KEY}"}
    method = "GET" if body is None else "POST"
    async with http.request(method, path, json=body, headers=headers) as response:
        return await response.json()


async def under_load(
    place: Place, right: dict[str, str], change: Callable[[aiohttp.ClientSession], Any]
) -> Counter[str]:
    """Clients ask both models until `change` is over; how their requests ended."""
    seen: Counter[str] = Counter()
    is_over, has_begun = asyncio.Event(), asyncio.Event()

    async def client(http: aiohttp.ClientSession, model: str, max_tokens: int) -> None:
        while not is_over.is_set():
            try:
                text = await complete(http, model, max_tokens)
            except (aiohttp.ClientError, ConnectionError):
                seen["broken"] += 1
                await asyncio.sleep(0.05)
                continue
            if text.isdigit() and len(text) == 3:
                seen[text] += 1
                await asyncio.sleep(0.05)
            else:
                seen["right" if text == right[model] else text] += 1
                has_begun.set()

    async with aiohttp.ClientSession(place.url) as http:
        clients = [asyncio.create_task(client(http, model, 12)) for model in MODELS * 2]
        try:
            await has_begun.wait()
            await change(http)
        finally:
            is_over.set()
        await asyncio.gather(*clients)
    return seen


def ask_all(place: Place) -> dict[str, str]:
    async def go() -> dict[str, str]:
        async with aiohttp.ClientSession(place.url) as http:
            return {model: await complete(http, model) for model in MODELS}

    return asyncio.run(go())


def models_by_unit(place: Place) -> set[str]:
    """Units that requests go to, as the models that they hold."""

    async def go() -> set[str]:
        async with aiohttp.ClientSession(place.url) as http:
            units = (await admin(http, "/admin/units"))["units"]
        return {"".join(m["name"] for m in unit["models"]) for unit in units if unit["is_routed"]}

    return asyncio.run(go())


async def at_point(place: Place, point: str, begun: int) -> None:
    """When the change that is the `begun`th of the journal has come so far."""
    async with asyncio.timeout(WAIT_S):
        while point not in place.points(begun):
            await asyncio.sleep(0.002)


async def apply(http: aiohttp.ClientSession, placement: dict[str, str]) -> None:
    """Have it applied, and wait until nothing of that goes on."""
    with suppress(aiohttp.ClientError):
        await admin(http, "/admin/placement", {"units": units_of(placement)})
    async with asyncio.timeout(WAIT_S):
        while (await admin(http, "/admin/placement"))["change"]["phase"] in ("loading", "draining"):
            await asyncio.sleep(0.02)


def test_nobody_notices_a_change_in_which_nobody_dies(place: Place) -> None:
    right = ask_all(place)
    for wanted in (NEW, OLD):
        seen = asyncio.run(under_load(place, right, lambda http, w=wanted: apply(http, w)))
        assert set(seen) == {"right"}, seen
        assert models_by_unit(place) == set(wanted.values())


@pytest.mark.parametrize("victim", ["new", "old"])
@pytest.mark.parametrize("point", some("load two"))
def test_a_unit_killed_at_every_step(place: Place, point: str, victim: str) -> None:
    right = ask_all(place)

    async def change(http: aiohttp.ClientSession) -> None:
        before = {unit["pid"] for unit in (await admin(http, "/admin/units"))["units"]}
        begun = place.num_changes() + 1
        applying = asyncio.create_task(apply(http, NEW))
        await at_point(place, point, begun)
        units = (await admin(http, "/admin/units"))["units"]
        pids = [u["pid"] for u in units if (u["pid"] in before) == (victim == "old") and u["pid"]]
        if pids:  # there may be none yet, or no more
            with suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
        await applying

    seen = asyncio.run(under_load(place, right, change))
    assert set(seen) <= {"right", "503"} and seen["right"], seen
    placed = models_by_unit(place)
    assert placed in (set(OLD.values()), set(NEW.values()))
    wait_until(lambda: ask_all(place) == right)  # whoever was killed comes back

    async def back() -> None:
        async with aiohttp.ClientSession(place.url) as http:
            await apply(http, OLD)
            running = {u["pid"] for u in (await admin(http, "/admin/units"))["units"]}
        place.note_pids()
        assert {pid for pid in place.pids if is_running(pid)} <= running, "a process is left"

    asyncio.run(back())
    assert models_by_unit(place) == set(OLD.values())


@pytest.mark.parametrize("point", some("load two", "switched"))
def test_the_api_killed_at_every_step(place: Place, point: str) -> None:
    right = ask_all(place)

    async def change(http: aiohttp.ClientSession) -> None:
        begun = place.num_changes() + 1
        applying = asyncio.create_task(apply(http, NEW))
        await at_point(place, point, begun)
        place.process.kill()
        with suppress(aiohttp.ClientError, ConnectionError):
            await applying

    seen = asyncio.run(under_load(place, right, change))
    assert set(seen) <= {"right", "503", "broken"} and seen["right"], seen
    place.process.wait()
    place.note_pids()
    wait_until(lambda: not any(map(is_running, place.pids)))
    done = place.points()
    place.start()
    expected = NEW if "switched" in done else OLD
    assert models_by_unit(place) == set(expected.values())
    assert ask_all(place) == right

    async def back() -> None:
        async with aiohttp.ClientSession(place.url) as http:
            await apply(http, OLD)

    asyncio.run(back())
    assert models_by_unit(place) == set(OLD.values())
