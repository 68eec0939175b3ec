"""What is served is changed while it is served; units, requests and the disk fail at every step."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from scripted_unit import (
    ScriptedUnit,
    Stage,
    Troupe,
    make_config,
    on_loop,
    prompt_of,
    serving,
    write_words,
)
from test_server_app import LENGTH

from muxrt.config.placement import ModelSpec
from muxrt.config.serve import Admin, ApiKeys, ServeConfig
from muxrt.core import Output, Request
from muxrt.engine.messages import Step
from muxrt.server.app import Server, resume

KEY = "only-for-administrators"
WAIT_S = 10.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"))


def with_admin(config: ServeConfig, home: Path, **options: Any) -> ServeConfig:
    keys = home / "admin.keys"
    keys.write_text(KEY)
    admin = Admin(keys=ApiKeys(file=str(keys)), journal=str(home / "journal"), **options)
    return msgspec.structs.replace(config, admin=admin)


@dataclass
class Desk:
    """An administrator and a client."""

    stage: Stage
    http: aiohttp.ClientSession

    async def post(self, path: str, body: Any, method: str = "POST") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {KEY}"}
        data = msgspec.json.encode(body)
        async with self.http.request(method, path, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def placement(self) -> Any:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with self.http.get("/admin/placement", headers=headers) as response:
            return await response.json()

    def apply(self, wanted: ServeConfig, query: str = "") -> asyncio.Task[tuple[int, Any]]:
        body = {"models": wanted.models, "units": wanted.units}
        return asyncio.create_task(self.post("/admin/placement" + query, body))

    def ask(self, model: str = "tiny", n: int = 1) -> asyncio.Task[tuple[int, Any]]:
        async def go() -> tuple[int, Any]:
            body = {"model": model, "prompt": "hi", "max_tokens": 3, "n": n}
            async with self.http.post("/v1/completions", json=body) as response:
                return response.status, await response.json()

        return asyncio.create_task(go())

    async def next_unit(self, name: str) -> ScriptedUnit:
        unit = await self.stage.troupe.next(name)
        self.stage.units[name] = unit
        return unit

    async def settled(self) -> None:
        assert self.stage.server.deployer is not None
        async with asyncio.timeout(WAIT_S):
            await self.stage.server.deployer.wait()

    async def answers(self, model: str) -> None:
        """Until the endpoint has heard that some unit serves it."""
        async with asyncio.timeout(WAIT_S):
            while not self.stage.server.dispatcher.is_served(model):
                await asyncio.sleep(0.01)

    def units(self) -> list[str]:
        return sorted(self.stage.server.supervisor.units)


@asynccontextmanager
async def desk(config: ServeConfig, home: Path, **options: Any) -> AsyncIterator[Desk]:
    async with (
        serving(with_admin(config, home, **options)) as stage,
        aiohttp.ClientSession(stage.server.url) as http,
    ):
        yield Desk(stage, http)


def placement_on_disk(config: ServeConfig, home: Path) -> list[str]:
    """The units that a server started now would have."""
    _, resumed = resume(with_admin(config, home))
    return sorted(unit.name for unit in resumed.units)


async def answer(unit: ScriptedUnit, tokens: int = 3) -> None:
    request = await unit.request()
    await unit.step(request, range(5, 5 + tokens), LENGTH)


@on_loop
async def test_new_requests_go_to_the_new_unit_and_old_ones_end_where_they_are(
    folder: Path, tmp_path: Path
) -> None:
    before = make_config(folder)
    after = make_config(folder, {"main": ["tiny", "more"]})
    async with desk(before, tmp_path) as at:
        old = at.stage.unit
        running = at.ask()
        request = await old.request()
        change = at.apply(after)
        new = await at.next_unit("main.2")
        early = at.ask()
        await answer(old)  # nothing goes to a unit that loads
        assert (await early)[0] == 200
        await new.ready()
        status, progress = await change
        assert (status, progress["phase"]) == (200, "draining")
        late = at.ask("more")
        await answer(new)
        assert (await late)[0] == 200
        assert at.units() == ["main", "main.2"]
        await old.step(request, [7, 8, 9], LENGTH)
        assert (await running)[0] == 200
        await at.settled()
        assert at.units() == ["main.2"]
        assert (await at.placement())["change"]["phase"] == "done"
    assert placement_on_disk(before, tmp_path) == ["main.2"]


@on_loop
async def test_a_unit_that_cannot_load_undoes_the_change(folder: Path, tmp_path: Path) -> None:
    before = make_config(folder)
    after = make_config(folder, {"main": ["tiny", "x"], "other": ["y"]})
    async with desk(before, tmp_path) as at:
        change = at.apply(after)
        await (await at.next_unit("main.2")).ready()
        await (await at.next_unit("other")).fail("no such weights")
        status, body = await change
        assert status == 500 and "no such weights" in body["error"]["message"]
        await at.settled()
        assert at.units() == ["main"]
        served = at.ask()
        await answer(at.stage.unit)
        assert (await served)[0] == 200
    assert placement_on_disk(before, tmp_path) == ["main"]


@on_loop
async def test_a_new_unit_that_dies_while_another_one_loads_undoes_the_change(
    folder: Path, tmp_path: Path
) -> None:
    """It was ready once, so requests went to it while it came back, and no more to the old one."""
    before = make_config(folder)
    after = make_config(folder, {"main": ["tiny", "x"], "other": ["y"]})
    async with desk(before, tmp_path) as at:
        change = at.apply(after)
        first = await at.next_unit("main.2")
        await first.ready()
        second = await at.next_unit("other")
        first.die(-9)
        await second.ready()
        status, body = await change
        assert status == 500 and "main.2 died before the switch" in body["error"]["message"]
        await at.settled()
        assert at.units() == ["main"]
        served = at.ask()
        await answer(at.stage.unit)
        assert (await served)[0] == 200


@on_loop
async def test_a_unit_that_never_gets_ready_undoes_the_change(folder: Path, tmp_path: Path) -> None:
    """For ever every other change was refused, as one went on."""
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})
    async with desk(before, tmp_path, load_s=0.2) as at:
        change = at.apply(after)
        await at.next_unit("main.2")
        status, body = await change
        assert status == 500 and "main.2 was not ready after 0.2 s" in body["error"]["message"]
        await at.settled()
        assert at.units() == ["main"]


LOADING = ("before it is ready", "old unit while the new one loads")


@pytest.mark.parametrize("who", LOADING)
def test_a_unit_killed_before_the_switch(who: str, folder: Path, tmp_path: Path) -> None:
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})

    @on_loop
    async def scenario() -> None:
        async with desk(before, tmp_path) as at:
            change = at.apply(after)
            new = await at.next_unit("main.2")
            if who == LOADING[0]:
                new.die(-9)
                assert (await change)[0] == 500
                await at.settled()
                assert at.units() == ["main"]
            else:
                at.stage.unit.die(-9)
                old = await at.next_unit("main")  # it comes back, as it would have
                await old.ready()
                await new.ready()
                assert (await change)[0] == 200
                await at.settled()
                assert at.units() == ["main.2"]

    scenario()


@on_loop
async def test_an_old_unit_that_dies_while_it_finishes_is_not_started_again(
    folder: Path, tmp_path: Path
) -> None:
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})
    async with desk(before, tmp_path) as at:
        old = at.stage.unit
        untouched, begun = at.ask(), at.ask()
        first, second = await old.request(), await old.request()
        await old.step(second, [5])
        change = at.apply(after)
        new = await at.next_unit("main.2")
        await new.ready()
        assert (await change)[0] == 200
        old.die(-9)
        # What gave nothing yet starts over in the new unit; what had begun is refused, not dropped.
        request = await new.request()
        assert request.id == first.id
        await new.step(request, [5, 6, 7], LENGTH)
        assert (await untouched)[0] == 200
        assert (await begun)[0] == 503
        await at.settled()
        assert at.units() == ["main.2"]


@on_loop
async def test_streams_move_where_that_is_asked(folder: Path, tmp_path: Path) -> None:
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})
    async with desk(before, tmp_path) as at:
        old = at.stage.unit
        untouched, begun = at.ask(), at.ask()
        first, second = await old.request(), await old.request()
        await old.step(second, [5])
        change = at.apply(after, "?streams=move")
        new = await at.next_unit("main.2")
        await new.ready()
        assert (await change)[0] == 200
        assert {await old.abort(), await old.abort()} == {first.id, second.id}
        # What the old unit said before it heard of that comes too late.
        at.stage.server.dispatcher.on_step(Step((Output(second.id, (9,)),)))
        rest = {request.num_outputs: request for request in await both(new)}
        assert prompt_of(rest[1]).tokens == prompt_of(second).tokens + bytes([5, 0, 0, 0])
        assert rest[1].max_tokens == 3
        assert prompt_of(rest[0]) == prompt_of(first)
        await new.step(rest[1], [6, 7], LENGTH)
        await new.step(rest[0], [5, 6, 7], LENGTH)
        answers = [await untouched, await begun]
        assert [status for status, _ in answers] == [200, 200]
        texts = {answer["choices"][0]["text"] for _, answer in answers}
        assert len(texts) == 1 and answers[1][1]["usage"]["completion_tokens"] == 3
        await at.settled()
        assert at.units() == ["main.2"]
        assert at.stage.server.dispatcher.check()


async def both(unit: ScriptedUnit) -> list[Request]:
    return [await unit.request(), await unit.request()]


@on_loop
async def test_who_leaves_after_a_move_leaves_the_new_unit(folder: Path, tmp_path: Path) -> None:
    """Also where that unit died meanwhile, and the request started over in the next one."""
    before = make_config(folder)
    after = make_config(folder, {"main": ["tiny", "x"], "spare": ["tiny", "y"]})
    async with desk(before, tmp_path) as at:
        asking = [at.ask(), at.ask()]
        first, _ = await both(at.stage.unit)
        await at.stage.unit.step(first, [5])
        change = at.apply(after, "?streams=move")
        one = await at.next_unit("main.2")
        await one.ready()
        other = await at.next_unit("spare")
        await other.ready()
        assert (await change)[0] == 200
        await at.settled()
        moved = [await one.request(), await other.request()]
        assert moved[0].num_outputs + moved[1].num_outputs == 1
        untouched = one if not moved[0].num_outputs else other
        survivor, rest = (other, moved[1]) if untouched is one else (one, moved[0])
        untouched.die(-9)
        retried = await survivor.request()
        for each in asking:
            each.cancel()
        assert {await survivor.abort(), await survivor.abort()} == {retried.id, rest.id}
        assert len(at.stage.server.dispatcher.ledger) == 0


@on_loop
async def test_a_stream_that_does_not_fit_ends_where_it_is(folder: Path, tmp_path: Path) -> None:
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})
    async with desk(before, tmp_path) as at:
        old = at.stage.unit
        begun = at.ask()
        request = await old.request()
        await old.step(request, [5])
        change = at.apply(after, "?streams=move")
        new = await at.next_unit("main.2")
        await new.ready(max_len=request.prompt_tokens + 2)
        assert (await change)[0] == 200
        await old.step(request, [6, 7], LENGTH)
        assert (await begun)[0] == 200
        await at.settled()
        assert new.requests.empty() and at.units() == ["main.2"]


@on_loop
async def test_streams_either_finish_or_move(folder: Path, tmp_path: Path) -> None:
    async with desk(make_config(folder), tmp_path) as at:
        more = make_config(folder, {"main": ["tiny", "x"]})
        status, body = await at.apply(more, "?streams=vanish")
        assert status == 400 and "found 'vanish'" in body["error"]["message"]


def sleepy(folder: Path, models: list[str]) -> ServeConfig:
    """One unit whose models may sleep."""
    config = make_config(folder, {"main": models})
    replace = msgspec.structs.replace
    (unit,) = config.units
    unit = replace(unit, memory=replace(unit.memory, weight_bytes=1 << 30))
    return replace(config, units=(unit,))


def names(unit: ScriptedUnit) -> list[str]:
    return [spec.name for spec in unit.boot.models]


@on_loop
async def test_a_unit_that_only_loses_a_model_goes_on(folder: Path, tmp_path: Path) -> None:
    """Requests for that model end there; the unit forgets it then, and when it starts again."""
    async with desk(sleepy(folder, ["tiny", "x"]), tmp_path) as at:
        unit = at.stage.unit
        running = at.ask("x")
        request = await unit.request()
        assert (await at.post("/admin/models/x", {}, "DELETE"))[0] == 200
        assert (await at.ask("x"))[0] == 404
        served = at.ask()
        await answer(unit)
        assert (await served)[0] == 200
        assert unit.forgets.empty()
        await unit.step(request, [5, 6, 7], LENGTH)
        assert (await running)[0] == 200
        assert await unit.forget() == "x"
        await at.settled()
        assert (await at.placement())["change"]["phase"] == "done"
        unit.die(-9)
        again = await at.next_unit("main")
        assert names(again) == ["tiny"]
    _, resumed = resume(with_admin(sleepy(folder, ["tiny", "x"]), tmp_path))
    assert [part.name for part in resumed.units[0].models] == ["tiny"]


@on_loop
async def test_followers_find_a_model_that_leaves_its_unit(folder: Path, tmp_path: Path) -> None:
    """Choices of a request that is answered start where their prompt is, switch or no switch."""
    async with desk(sleepy(folder, ["tiny", "x"]), tmp_path) as at:
        unit = at.stage.unit
        running = at.ask("x", n=2)
        leader = await unit.request()
        assert (await at.post("/admin/models/x", {}, "DELETE"))[0] == 200
        await unit.step(leader, [5, 6, 7], LENGTH)
        await answer(unit)
        status, body = await running
        assert status == 200 and len(body["choices"]) == 2
        assert await unit.forget() == "x"


@on_loop
async def test_a_unit_that_dies_before_it_forgets(folder: Path, tmp_path: Path) -> None:
    async with desk(sleepy(folder, ["tiny", "x"]), tmp_path) as at:
        running = at.ask("x")
        await at.stage.unit.request()
        assert (await at.post("/admin/models/x", {}, "DELETE"))[0] == 200
        at.stage.unit.die(-9)
        assert (await running)[0] == 503
        again = await at.next_unit("main")
        await again.ready()
        if "x" in names(again):  # it was started before the last request was known to be lost
            assert await again.forget() == "x"
        await at.settled()
        await at.answers("tiny")
        served = at.ask()
        await answer(again)
        assert (await served)[0] == 200 and (await at.ask("x"))[0] == 404
        assert at.units() == ["main"]


@on_loop
async def test_a_new_unit_that_dies_after_the_switch_comes_back(
    folder: Path, tmp_path: Path
) -> None:
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})
    async with desk(before, tmp_path) as at:
        change = at.apply(after)
        new = await at.next_unit("main.2")
        await new.ready()
        assert (await change)[0] == 200
        new.die(-9)
        again = await at.next_unit("main.2")
        await again.ready()
        await at.answers("x")
        served = at.ask("x")
        await answer(again)
        assert (await served)[0] == 200
        await at.settled()


@on_loop
async def test_requests_of_another_folder_under_the_same_name_stay_apart(
    folder: Path, tmp_path: Path
) -> None:
    """An old unit's request is not sent to a model that reads other tokens."""
    before = make_config(folder)
    other = write_words(tmp_path / "other")
    after = make_config(other)
    async with desk(before, tmp_path) as at:
        old = at.stage.unit
        untouched = at.ask()
        await old.request()
        change = at.apply(after)
        new = await at.next_unit("main.2")
        await new.ready()
        assert (await change)[0] == 200
        old.die(-9)
        assert (await untouched)[0] == 503
        assert new.requests.empty()
        await at.settled()


