"""A server of either kind while it serves: where, by which processes, after how long."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec

from muxrt.cli.endpoint import ready_endpoint
from muxrt.config.placement import Lanes, Memory, ModelSpec, Scheduling, UnitModel, UnitSpec
from muxrt.config.serve import Endpoint, ServeConfig

ANSWER_S = 60.0  # for one token of one model


@dataclass(frozen=True, slots=True)
class Serving:
    """Every model of it has answered once."""

    urls: tuple[str, ...]
    pids: tuple[int, ...]
    ready_s: float  # from the start of its processes until then


def one_unit(
    folders: Sequence[Path],
    weights: Sequence[float],
    memory: Memory,
    lanes: Lanes,
    scheduling: Scheduling,
    **options: object,
) -> ServeConfig:
    """An endpoint with all models in one unit; `weights` of their traffic, `options` of each."""
    models = [
        {"name": folder.name, "path": str(folder), "dtype": "float32", "rate_rps": part, **options}
        for folder, part in zip(folders, shares_of(weights), strict=True)
    ]
    unit = UnitSpec(
        name="main",
        models=tuple(UnitModel(name=folder.name) for folder in folders),
        memory=memory,
        lanes=lanes,
        scheduling=scheduling,
    )
    specs = msgspec.convert(models, tuple[ModelSpec, ...])
    return ServeConfig(models=specs, units=(unit,), endpoint=Endpoint(port=0, drain_s=1.0))


@contextmanager
def muxrt_serving(config: ServeConfig) -> Iterator[Serving]:
    """`muxrt serve` with `config` inside the block; nothing of it is left after it."""
    begun_s = time.monotonic()
    with ready_endpoint(config) as endpoint:
        ask_each({model.name: endpoint.url for model in config.models})
        ready_s = time.monotonic() - begun_s
        yield Serving((endpoint.url,), (endpoint.process.pid,), ready_s)


def ask_each(urls: Mapping[str, str]) -> None:
    """One token of each model from its server. Raises where one does not answer."""
    for model, url in urls.items():
        asked = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        request = Request(f"{url}/v1/completions", json.dumps(asked).encode(), headers)
        with urlopen(request, timeout=ANSWER_S) as response:
            json.load(response)


def shares_of(rates: Sequence[float]) -> list[float]:
    """`rates` as parts of one."""
    return [rate / sum(rates) for rate in rates]
