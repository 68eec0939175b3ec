"""A server with real unit processes, on a thread of its own, for tests that speak plain HTTP."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import uvloop
from tiny_folder import write_model

from muxrt.config.placement import MIB, Memory, Mesh, ModelSpec, Scheduling, UnitModel, UnitSpec
from muxrt.config.serve import ApiKeys, Endpoint, ServeConfig
from muxrt.server.app import Server
from muxrt.server.unit_process import Spawn, spawn

T = TypeVar("T")
START_S = 180.0  # a first start compiles


def real_config(
    folder: Path,
    units: dict[str, list[str]],
    *,
    api_keys: ApiKeys | None = None,
    kv_bytes: int = MIB,
    max_queue: int = 256,
    drain_s: float = 30.0,
    has_weights: bool = True,
) -> ServeConfig:
    """Tiny models with random weights; each model has its own."""
    names = [name for models in units.values() for name in models]
    paths = {n: write_model(folder / n, i, has_weights=has_weights) for i, n in enumerate(names)}
    return ServeConfig(
        models=tuple(
            ModelSpec(name=name, path=str(path), max_queue=max_queue)
            for name, path in paths.items()
        ),
        units=tuple(
            UnitSpec(
                name=unit,
                models=tuple(UnitModel(name=name) for name in models),
                memory=Memory(kv_bytes=kv_bytes, swap_bytes=kv_bytes),
                mesh=Mesh(),
                scheduling=Scheduling(prefill_tokens=64),
            )
            for unit, models in units.items()
        ),
        endpoint=Endpoint(port=0, api_keys=api_keys, drain_s=drain_s),
    )


class RealServer:
    """The server, and a way to run things on its loop."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self._loop = loop

    @property
    def url(self) -> str:
        return self.server.url

    def pid(self, unit: str) -> int:
        process = self.server.supervisor.units[unit].process
        assert process is not None
        return process.pid

    def run(self, work: Callable[[], Awaitable[T]], timeout_s: float = START_S) -> T:
        async def go() -> T:
            return await work()

        return asyncio.run_coroutine_threadsafe(go(), self._loop).result(timeout_s)

    def check_nothing_leaked(self, timeout_s: float = 10.0) -> None:
        """Nothing is live here, and within a report or two no unit holds a block."""

        async def settle() -> None:
            async with asyncio.timeout(timeout_s):
                while self.blocks_used() or len(self.server.dispatcher.ledger):
                    await asyncio.sleep(0.02)
            assert self.server.dispatcher.check()

        self.run(settle)

    def blocks_used(self) -> int:
        """Of all units, by their last reports; a unit that never worked has not reported."""
        stats = [unit.stats for unit in self.server.supervisor.units.values()]
        models = [model for unit in stats if unit is not None for model in unit.models]
        return sum(model.blocks_used for model in models)


@contextmanager
def real_server(config: ServeConfig, spawn: Spawn = spawn) -> Iterator[RealServer]:
    """Started and ready inside the block; all its processes are gone after it."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make() -> Server:
        return Server(config, spawn=spawn)

    server = asyncio.run_coroutine_threadsafe(make(), loop).result()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(START_S)
        yield RealServer(server, loop)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(START_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
