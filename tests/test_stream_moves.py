"""Long streams go from a unit process that ends to the one that replaces it, token for token."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest
from real_server import RealServer, real_config, real_server

pytest.importorskip("torch")

from muxrt.config.placement import ModelSpec, UnitSpec
from muxrt.config.serve import Admin, ApiKeys, ServeConfig

KEY = "only-for-administrators"
LENGTH = 1500  # tokens of an answer: it runs for a while
STREAMS = 4
WAIT_S = 120.0
TIE = 0.01  # of logprobs: nearer ones may change places by rounding


def long_config(home: Path) -> ServeConfig:
    """A tiny model of 2,048 positions, and somebody who may move it."""
    config = real_config(home, {"main": ["a"]}, kv_bytes=8 << 20)
    path = home / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 2048}))
    keys = home / "admin.keys"
    keys.write_text(KEY)
    return msgspec.structs.replace(config, admin=Admin(keys=ApiKeys(file=str(keys))))


class Token(NamedTuple):
    """One of an answer, with the logprobs of the two most probable ones in its place."""

    text: str
    top: dict[str, float]


async def stream(
    http: aiohttp.ClientSession, number: int, begun: asyncio.Event | None = None
) -> list[Token]:
    """The most probable answer to a prompt, as it comes."""
    tokens: list[Token] = []
    prompt = "the quick brown fox jumps over the lazy dog"[number:]
    body = {"model": "a", "prompt": prompt, "max_tokens": LENGTH, "stream": True}
    body |= {"temperature": 0.0, "logprobs": 2, "ignore_eos": True}
    async with http.post("/v1/completions", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            answer = json.loads(line[6:])
            assert "error" not in answer, answer
            for choice in answer["choices"]:
                found = choice["logprobs"] or {"tokens": [], "top_logprobs": []}
                tokens += map(Token, found["tokens"], found["top_logprobs"])
            if begun is not None and len(tokens) > 10:
                begun.set()
    return tokens


def assert_same(before: list[Token], after: list[Token]) -> None:
    """The same tokens; where a prompt of other length turns a tie, the same up to there."""
    for one, other in zip(before, after, strict=True):
        if one.text != other.text:
            assert one.top.keys() >= {one.text, other.text}
            assert one.top[one.text] - one.top[other.text] < TIE
            return


class Switch:
    """Holds a change back between the load of the new unit and its switch."""

    def __init__(self, endpoint: RealServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_loaded, self.go = threading.Event(), threading.Event()
        self.moved: list[int] = []
        supervisor, dispatcher = endpoint.server.supervisor, endpoint.server.dispatcher
        add, move = supervisor.add, dispatcher.move

        async def held(spec: UnitSpec, models: tuple[ModelSpec, ...]) -> None:
            await add(spec, models)
            self.is_loaded.set()
            assert await asyncio.to_thread(self.go.wait, WAIT_S)

        def counted(unit: str) -> int:
            self.moved.append(move(unit))
            return self.moved[-1]

        monkeypatch.setattr(supervisor, "add", held)
        monkeypatch.setattr(dispatcher, "move", counted)


def test_long_streams_go_on_in_the_new_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = long_config(tmp_path)

    async def scenario(endpoint: RealServer, switch: Switch) -> tuple[list[Any], list[Any], int]:
        async with aiohttp.ClientSession(endpoint.url) as http:
            wanted = [await stream(http, seed) for seed in range(STREAMS)]
            (unit,) = config.units
            smaller = msgspec.structs.replace(unit.memory, swap_bytes=0)
            body = {"units": [msgspec.structs.replace(unit, memory=smaller)]}
            change = asyncio.create_task(
                http.post(
                    "/admin/placement?streams=move",
                    data=msgspec.json.encode(body),
                    headers={"Authorization": f"Bearer {KEY}"},
                )
            )
            assert await asyncio.to_thread(switch.is_loaded.wait, WAIT_S)
            begun = [asyncio.Event() for _ in range(STREAMS)]
            streams = [
                asyncio.create_task(stream(http, seed, begun[seed])) for seed in range(STREAMS)
            ]
            for each in begun:
                await each.wait()
            switch.go.set()
            status = (await change).status
            return wanted, [await each for each in streams], status

    with real_server(config) as endpoint:
        old = endpoint.pid("main")
        switch = Switch(endpoint, monkeypatch)
        wanted, found, status = asyncio.run(scenario(endpoint, switch))
        assert status == 200
        assert switch.moved and switch.moved[0] > 0
        assert [len(tokens) for tokens in found] == [LENGTH] * STREAMS
        for before, after in zip(wanted, found, strict=True):
            assert_same(before, after)
        assert endpoint.server.deployer is not None
        endpoint.run(endpoint.server.deployer.wait)
        assert sorted(endpoint.server.supervisor.units) == ["main.2"]
        assert endpoint.pid("main.2") != old
        endpoint.check_nothing_leaked()
