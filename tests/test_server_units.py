"""Units that load, fail, die, return and drain, as clients of the endpoint see it."""

import asyncio
import time
from io import StringIO
from pathlib import Path

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio
from scripted_unit import WAIT_S, Troupe, make_config, on_loop, serving, write_words
from test_server_app import LENGTH, Client, events, stage, tokens_of

from muxrt.config.serve import Endpoint
from muxrt.engine.messages import FromUnit, Loading, Ready, Stopped
from muxrt.errors import MuxrtError
from muxrt.server.app import Server
from muxrt.server.link import BURST_S, Link
from muxrt.server.progress import ERASE_LINE, LoadingView
from muxrt.server.supervisor import StartFailed
from muxrt.server.unit_process import FIRST_DELAY_S, MAX_DELAY_S, STABLE_S, Backoff, UnitProcess

NUM_MESSAGES = 200  # more than the link handles in one go


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"))


async def get(client: Client, path: str) -> tuple[int, dict[str, object]]:
    async with client.http.get(path) as response:
        return response.status, await response.json()


# -- starting --------------------------------------------------------------------------------


@on_loop
async def test_loading_is_told_until_every_model_answers(folder: Path) -> None:
    troupe = Troupe()
    changed = asyncio.Event()
    config = make_config(folder, {"main": ["tiny"], "other": ["two"]})
    server = Server(config, spawn=troupe.spawn, on_change=lambda unit: changed.set())
    starting = asyncio.create_task(server.start())
    try:
        main, other = await troupe.next("main"), await troupe.next("other")
        changed.clear()
        await main.say(Loading("main", "weights", "tiny", 1, 4))
        await changed.wait()
        async with aiohttp.ClientSession(server.url) as http:
            client = Client(http)
            status, body = await get(client, "/ready")
            assert status == 503 and body["missing"] == ["tiny", "two"]
            assert "unit main: loading weights of tiny, 25 %" in str(body["message"])
            assert (await get(client, "/health"))[0] == 200
            status, headers, _ = await client.ask()
            assert status == 503 and int(headers["Retry-After"]) >= 1
            await main.ready()
            await other.ready()
            await starting
            assert (await get(client, "/ready"))[0] == 200
    finally:
        await server.stop()


class Screen(StringIO):
    def isatty(self) -> bool:
        return True


@on_loop
async def test_a_terminal_sees_one_line_and_a_log_each_stage_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "muxrt.server.progress")
    unit = UnitProcess(make_config(folder).units[0])
    screen, log = Screen(), StringIO()
    views = [LoadingView(screen), LoadingView(log)]
    unit.begin(now=0.0)
    for done in range(5):
        unit.loading = Loading("main", "weights", "tiny", done, 4)
        for view in views:
            view.on_change(unit)
    unit.on_ready(Ready("main", 1, (), 1, 1), now=3.0)
    for view in views:
        view.on_change(unit)
    assert "loading weights of tiny, 75 %" in screen.getvalue()
    assert screen.getvalue().endswith(ERASE_LINE) and "\n" not in screen.getvalue()
    assert (len(caplog.records), log.getvalue()) == (1, "")


@on_loop
async def test_a_model_that_cannot_load_ends_the_start(folder: Path) -> None:
    troupe = Troupe()
    server = Server(make_config(folder), spawn=troupe.spawn)
    starting = asyncio.create_task(server.start())
    unit = await troupe.next()
    await unit.fail("config.json: found a cat")
    with pytest.raises(StartFailed, match="found a cat"):
        await starting
    await server.stop()


@on_loop
async def test_a_process_that_ends_without_a_word_ends_the_start_too(folder: Path) -> None:
    troupe = Troupe()
    server = Server(make_config(folder), spawn=troupe.spawn)
    starting = asyncio.create_task(server.start())
    (await troupe.next()).die(-9)
    with pytest.raises(StartFailed, match=r"unit main ended \(signal 9\)"):
        await starting
    await server.stop()


@on_loop
async def test_a_taken_port_is_one_clear_error(folder: Path) -> None:
    async with serving(make_config(folder)) as played:
        port = int(played.server.url.rpartition(":")[2])
        second = Server(make_config(folder, endpoint=Endpoint(port=port)), spawn=Troupe().spawn)
        with pytest.raises(MuxrtError, match=f"cannot listen on 127.0.0.1:{port}"):
            await second.start()
        await second.stop()


