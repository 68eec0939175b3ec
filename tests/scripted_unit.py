"""A unit process played by a test: it speaks the messages and does what the test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import msgspec
import zmq
import zmq.asyncio
from tiny_folder import write_model

from muxrt.config.placement import Memory, ModelSpec, UnitModel, UnitSpec
from muxrt.config.serve import Endpoint, ServeConfig
from muxrt.core import FinishReason, Output, Prompt, Request, TokenLogprobs
from muxrt.engine.messages import (
    Abort,
    Drain,
    Failed,
    Forget,
    FromUnit,
    ModelReady,
    Ready,
    Step,
    Stopped,
    Submit,
    ToUnit,
    UnitBoot,
)
from muxrt.server.app import Server

BLOCK_TOKENS, MAX_LEN = 4, 64
WAIT_S = 10.0

P = ParamSpec("P")


class ScriptedUnit:
    """One generation. The test awaits what it is told and says what it answers."""

    def __init__(self, boot: UnitBoot, pid: int) -> None:
        self.boot = boot
        self.pid = pid
        self.requests: asyncio.Queue[Request] = asyncio.Queue()
        self.aborts: asyncio.Queue[int] = asyncio.Queue()
        self.drains: asyncio.Queue[Drain] = asyncio.Queue()
        self.forgets: asyncio.Queue[str] = asyncio.Queue()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.identity = boot.identity.encode()
        self._socket.connect(boot.endpoint)
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._listen())

    # -- the process, as the supervisor sees it

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def kill(self) -> None:
        self.die(-9)

    def die(self, code: int) -> None:
        """End, without a word unless one was said before."""
        if not self._exit.done():
            self._exit.set_result(code)
            self._task.cancel()
            self._context.destroy(linger=1000 if code >= 0 else 0)

    # -- what it says

    async def say(self, message: FromUnit) -> None:
        await self.send_raw(msgspec.msgpack.encode(message))

    async def send_raw(self, data: bytes) -> None:
        await self._socket.send(data)

    async def ready(self, max_len: int = MAX_LEN) -> None:
        models = tuple(
            ModelReady(model.name, BLOCK_TOKENS, max_len, 8, 1) for model in self.boot.models
        )
        await self.say(Ready(self.boot.unit.name, self.pid, models, 16, 4096))

    async def fail(self, why: str) -> None:
        await self.say(Failed(self.boot.unit.name, why))
        self.die(1)

    async def step(
        self,
        request: Request,
        tokens: Sequence[int] = (),
        finish: FinishReason | None = None,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        cached_tokens: int = 0,
    ) -> None:
        output = Output(request.id, tuple(tokens), finish, logprobs, cached_tokens=cached_tokens)
        await self.say(Step((output,)))

    # -- what it hears

    async def request(self) -> Request:
        return await asyncio.wait_for(self.requests.get(), WAIT_S)

    async def abort(self) -> int:
        return await asyncio.wait_for(self.aborts.get(), WAIT_S)

    async def forget(self) -> str:
        return await asyncio.wait_for(self.forgets.get(), WAIT_S)

    async def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder[ToUnit](ToUnit)
        while True:
            match decoder.decode(await self._socket.recv()):
                case Submit(request):
                    self.requests.put_nowait(request)
                case Abort(request_id):
                    self.aborts.put_nowait(request_id)
                case Forget(model):
                    self.forgets.put_nowait(model)
                case Drain() as drain:
                    self.drains.put_nowait(drain)
                    await self.say(Stopped(self.boot.unit.name))
                    asyncio.get_running_loop().call_soon(self.die, 0)


class Troupe:
    """Spawns scripted units; each generation of each unit can be awaited."""

    def __init__(self) -> None:
        self._started: dict[str, asyncio.Queue[ScriptedUnit]] = {}
        self._num_started = 0

    async def spawn(self, boot: UnitBoot) -> ScriptedUnit:
        self._num_started += 1
        unit = ScriptedUnit(boot, self._num_started)
        self._queue(boot.unit.name).put_nowait(unit)
        return unit

    async def next(self, unit: str = "main") -> ScriptedUnit:
        """The next process that is started for `unit`."""
        return await asyncio.wait_for(self._queue(unit).get(), WAIT_S)

    def _queue(self, unit: str) -> asyncio.Queue[ScriptedUnit]:
        return self._started.setdefault(unit, asyncio.Queue())


def prompt_of(request: Request) -> Prompt:
    return msgspec.msgpack.decode(request.payload, type=Prompt)


def make_config(
    folder: Path,
    units: dict[str, list[str]] | None = None,
    *,
    max_queue: int = 256,
    queue_timeout_s: float | None = None,
    endpoint: Endpoint | None = None,
) -> ServeConfig:
    """`units` maps units to models; by default one unit `main` with the model `tiny`."""
    units = units or {"main": ["tiny"]}
    names = dict.fromkeys(name for models in units.values() for name in models)
    return ServeConfig(
        models=tuple(
            ModelSpec(
                name=name,
                path=str(folder),
                max_queue=max_queue,
                queue_timeout_s=queue_timeout_s,
            )
            for name in names
        ),
        units=tuple(
            UnitSpec(
                name=unit,
                models=tuple(UnitModel(name=name) for name in models),
                memory=Memory(kv_bytes=1 << 20),
            )
            for unit, models in units.items()
        ),
        endpoint=endpoint or Endpoint(port=0, drain_s=WAIT_S),
    )


def on_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """An async test as pytest runs tests; each gets an event loop of its own."""

    @wraps(test)
    def run(*arguments: P.args, **fixtures: P.kwargs) -> None:
        async def go() -> None:
            await test(*arguments, **fixtures)

        asyncio.run(go())

    return run


@dataclass
class Stage:
    """A server whose units are played."""

    server: Server
    troupe: Troupe
    units: dict[str, ScriptedUnit]

    @property
    def unit(self) -> ScriptedUnit:
        return self.units["main"]


@asynccontextmanager
async def serving(config: ServeConfig, **options: Any) -> AsyncIterator[Stage]:
    """All units are ready inside the block; its end finds nothing live."""
    troupe = Troupe()
    server = Server(config, spawn=troupe.spawn, **options)
    starting = asyncio.create_task(server.start())
    units = {unit.name: await troupe.next(unit.name) for unit in config.units}
    for unit in units.values():
        await unit.ready()
    try:
        await starting
        yield Stage(server, troupe, units)
        assert server.dispatcher.check()
        assert not len(server.dispatcher.ledger)
    finally:
        await server.stop()


def write_words(folder: Path) -> Path:
    """What the API process reads of a model: no weights."""
    return write_model(folder, has_weights=False)
