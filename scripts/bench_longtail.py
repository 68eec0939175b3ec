"""A long tail of models in too little memory: time to first token, three ways of living with it.

    python scripts/bench_longtail.py --out docs/benchmarks

`sleep`: one unit whose weights come and go (memory.weight_bytes). `loaded`: one unit with all of
them in memory, which is what it would take. `swap`: a unit process per model, started when somebody
asks for it, after the least recently used one was ended. All three serve the same requests: models
by Zipf's law, Poisson arrivals, through the real endpoint with real unit processes. The models are
one preset under many names, each with its own copy of the weights.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import aiohttp
import typer
from bench_models import preset_folders
from bench_record import FOLDER, provenance
from process_memory import tree_memory

from muxrt.config.model import load_shape
from muxrt.config.placement import MIB, Memory, ModelSpec, Scheduling, UnitModel, UnitSpec
from muxrt.config.serve import Endpoint, ServeConfig
from muxrt.engine.build import weight_bytes
from muxrt.metrics import percentile
from muxrt.server.app import Server

KV_BYTES = 256 * MIB
MAX_MODEL_LEN = 512
RETRIES = 50
SETTLE_S = 3.0  # for the last pages of the start to be given back


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the load."""

    at_s: float
    model: str
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of it; None = no token came."""

    model: str
    ttft_s: float | None


def draw(names: Sequence[str], rate_rps: float, duration_s: float, seed: int) -> list[Asked]:
    """Poisson arrivals; the model of rank r with weight 1 / r."""
    random, asked, at_s = Random(seed), [], 0.0
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    while (at_s := at_s + random.expovariate(rate_rps)) < duration_s:
        prompt = [random.randrange(3, 2000) for _ in range(random.randint(16, 128))]
        model = random.choices(names, weights)[0]
        asked.append(Asked(at_s, model, prompt, random.randint(8, 32)))
    return asked


class Swapper:
    """At most so many units at a time, one per model, started when they are needed."""

    def __init__(self, server: Server, units: dict[str, UnitSpec], limit: int) -> None:
        self._server, self._units, self._limit = server, units, limit
        self._models = {spec.name: spec for spec in server.config.models}
        self._used_s = dict.fromkeys(server.supervisor.units, 0.0)
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self.num_started = 0

    async def ready(self, model: str) -> None:
        """Return when the model's unit answers."""
        self._used_s[model] = time.monotonic()
        if self._is_up(model):
            return
        if model not in self._starting:  # all that wait for it wait for the same start
            self._starting[model] = asyncio.create_task(self._start(model))
        await self._starting[model]

    async def _start(self, model: str) -> None:
        async with self._turn:
            supervisor = self._server.supervisor
            while len(supervisor.units) >= self._limit:
                oldest = min(supervisor.units, key=lambda name: self._used_s[name])
                supervisor.units[oldest].is_routed = False
                await self._server.dispatcher.quiet(oldest)
                await supervisor.remove(oldest)
            await supervisor.add(self._units[model], (self._models[model],))
            supervisor.units[model].is_routed = True
            self._used_s[model] = time.monotonic()
            self.num_started += 1
            del self._starting[model]

    def _is_up(self, model: str) -> bool:
        unit = self._server.supervisor.units.get(model)
        return unit is not None and unit.is_ready and unit.is_routed