def test_only_its_user_can_reach_the_socket() -> None:
    link = Link(lambda identity, message: None, lambda identity: None)
    assert Path(link.endpoint.removeprefix("ipc://")).parent.stat().st_mode & 0o777 == 0o700
    link.close()
    assert not Path(link.endpoint.removeprefix("ipc://")).parent.exists()


@on_loop
async def test_a_message_that_breaks_its_handler_does_not_hold_up_the_next() -> None:
    heard: list[FromUnit] = []
    is_over = asyncio.Event()

    def receive(identity: bytes, message: FromUnit) -> None:
        heard.append(message)
        if len(heard) == NUM_MESSAGES:
            is_over.set()
        raise RuntimeError("a bug")

    broken: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
    link = Link(receive, lambda identity: None)
    link.open()
    context = zmq.asyncio.Context()
    with context.socket(zmq.DEALER) as socket:
        socket.connect(link.endpoint)
        for _ in range(NUM_MESSAGES):
            await socket.send(msgspec.msgpack.encode(Stopped("main")))
        await asyncio.wait_for(is_over.wait(), WAIT_S)
    link.close()
    context.term()
    assert len(broken) == NUM_MESSAGES


@on_loop
async def test_a_flood_of_messages_leaves_time_for_everything_else() -> None:
    """Each message takes longer than a burst: they are not handled in one go."""
    num_ticks, ticks = 0, []
    is_over = asyncio.Event()

    async def tick() -> None:
        nonlocal num_ticks
        while True:
            num_ticks += 1
            await asyncio.sleep(0)

    def receive(identity: bytes, message: FromUnit) -> None:
        time.sleep(2 * BURST_S)
        ticks.append(num_ticks)
        if len(ticks) == 4:
            is_over.set()

    link = Link(receive, lambda identity: None)
    link.open()
    ticking = asyncio.create_task(tick())
    context = zmq.Context()
    with context.socket(zmq.DEALER) as socket:
        socket.connect(link.endpoint)
        for _ in range(4):
            socket.send(msgspec.msgpack.encode(Stopped("main")))
        time.sleep(0.1)  # until all have arrived: the loop looks at them in one go
        await asyncio.wait_for(is_over.wait(), WAIT_S)
    ticking.cancel()
    link.close()
    context.term()
    assert ticks[-1] > ticks[0]


