"""A served unit of two ranks on devices, with the CPU in their place; ranks that are lost."""

import os
import signal
from collections.abc import Iterator
from urllib.request import Request, urlopen

import msgspec
import pytest
from real_server import RealServer, real_config, real_server
from test_server_faults import is_running, wait_until
from test_worker_process import children

from muxrt.config.placement import Lanes, Mesh
from muxrt.engine.messages import UnitBoot
from muxrt.server.unit_process import Process, _spawn, spawn

TIMEOUT_S = 2.0  # what it takes to find that a rank stands still


async def spawn_either(boot: UnitBoot) -> Process:
    """On devices that are not there, or on cores that are."""
    return await (_spawn(boot, "tests.played_unit") if boot.unit.mesh.tp > 1 else spawn(boot))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """One model twice: as `a` on two devices, as `b` on cores."""
    config = real_config(tmp_path_factory.mktemp("models"), {"cut": ["a"], "whole": ["b"]})
    first = msgspec.structs.replace(config.models[0], dtype="float32")
    cut, whole = config.units
    cut = msgspec.structs.replace(
        cut,
        mesh=Mesh(device="gpu", gpus=(0, 1), timeout_s=TIMEOUT_S),
        lanes=Lanes(kind="stream", sm_pct=(60, 40)),
    )
    models = (first, msgspec.structs.replace(first, name="b"))
    config = msgspec.structs.replace(config, models=models, units=(cut, whole))
    with real_server(config, spawn_either) as server:
        yield server


def say(endpoint: RealServer, model: str) -> str:
    body = {"model": model, "prompt": "the quick", "max_tokens": 30, "temperature": 0}
    data = msgspec.json.encode(body | {"ignore_eos": True})
    asked = Request(f"{endpoint.url}/v1/completions", data, {"Content-Type": "application/json"})
    with urlopen(asked) as answer:
        text: str = msgspec.json.decode(answer.read())["choices"][0]["text"]
    return text


@pytest.mark.parametrize("sign", [None, signal.SIGKILL, signal.SIGSTOP])
def test_it_says_what_cores_say_also_when_it_had_to_start_anew(
    endpoint: RealServer, sign: signal.Signals | None
) -> None:
    unit = endpoint.server.supervisor.units["cut"]
    if sign is not None:
        restarts, first = unit.num_restarts, endpoint.pid("cut")
        (other,) = children(first)
        os.kill(other, sign)
        wait_until(lambda: unit.num_restarts == restarts + 1)
        assert unit.error is not None and "the unit's mesh is broken" in unit.error
        wait_until(lambda: not is_running(first) and not is_running(other))
        wait_until(lambda: unit.is_ready)
    assert len(children(endpoint.pid("cut"))) == 1
    assert say(endpoint, "a") == say(endpoint, "b")
    endpoint.check_nothing_leaked()
