"""Models that sleep and wake in real unit processes: right answers, states, admin keys."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import pytest
from real_server import RealServer, real_config, real_server

from muxrt.config.placement import Lanes
from muxrt.config.serve import Admin, ApiKeys, ServeConfig

ADMIN_KEY = "only-for-administrators"
NAMES = ("a", "b", "c")
WAIT_S = 20.0


def sleepy_config(folder: Path, kind: str, weight_bytes: int | None) -> ServeConfig:
    """Three models, of which `weight_bytes` holds one or two; who may change that has a key."""
    keys = folder / "admin.keys"
    keys.parent.mkdir(parents=True, exist_ok=True)
    keys.write_text(ADMIN_KEY + "\n")
    config = real_config(folder, {"main": list(NAMES)})
    unit = config.units[0]
    replace = msgspec.structs.replace
    unit = replace(
        unit,
        memory=replace(unit.memory, weight_bytes=weight_bytes),
        lanes=Lanes(kind=kind, split=(1,)),  # type: ignore[arg-type]
    )
    models = tuple(replace(model, min_residency_s=0.0) for model in config.models)
    admin = Admin(keys=ApiKeys(file=str(keys)))
    return replace(config, models=models, units=(unit,), admin=admin)


def ask(url: str, path: str, body: Any = None, key: str | None = None, method: str = "") -> Any:
    """Status and body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = Request(url + path, data, headers, method=method or ("POST" if data else "GET"))
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def complete(url: str, model: str) -> str:
    body = {"model": model, "prompt": "the quick brown", "max_tokens": 12, "temperature": 0}
    status, answer = ask(url, "/v1/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def states(url: str) -> dict[str, str]:
    _, answer = ask(url, "/admin/models", key=ADMIN_KEY)
    return {model["name"]: model["units"]["main"] for model in answer["models"]}


def wait_for(url: str, model: str, state: str) -> None:
    until_s = time.monotonic() + WAIT_S
    while states(url)[model] != state:
        assert time.monotonic() < until_s, states(url)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def awake_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the models say when none ever sleeps."""
    config = sleepy_config(tmp_path_factory.mktemp("awake"), "cores", None)
    with real_server(config) as server:
        return {name: complete(server.url, name) for name in NAMES}


@pytest.fixture(scope="module", params=["cores", "processes"])
def endpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("sleepy")
    with real_server(sleepy_config(folder, request.param, 150_000)) as server:
        yield server


def test_models_that_were_asleep_answer_as_if_they_had_been_awake(
    endpoint: RealServer, awake_answers: dict[str, str]
) -> None:
    for _ in range(3):
        assert {name: complete(endpoint.url, name) for name in NAMES} == awake_answers
    woken = [m.moves for m in (endpoint.server.supervisor.units["main"].stats or _none()).models]
    assert sum(woken) >= 6
    endpoint.check_nothing_leaked()


def _none() -> Any:
    raise AssertionError("the unit reported nothing")


def test_orders_of_administrators_are_obeyed(endpoint: RealServer) -> None:
    complete(endpoint.url, "a")
    assert ask(endpoint.url, "/admin/models/a/sleep", {}, ADMIN_KEY)[0] == 202
    wait_for(endpoint.url, "a", "asleep")
    assert ask(endpoint.url, "/admin/models/a/wake", {}, ADMIN_KEY)[0] == 202
    wait_for(endpoint.url, "a", "awake")


@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_the_key_nobody_gets_in(endpoint: RealServer, key: str | None) -> None:
    assert ask(endpoint.url, "/admin/units", key=key)[0] == 401
    assert ask(endpoint.url, "/admin/models/a/sleep", {}, key)[0] == 401


def test_what_is_not_there_is_said(endpoint: RealServer) -> None:
    status, answer = ask(endpoint.url, "/admin/models/nobody/sleep", {}, ADMIN_KEY)
    assert status == 404 and "nobody" in answer["error"]["message"]
    status, answer = ask(endpoint.url, "/admin/models/a/sleep?unit=other", {}, ADMIN_KEY)
    assert status == 409 and "other" in answer["error"]["message"]


def test_a_deleted_model_leaves_a_unit_that_goes_on(
    tmp_path: Path, awake_answers: dict[str, str]
) -> None:
    """Pinned or not: its memory is the others'."""
    config = sleepy_config(tmp_path, "cores", 150_000)
    pinned = tuple(msgspec.structs.replace(model, pin=model.name == "a") for model in config.models)
    with real_server(msgspec.structs.replace(config, models=pinned)) as server:
        unit, pid = server.server.supervisor.units["main"], server.pid("main")
        assert complete(server.url, "a") == awake_answers["a"]
        path = "/admin/models/a"
        assert ask(server.url, path, {}, ADMIN_KEY, "DELETE")[0] == 200
        for _ in range(2):
            for name in ("b", "c"):
                assert complete(server.url, name) == awake_answers[name]
        assert ask(server.url, "/v1/completions", {"model": "a", "prompt": "x"})[0] == 404
        until_s = time.monotonic() + WAIT_S
        while {m.model: m.state for m in (unit.stats or _none()).models}["a"] != "asleep":
            assert time.monotonic() < until_s
            time.sleep(0.02)
        assert server.pid("main") == pid and list(server.server.supervisor.units) == ["main"]


def test_who_waits_for_anothers_residency_wakes_when_that_is_over(
    tmp_path: Path, awake_answers: dict[str, str]
) -> None:
    """The moment came and went between a look at the clock and the next: nobody was told."""
    config = sleepy_config(tmp_path, "cores", 150_000)
    hasty = {"min_residency_s": 0.2, "wake_timeout_s": 5.0}
    models = tuple(msgspec.structs.replace(model, **hasty) for model in config.models)
    with real_server(msgspec.structs.replace(config, models=models)) as server:
        for _ in range(3):
            assert {name: complete(server.url, name) for name in NAMES} == awake_answers