def test_the_delay_doubles_until_a_unit_was_healthy() -> None:
    backoff = Backoff()
    delays = [backoff.after_death(served_s=0.0) for _ in range(10)]
    assert delays[:4] == [0.0, FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert max(delays) == delays[-1] == MAX_DELAY_S
    assert backoff.after_death(served_s=STABLE_S) == 0.0


# -- dying -----------------------------------------------------------------------------------


@on_loop
async def test_a_dead_unit_is_503_until_its_next_process_is_ready(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask()
        await played.unit.request()
        played.unit.die(-9)
        status, headers, body = await asked
        assert status == 503 and int(headers["Retry-After"]) >= 1
        assert "died" in body["error"]["message"]
        reborn = await played.troupe.next()
        assert (await client.ask())[0] == 503
        assert (await get(client, "/ready"))[0] == 503
        await reborn.ready()
        asked = client.ask()  # the next line of the socket: it is ready by then, or asks again
        while (await wait_any(asked, reborn.requests.get()))[0] is asked:
            assert asked.result()[0] == 503
            asked = client.ask()
        assert played.server.supervisor.units["main"].num_restarts == 1
        asked.cancel()
        await reborn.abort()


async def wait_any(task: asyncio.Task[object], other: object) -> list[asyncio.Task[object]]:
    """Those of the two that are done first; `other` is cancelled if it is not among them."""
    second = asyncio.ensure_future(other)  # type: ignore[call-overload]
    done, _ = await asyncio.wait([task, second], return_when=asyncio.FIRST_COMPLETED)
    if second not in done:
        second.cancel()
    return sorted(done, key=lambda each: each is not second)


@on_loop
async def test_a_stream_of_a_dead_unit_ends_with_an_error_and_without_done(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = asyncio.ensure_future(client.post(stream=True))
        await played.unit.step(await played.unit.request(), tokens_of("a"))
        async with await asked as response:
            said = events(response)
            assert (await anext(said))["choices"][0]["text"] == "a"
            played.unit.die(-9)
            rest = [event async for event in said]
        assert [list(event) for event in rest] == [["error"]]
        assert rest[0]["error"]["type"] == "service_unavailable"


@on_loop
async def test_what_showed_nothing_starts_over_on_another_unit_once(folder: Path) -> None:
    config = make_config(folder, {"main": ["tiny"], "other": ["tiny"]})
    async with stage(config) as (played, client):
        main, other = played.units["main"], played.units["other"]
        asked = client.ask(prompt="the quick")
        request = await main.request()
        main.die(-9)
        again = await other.request()
        assert (again.payload, again.keys) == (request.payload, request.keys)
        other.die(-9)
        assert (await asked)[0] == 503


@on_loop
async def test_a_retried_request_is_answered(folder: Path) -> None:
    config = make_config(folder, {"main": ["tiny"], "other": ["tiny"]})
    async with stage(config) as (played, client):
        asked = client.ask()
        await played.units["main"].request()
        played.units["main"].die(-9)
        again = await played.units["other"].request()
        await played.units["other"].step(again, tokens_of("a"), LENGTH)
        status, _, body = await asked
        assert (status, body["choices"][0]["text"]) == (200, "a")


@on_loop
async def test_another_unit_never_notices(folder: Path) -> None:
    config = make_config(folder, {"main": ["tiny"], "other": ["two"]})
    async with stage(config) as (played, client):
        lost, kept = client.ask(), client.ask(model="two")
        await played.units["main"].request()
        request = await played.units["other"].request()
        await played.units["other"].step(request, tokens_of("a"))
        played.units["main"].die(-9)
        assert (await lost)[0] == 503
        await played.units["other"].step(request, tokens_of("b"), LENGTH)
        assert (await kept)[2]["choices"][0]["text"] == "ab"
        assert played.units["other"].aborts.empty()


@on_loop
async def test_a_process_that_speaks_gibberish_has_to_go(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask()
        await played.unit.request()
        await played.unit.send_raw(b"\xc1 gibberish")
        assert (await asked)[0] == 503
        assert (await played.troupe.next()).boot.identity == "main#2"


@on_loop
async def test_a_load_that_fails_again_waits_longer(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        played.unit.die(-9)
        await (await played.troupe.next()).fail("no more memory")
        third = await played.troupe.next()
        unit = played.server.supervisor.units["main"]
        assert (unit.generation, unit.error) == (3, "no more memory")
        assert unit.backoff.deaths == 2
        _, body = await get(client, "/ready")
        assert body["missing"] == ["tiny"]
        third.die(1)


# -- leaving ---------------------------------------------------------------------------------


@on_loop
async def test_draining_finishes_what_runs_and_refuses_what_comes(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        asked = client.ask(n=2)
        leader = await played.unit.request()
        draining = asyncio.create_task(played.server.drain(60.0))
        status, body = await get(client, "/ready")
        assert (status, body["message"]) == (503, "shutting down")
        assert (await get(client, "/health"))[0] == 200
        status, headers, _ = await client.ask()
        assert (status, headers["Retry-After"]) == (503, "1")
        await played.unit.step(leader, tokens_of("a"), LENGTH)
        follower = await played.unit.request()
        assert not draining.done()
        await played.unit.step(follower, tokens_of("b"), LENGTH)
        assert (await asked)[0] == 200
        assert await draining
        assert await played.server.supervisor.stop(60.0)
        assert played.unit.drains.qsize() == 1


@on_loop
async def test_what_is_late_at_the_deadline_is_told_so(folder: Path) -> None:
    async with stage(make_config(folder)) as (played, client):
        waiting = client.ask()
        await played.unit.request()
        asked = asyncio.ensure_future(client.post(stream=True))
        await played.unit.step(await played.unit.request(), tokens_of("a"))
        async with await asked as response:
            said = events(response)
            await anext(said)
            assert not await played.server.drain(0.01)
            assert "shutting down" in (await anext(said))["error"]["message"]
        assert (await waiting)[0] == 503
        assert {await played.unit.abort(), await played.unit.abort()}