@on_loop
async def test_one_change_at_a_time(folder: Path, tmp_path: Path) -> None:
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})
    async with desk(before, tmp_path) as at:
        change = at.apply(after)
        new = await at.next_unit("main.2")
        assert (await at.apply(before))[0] == 409
        await new.ready()
        assert (await change)[0] == 200
        await at.settled()


@on_loop
async def test_who_asked_may_leave(folder: Path, tmp_path: Path) -> None:
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})
    async with desk(before, tmp_path) as at:
        change = at.apply(after)
        new = await at.next_unit("main.2")
        change.cancel()
        await asyncio.sleep(0)
        await new.ready()
        await at.settled()
        assert at.units() == ["main.2"]


@on_loop
async def test_models_come_and_go(folder: Path, tmp_path: Path) -> None:
    async with desk(make_config(folder), tmp_path) as at:
        extra = make_config(folder, {"second": ["more"]})
        adding = asyncio.create_task(
            at.post("/admin/models", {"model": extra.models[0], "unit": extra.units[0]})
        )
        unit = await at.next_unit("second")
        await unit.ready()
        assert (await adding)[0] == 200
        await at.settled()
        served = at.ask("more")
        await answer(unit)
        assert (await served)[0] == 200
        assert (await at.post("/admin/models/more", {}, "DELETE"))[0] == 200
        await at.settled()
        assert (await at.ask("more"))[0] == 404
        assert at.units() == ["main"]


