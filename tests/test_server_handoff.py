"""Prefill and decode in processes of their own, behind the real endpoint."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from real_server import RealServer, real_config, real_server

from muxrt.config.placement import Lanes, Mesh, Role, UnitModel, UnitSpec
from muxrt.config.routing import Routing
from muxrt.config.serve import Admin, ApiKeys, ServeConfig
from muxrt.engine.handoff import Event, Handoff
from muxrt.engine.relay import Relay

PROMPTS = ["Once upon a time", "a", "The quick brown fox jumps over the lazy dog. " * 8]
NUM_TOKENS = 24


def split(config: ServeConfig) -> ServeConfig:
    """The one unit twice, once for each phase."""
    (whole,) = config.units

    def side(name: str, role: Role) -> UnitSpec:
        models = tuple(UnitModel(name=model.name, role=role) for model in whole.models)
        # The longest prompt moves while it is computed.
        scheduling = msgspec.structs.replace(whole.scheduling, stream_tokens=32)
        return msgspec.structs.replace(
            whole, name=name, models=models, lanes=Lanes(split=(1,)), scheduling=scheduling
        )

    units = (side("prompts", "prefill"), side("answers", "decode"))
    return msgspec.structs.replace(config, units=units)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    return real_config(tmp_path_factory.mktemp("models"), {"both": ["a", "b"]})


@pytest.fixture(scope="module")
def wanted(whole: ServeConfig) -> dict[tuple[str, str], tuple[str, list[str]]]:
    """What one unit answers."""
    with real_server(whole) as endpoint:
        return asyncio.run(answers(endpoint))


@pytest.fixture(scope="module")
def endpoint(whole: ServeConfig) -> Iterator[RealServer]:
    with real_server(split(whole)) as endpoint:
        yield endpoint


async def ask(http: aiohttp.ClientSession, model: str, prompt: str) -> tuple[str, list[str]] | int:
    """Text and tokens, or the status of a refusal."""
    asked = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0.8}
    asked |= {"seed": 5, "logprobs": 0, "ignore_eos": True}
    async with http.post("/v1/completions", json=asked) as response:
        body = await response.json()
        if response.status != 200:
            return response.status
        (choice,) = body["choices"]
        assert body["usage"]["completion_tokens"] == NUM_TOKENS
        return choice["text"], choice["logprobs"]["tokens"]


async def answers(endpoint: RealServer) -> dict[tuple[str, str], tuple[str, list[str]]]:
    found = {}
    async with aiohttp.ClientSession(endpoint.url) as http:
        for model in "ab":
            for prompt in PROMPTS:
                answer = await ask(http, model, prompt)
                assert not isinstance(answer, int)
                found[model, prompt] = answer
    return found


def test_two_processes_give_the_tokens_of_one(
    endpoint: RealServer,
    wanted: dict[tuple[str, str], tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events, on = Counter[Event](), Relay.on

    def noted(relay: Relay, request_id: int, handoff: Handoff, event: Event) -> None:
        events[event] += 1
        on(relay, request_id, handoff, event)

    monkeypatch.setattr(Relay, "on", noted)
    assert asyncio.run(answers(endpoint)) == wanted
    endpoint.check_nothing_leaked()
    assert events[Event.FIRST] == events[Event.LAST] == 2 and events[Event.FETCHED] == len(wanted)
    stats = {unit.name: unit.stats for unit in endpoint.server.supervisor.units.values()}
    assert stats["prompts"] is not None and stats["answers"] is not None
    for computed, decoded in zip(stats["prompts"].models, stats["answers"].models, strict=True):
        assert computed.prompt_tokens > 0 and decoded.prompt_tokens == 0
        assert computed.output_tokens <= len(PROMPTS) and decoded.output_tokens > NUM_TOKENS


@pytest.mark.parametrize("victim", ["prompts", "answers"])
def test_either_process_may_be_killed_under_load(
    endpoint: RealServer,
    wanted: dict[tuple[str, str], tuple[str, list[str]]],
    victim: str,
) -> None:
    async def load(http: aiohttp.ClientSession, over: asyncio.Event) -> tuple[int, int]:
        ok = refused = 0
        while not over.is_set():
            for key, answer in wanted.items():
                got = await ask(http, *key)
                if isinstance(got, int):
                    assert got == 503
                    refused += 1
                    await asyncio.sleep(0.05)
                else:
                    assert got == answer, "a wrong token"
                    ok += 1
        return ok, refused

    async def scenario() -> list[tuple[int, int]]:
        over = asyncio.Event()
        unit = endpoint.server.supervisor.units[victim]
        async with aiohttp.ClientSession(endpoint.url) as http:
            loads = [asyncio.create_task(load(http, over)) for _ in range(4)]
            await asyncio.sleep(0.5)
            generation = unit.generation
            os.kill(endpoint.pid(victim), signal.SIGKILL)
            while unit.generation == generation or not unit.is_ready:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            over.set()
            return await asyncio.gather(*loads)

    done = asyncio.run(scenario())
    ok, refused = (sum(column) for column in zip(*done, strict=True))
    print(f"{ok} answers were right, {refused} refused")
    assert ok > 20
    assert refused == 0, "the other process could have served them"
    endpoint.check_nothing_leaked()


def test_processes_borrow_from_each_other_and_go_home(
    whole: ServeConfig, wanted: dict[tuple[str, str], tuple[str, list[str]]]
) -> None:
    both = msgspec.structs.replace(whole.units[0], name="both", lanes=Lanes(split=(1,)))
    # 64 tokens are a batch: more than 32 that wait go elsewhere, more than 96 borrow a unit.
    routing = Routing(policy="splitwise", borrow_batches=0.5, return_batches=0.1)
    apart = split(whole)
    config = msgspec.structs.replace(apart, units=(*apart.units, both), routing=routing)

    async def load(endpoint: RealServer) -> str:
        async with aiohttp.ClientSession(endpoint.url) as http:
            for _ in range(3):
                keys = [key for key in wanted for _ in range(4)]
                found = await asyncio.gather(*(ask(http, *key) for key in keys))
                assert found == [wanted[key] for key in keys]
            async with http.get("/metrics") as response:
                return await response.text()

    with real_server(config) as endpoint:
        text = asyncio.run(load(endpoint))
        endpoint.check_nothing_leaked()
        units = endpoint.server.supervisor.units
        stats = {name: unit.stats for name, unit in units.items()}
    assert all(found is not None for found in stats.values())
    assert sum(model.prompt_tokens for model in stats["both"].models) > 0  # type: ignore[union-attr]
    assert sum(model.prompt_tokens for model in stats["answers"].models) > 0  # type: ignore[union-attr]
    for model in "ab":
        for unit, role in (("prompts", "prefill"), ("answers", "decode"), ("both", "mixed")):
            assert f'muxrt_role{{model="{model}",role="{role}",unit="{unit}"}} 1.0' in text
    counts = [line for line in text.splitlines() if line.startswith("muxrt_role_switches_total")]
    assert len(counts) == 6
    assert sum(float(line.rpartition(" ")[2]) for line in counts) >= 2


def test_an_operator_switches_roles_while_requests_flow(
    whole: ServeConfig, wanted: dict[tuple[str, str], tuple[str, list[str]]], tmp_path: Path
) -> None:
    keys = tmp_path / "admin.keys"
    keys.write_text("only-for-administrators")
    admin = {"Authorization": "Bearer only-for-administrators"}
    config = msgspec.structs.replace(split(whole), admin=Admin(keys=ApiKeys(file=str(keys))))

    async def switch(http: aiohttp.ClientSession, unit: str, role: str) -> int:
        body = {"unit": unit, "role": role}
        async with http.post("/admin/models/a/role", json=body, headers=admin) as response:
            return response.status

    async def scenario(endpoint: RealServer) -> str:
        async with aiohttp.ClientSession(endpoint.url) as http:
            for prompts, answers in (("decode", "prefill"), ("mixed", "mixed")):
                asked = [asyncio.create_task(ask(http, *key)) for key in wanted]
                await asyncio.sleep(0.01)
                assert await switch(http, "prompts", prompts) == 200
                assert await switch(http, "answers", answers) == 200
                asked += [asyncio.create_task(ask(http, *key)) for key in wanted]
                assert await asyncio.gather(*asked) == [*wanted.values()] * 2
            assert await switch(http, "nowhere", "mixed") == 400
            assert await switch(http, "prompts", "both") == 400
            admin.clear()
            assert await switch(http, "prompts", "prefill") == 401
            async with http.get("/metrics") as response:
                return await response.text()

    with real_server(config) as endpoint:
        text = asyncio.run(scenario(endpoint))
        endpoint.check_nothing_leaked()
    for unit, other in (("prompts", "prefill"), ("answers", "decode")):
        assert f'muxrt_role{{model="a",role="mixed",unit="{unit}"}} 1.0' in text
        assert f'muxrt_role{{model="b",role="{other}",unit="{unit}"}} 1.0' in text


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")
def test_units_of_different_tp_give_the_tokens_of_one_rank(
    ranks: tuple[int, int],
    whole: ServeConfig,
    wanted: dict[tuple[str, str], tuple[str, list[str]]],
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a core for each rank")
    apart = split(whole)
    units = tuple(
        msgspec.structs.replace(unit, mesh=Mesh(gpus=tuple(range(tp))))
        for unit, tp in zip(apart.units, ranks, strict=True)
    )
    with real_server(msgspec.structs.replace(apart, units=units)) as endpoint:
        assert asyncio.run(answers(endpoint)) == wanted
        endpoint.check_nothing_leaked()
        stats = endpoint.server.supervisor.units["answers"].stats
        assert stats is not None and [one.prompt_tokens for one in stats.models] == [0, 0]


@pytest.mark.parametrize("transfer", ["nixl", "gloo"])
def test_pieces_move_by_other_roads_too(
    transfer: str, whole: ServeConfig, wanted: dict[tuple[str, str], tuple[str, list[str]]]
) -> None:
    if transfer == "nixl":
        pytest.importorskip("nixl")

    async def ask_long(endpoint: RealServer) -> tuple[str, list[str]] | int:
        async with aiohttp.ClientSession(endpoint.url) as http:
            return await ask(http, "a", PROMPTS[2])

    apart = split(whole)
    units = tuple(msgspec.structs.replace(unit, transfer=transfer) for unit in apart.units)
    with real_server(msgspec.structs.replace(apart, units=units)) as endpoint:
        assert asyncio.run(ask_long(endpoint)) == wanted["a", PROMPTS[2]]
        endpoint.check_nothing_leaked()
        stats = endpoint.server.supervisor.units["answers"].stats
        assert stats is not None and stats.models[0].prompt_tokens == 0