async def ask(
    http: aiohttp.ClientSession, one: Asked, begun_s: float, ready: Callable[[str], Awaitable[None]]
) -> Seen:
    """Send it when it is time; the time to its first token counts from then."""
    await asyncio.sleep(max(0.0, begun_s + one.at_s - time.monotonic()))
    due_s = time.monotonic()
    body = {
        "model": one.model,
        "prompt": one.prompt,
        "max_tokens": one.max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    for _ in range(RETRIES):  # before it is there, the swap baseline may have ended its unit
        await ready(one.model)
        async with http.post("/v1/completions", json=body) as response:
            if response.status != 200:
                continue
            first_s = None
            async for line in response.content:
                if first_s is None and line.startswith(b"data: {"):
                    first_s = time.monotonic()
            return Seen(one.model, None if first_s is None else first_s - due_s)
    return Seen(one.model, None)


@asynccontextmanager
async def serving(config: ServeConfig) -> Any:
    server = Server(config)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


async def run(config: ServeConfig, asked: list[Asked], swap: dict[str, UnitSpec] | None) -> Any:
    """The figures of one way."""
    limit = len(config.units)
    async with serving(config) as server:
        swapper = Swapper(server, swap, limit) if swap else None

        async def at_once(model: str) -> None:
            """Its unit is there."""

        await asyncio.sleep(SETTLE_S)
        pids = [unit.process.pid for unit in server.supervisor.units.values()]
        memory = tree_memory(pids)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            server.url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout
        ) as http:
            ready = swapper.ready if swapper else at_once
            begun_s = time.monotonic()
            seen = await asyncio.gather(*(ask(http, one, begun_s, ready) for one in asked))
            took_s = time.monotonic() - begun_s
        await asyncio.sleep(SETTLE_S)
        stats = [unit.stats for unit in server.supervisor.units.values() if unit.stats]
        moves = sum(model.moves for unit in stats for model in unit.models)
        pids = [unit.process.pid for unit in server.supervisor.units.values()]
        after = tree_memory(pids)
    ttfts = sorted(one.ttft_s for one in seen if one.ttft_s is not None)
    return {
        "requests": len(seen),
        "failed": len(seen) - len(ttfts),
        "ttft_ms": {
            f"p{share}": round(1e3 * (percentile(ttfts, share) or 0.0), 1) for share in (50, 90, 99)
        },
        "wakes": swapper.num_started if swapper else moves // 2,
        "unit_pss_mb": {
            "start": round(memory.pss_bytes / 1e6),
            "end": round(after.pss_bytes / 1e6),
        },
        "took_s": round(took_s, 1),
    }


def configs(
    folder: Path, names: Sequence[str], awake: int
) -> tuple[dict[str, ServeConfig], dict[str, UnitSpec]]:
    """The three ways by name; and a unit per model for the third."""
    models = tuple(
        ModelSpec(
            name=name,
            path=str(folder),
            max_model_len=MAX_MODEL_LEN,
            max_queue=10_000,
            min_residency_s=0.5,
            wake_timeout_s=120.0,
        )
        for name in names
    )
    size = weight_bytes(models[0], load_shape(folder))
    scheduling = Scheduling(max_sequences=32)

    def unit(name: str, holds: Sequence[str], memory: Memory) -> UnitSpec:
        parts = tuple(UnitModel(name=model) for model in holds)
        return UnitSpec(name=name, models=parts, memory=memory, scheduling=scheduling)

    def config(units: tuple[UnitSpec, ...]) -> ServeConfig:
        return ServeConfig(models=models, units=units, endpoint=Endpoint(port=0))

    budget = int(awake * size * 1.02)  # padding and scales
    each = Memory(kv_bytes=KV_BYTES // awake)
    single = {name: unit(name, [name], each) for name in names}
    return {
        "sleep": config((unit("tail", names, Memory(kv_bytes=KV_BYTES, weight_bytes=budget)),)),
        "loaded": config((unit("tail", names, Memory(kv_bytes=KV_BYTES)),)),
        "swap": config(tuple(single[name] for name in names[:awake])),
    }, single


def main(
    out: Annotated[Path, typer.Option(help="Folder for longtail.json.")] = FOLDER,
    preset: Annotated[str, typer.Option(help="Of every model.")] = "27m",
    models: Annotated[int, typer.Option(min=2)] = 20,
    awake: Annotated[int, typer.Option(min=1, help="That fit into the memory.")] = 6,
    rate_rps: Annotated[float, typer.Option(min=0.01)] = 2.0,
    duration_s: Annotated[float, typer.Option(min=1)] = 60.0,
    seed: int = 0,
    ways: Annotated[list[str], typer.Option(help="Which to run.")] = ["sleep", "loaded", "swap"],  # noqa: B006
) -> None:
    """Serve the same load three ways and write longtail.json."""
    logging.basicConfig(level="ERROR")
    folder = preset_folders([preset])[0]
    names = [f"tail-{number:02}" for number in range(1, models + 1)]
    by_way, single = configs(folder, names, awake)
    asked = draw(names, rate_rps, duration_s, seed)
    settings = {
        "preset": preset,
        "models": models,
        "awake": awake,
        "rate_rps": rate_rps,
        "duration_s": duration_s,
        "seed": seed,
    }
    data = {**provenance(), "settings": settings, "ways": {}}
    out.mkdir(parents=True, exist_ok=True)
    for way in ways:
        found = asyncio.run(run(by_way[way], asked, single if way == "swap" else None))
        data["ways"][way] = found
        print(way, json.dumps(found), flush=True)
        (out / "longtail.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