@on_loop
async def test_what_cannot_be_served_is_refused_before_anything_starts(
    folder: Path, tmp_path: Path
) -> None:
    async with desk(make_config(folder), tmp_path, max_extra_bytes=1 << 20) as at:
        status, body = await at.post("/admin/placement", {"units": [{"name": "x"}]})
        assert status == 400 and "models is missing in units[0]" in body["error"]["message"]
        missing = ModelSpec(name="tiny", path=str(tmp_path / "nowhere"))
        gone = msgspec.structs.replace(make_config(folder), models=(missing,))
        status, body = await at.apply(gone)
        assert status == 400 and "nowhere" in body["error"]["message"]
        nearby = msgspec.structs.replace(missing, path="models/tiny")
        status, body = await at.apply(msgspec.structs.replace(gone, models=(nearby,)))
        assert status == 400 and "expected an absolute one" in body["error"]["message"]
        odd = {"units": make_config(folder, {"main": ["tiny", "x"]}).units}
        status, body = await at.post("/admin/placement", odd)
        assert status == 400 and "found 'x', expected one of tiny" in body["error"]["message"]
        status, body = await at.apply(make_config(folder, {"main": ["tiny", "x"]}))
        assert status == 400 and "max_extra_bytes" in body["error"]["message"]
        assert at.units() == ["main"]


