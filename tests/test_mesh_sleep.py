"""Models over two ranks sleep and wake on both, in real processes."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from real_server import RealServer, real_server
from test_server_sleep import ADMIN_KEY, NAMES, ask, complete, sleepy_config, states, wait_for
from test_worker_process import children

from muxrt.config.placement import Mesh
from muxrt.config.serve import ServeConfig

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")


def over_two_ranks(config: ServeConfig) -> ServeConfig:
    mesh = Mesh(gpus=(0, 1), timeout_s=10.0)
    units = tuple(msgspec.structs.replace(unit, mesh=mesh) for unit in config.units)
    return msgspec.structs.replace(config, units=units)


@pytest.fixture(scope="module")
def awake_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the models say over two ranks when none ever sleeps."""
    config = sleepy_config(tmp_path_factory.mktemp("awake"), "cores", None)
    with real_server(over_two_ranks(config)) as server:
        return {name: complete(server.url, name) for name in NAMES}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("sleepy")
    with real_server(over_two_ranks(sleepy_config(folder, "cores", 400_000))) as server:
        yield server


def test_models_wake_on_both_ranks(endpoint: RealServer, awake_answers: dict[str, str]) -> None:
    for _ in range(3):
        assert {name: complete(endpoint.url, name) for name in NAMES} == awake_answers
    stats = endpoint.server.supervisor.units["main"].stats
    assert stats is not None and sum(model.moves for model in stats.models) >= 6
    endpoint.check_nothing_leaked()


def test_a_model_that_cannot_wake_on_one_rank_takes_nobody_with_it(
    endpoint: RealServer, awake_answers: dict[str, str]
) -> None:
    """The last model's weights are lost on the second rank: its copies are files without names."""
    (rank,) = children(endpoint.pid("main"))
    lost = NAMES[-1]
    assert ask(endpoint.url, f"/admin/models/{lost}/sleep", {}, ADMIN_KEY)[0] == 202
    wait_for(endpoint.url, lost, "asleep")
    copies = sorted(
        (number for number in os.listdir(f"/proc/{rank}/fd") if is_copy(rank, number)), key=int
    )
    assert len(copies) == len(NAMES)
    os.truncate(f"/proc/{rank}/fd/{copies[-1]}", 0)
    body = {"model": lost, "prompt": "the quick brown", "max_tokens": 4}
    status, answer = ask(endpoint.url, "/v1/completions", body)
    assert status == 503 and "cannot wake" in answer["error"]["message"]
    assert states(endpoint.url)[lost] == "asleep"
    for name in NAMES[:-1]:
        assert complete(endpoint.url, name) == awake_answers[name]
    assert children(endpoint.pid("main")) == [rank]


def is_copy(pid: int, number: str) -> bool:
    return "muxrt-weights-" in str(Path(f"/proc/{pid}/fd/{number}").readlink())
