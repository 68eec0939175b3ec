"""A served unit of two ranks, either of which is killed or stopped under load."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from real_server import RealServer, real_config, real_server
from test_server_faults import generate, is_running, wait_until
from test_worker_process import children

from muxrt.config.placement import Mesh
from muxrt.server.unit_process import UnitState

BACK_S = 15.0  # a unit that lost a rank serves again within this time
BUSY = 2.0  # ... or, on a busy machine, within so many times what its last start took, and ...
TIMEOUT_S = 2.0  # ... what it takes to find that a rank stands still
LOAD_TIMEOUT_S = 10.0  # likewise, while it loads: imports hold Python's lock for a while
SHM = Path("/dev/shm")

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("models")
    config = real_config(folder, {"cut": ["a"], "whole": ["b"]}, max_queue=1000)
    cut, whole = config.units
    mesh = Mesh(gpus=(0, 1), timeout_s=TIMEOUT_S, load_timeout_s=LOAD_TIMEOUT_S)
    units = (msgspec.structs.replace(cut, mesh=mesh), whole)
    with real_server(msgspec.structs.replace(config, units=units)) as server:
        yield server


@pytest.fixture(autouse=True)
def healthy(endpoint: RealServer) -> None:
    """Each fault is a story of its own: no delay, as if it were the fourth one in a minute."""
    wait_until(lambda: endpoint.server.supervisor.units["cut"].is_ready)
    endpoint.server.supervisor.units["cut"].backoff.deaths = 0


def ranks(endpoint: RealServer) -> list[int]:
    """The processes of the unit that is cut, rank 0 first."""
    first = endpoint.pid("cut")
    return [first, *children(first)]


def is_rank(pid: int) -> bool:
    """It runs its own program: between fork and exec it would stop its parent, too."""
    return b"rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes()


async def load(endpoint: RealServer, model: str, over: asyncio.Event, stream: bool) -> Counter[str]:
    seen: Counter[str] = Counter()
    async with aiohttp.ClientSession(endpoint.url) as http:
        while not over.is_set():
            how = await generate(http, model, stream=stream)
            seen[how] += 1
            if how == "503":
                await asyncio.sleep(0.2)
    return seen


async def back_again(http: aiohttp.ClientSession) -> None:
    while (how := await generate(http, "a")) != "ok":
        assert how in ("503", "error")
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_or_stops_takes_its_unit_down_and_the_unit_comes_back(
    endpoint: RealServer, rank: int, sign: signal.Signals
) -> None:
    supervisor = endpoint.server.supervisor
    restarts = supervisor.units["cut"].num_restarts
    before, shared = ranks(endpoint), set(SHM.iterdir())
    limit_s = max(BACK_S, TIMEOUT_S + BUSY * supervisor.units["cut"].load_s)
    assert len(before) == 2

    async def scenario() -> tuple[Counter[str], Counter[str], float]:
        over = asyncio.Event()
        lost = [asyncio.create_task(load(endpoint, "a", over, s)) for s in (True, False) * 2]
        kept = [asyncio.create_task(load(endpoint, "b", over, s)) for s in (True, False)]
        async with aiohttp.ClientSession(endpoint.url) as http:
            for _ in range(5):
                assert await generate(http, "a") == "ok"
            os.kill(before[rank], sign)
            begun_s = time.monotonic()
            while supervisor.units["cut"].num_restarts == restarts:
                await asyncio.sleep(0.02)
            await back_again(http)
            back_s = time.monotonic() - begun_s
            assert await generate(http, "a") == "ok"
        over.set()
        counts = [sum(await asyncio.gather(*tasks), Counter()) for tasks in (lost, kept)]
        return counts[0], counts[1], back_s

    lost, kept, back_s = asyncio.run(scenario())
    print(f"back after {back_s:.1f} s; its clients saw {dict(lost)}, the others {dict(kept)}")
    assert back_s < limit_s
    assert lost.keys() <= {"ok", "503", "error"} and lost["503"]
    assert kept.keys() == {"ok"}
    assert supervisor.units["cut"].num_restarts == restarts + 1
    assert supervisor.units["whole"].num_restarts == 0
    wait_until(lambda: not any(map(is_running, before)))
    assert set(SHM.iterdir()) <= shared
    endpoint.check_nothing_leaked()


def test_ranks_that_all_stood_still_go_on(endpoint: RealServer) -> None:
    """As when the whole machine slept: who slept itself judges nobody."""
    supervisor = endpoint.server.supervisor
    restarts, all_ranks = supervisor.units["cut"].num_restarts, ranks(endpoint)

    async def scenario() -> Counter[str]:
        over = asyncio.Event()
        asked = [asyncio.create_task(load(endpoint, "a", over, s)) for s in (True, False)]
        await asyncio.sleep(0.5)
        for sign, seconds in ((signal.SIGSTOP, 1.5 * TIMEOUT_S), (signal.SIGCONT, 1.5 * TIMEOUT_S)):
            for rank in all_ranks:
                os.kill(rank, sign)
            await asyncio.sleep(seconds)
        over.set()
        return sum(await asyncio.gather(*asked), Counter())

    assert asyncio.run(scenario()).keys() == {"ok"}
    assert supervisor.units["cut"].num_restarts == restarts


def test_an_idle_mesh_notices_too(endpoint: RealServer) -> None:
    """Nothing is under way that could time out."""
    supervisor = endpoint.server.supervisor
    endpoint.check_nothing_leaked()
    restarts, before = supervisor.units["cut"].num_restarts, ranks(endpoint)
    os.kill(before[1], signal.SIGSTOP)
    wait_until(lambda: supervisor.units["cut"].num_restarts == restarts + 1)
    error = supervisor.units["cut"].error
    assert error is not None and "rank 1" in error and "did not move for" in error
    wait_until(lambda: not any(map(is_running, before)))
    wait_until(lambda: supervisor.units["cut"].is_ready)


@pytest.mark.parametrize(("rank", "why"), [(0, "signal 9"), (1, "did not move for")])
def test_a_rank_that_stops_while_it_loads_is_found(
    endpoint: RealServer, rank: int, why: str
) -> None:
    """The other one ends it, and the unit starts once more."""
    unit = endpoint.server.supervisor.units["cut"]
    restarts, before = unit.num_restarts, ranks(endpoint)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: unit.num_restarts == restarts + 1 and unit.process is not None)
    wait_until(lambda: len(ranks(endpoint)) == 2 and is_rank(ranks(endpoint)[1]))
    loading = ranks(endpoint)
    os.kill(loading[rank], signal.SIGSTOP)
    assert unit.state is UnitState.LOADING and not set(loading) & set(before)
    wait_until(lambda: unit.num_restarts == restarts + 2)
    assert unit.error is not None and why in unit.error
    wait_until(lambda: not any(map(is_running, loading)))
    wait_until(lambda: unit.is_ready)
    assert unit.num_restarts == restarts + 2
    assert endpoint.server.supervisor.units["whole"].num_restarts == 0