@on_loop
async def test_a_journal_that_cannot_be_written_undoes_the_change(
    folder: Path, tmp_path: Path
) -> None:
    async with desk(make_config(folder), tmp_path) as at:
        change = at.apply(make_config(folder, {"main": ["tiny", "x"]}))
        new = await at.next_unit("main.2")
        (tmp_path / "journal").unlink()
        (tmp_path / "journal").mkdir()  # what is to be written now cannot be
        await new.ready()
        assert (await change)[0] == 500
        await at.settled()
        assert at.units() == ["main"]


@on_loop
async def test_a_restart_serves_what_was_switched_to(folder: Path, tmp_path: Path) -> None:
    before, after = make_config(folder), make_config(folder, {"main": ["tiny", "x"]})
    async with desk(before, tmp_path) as at:
        change = at.apply(after)
        await (await at.next_unit("main.2")).ready()
        assert (await change)[0] == 200
    server = Server(with_admin(before, tmp_path), spawn=Troupe().spawn)
    assert [unit.name for unit in server.config.units] == ["main.2"]
    assert [model.name for model in server.config.models] == ["tiny", "x"]
    await server.stop()


@on_loop
async def test_without_admin_there_are_no_such_routes(folder: Path) -> None:
    async with (
        serving(make_config(folder)) as stage,
        aiohttp.ClientSession(stage.server.url) as http,
        http.get("/admin/units") as response,
    ):
        assert response.status == 404
