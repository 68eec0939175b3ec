"""`muxrt replan --apply`: a running server gets the placement that its traffic asks for."""

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import time

import msgspec
import pytest
from command_line import CommandLine
from real_server import RealServer, real_server
from test_plan_cpu import PLAN, complete, write

from muxrt.config.load import load
from muxrt.config.serve import Admin, ApiKeys, Endpoint
from muxrt.server.traffic_files import Entry, add_history

KEY = "only-for-administrators"
ENGINE = "engine: {runtime_bytes: 1000000, activation_bytes: 1000000}\n"
EVEN = """\
models: [{name: hot, rate_rps: 0.1}, {name: cold, rate_rps: 0.1}]
prompt: {mean_tokens: 40}
output: {mean_tokens: 20}
slo: {ttft_s: 20, tpot_s: 2}
"""
# The made-up steps are quick: with these ratios a request in some seconds fills a core, and a log
# of hours stays small.
SLOW = "in_service: [{model: tiny, prefill: 300, decode: 300}]\n"

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two sets of cores")


@dataclass
class World:
    """A server with a model on each of two cores, and a log that says that one is not enough."""

    server: RealServer
    home: Path

    def replan(self, muxrt: CommandLine, key: str = KEY, url: str | None = None) -> tuple[int, str]:
        """Exit status, and all that was said."""
        words = ["--traffic", self.home / "log", "--plan", self.home / "plan.yaml"]
        less = ["--least-history", 1, "--window", 2, "--scenarios", 1]
        where = ["--apply", url or self.server.url, "--admin-key", key]
        answer = muxrt("replan", self.home / "serve.yaml", *words, *less, *where)
        return answer.code, answer.out + answer.err

    def homes(self, model: str) -> list[str]:
        """Units that new requests for `model` go to."""
        units = self.server.server.supervisor.units.values()
        return [u.name for u in units if u.is_routed for p in u.spec.models if p.name == model]


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def prepare(muxrt: CommandLine, home: Path) -> None:
    """Files of a plan for two cores, what it gives at even rates, and a log of another day."""
    plan = write(home, 1, PLAN.replace("gpus: 1", "gpus: 2") + ENGINE)
    profile = home / "profile.yaml"
    text = profile.read_text().replace(f"memory_bytes: {1 << 31}", "memory_bytes: 64MiB")
    profile.write_text(text + SLOW)
    (home / "traffic.yaml").write_text(EVEN)
    out = home / "serve.yaml"
    answer = muxrt("plan", plan, "--strategy", "spatial", "--out", out)
    assert answer.code == 0, answer.err
    rng, now_s = Random(0), time()
    rates = {"hot": 0.3, "cold": 0.02}
    add_history(
        home / "log",
        [
            Entry(now_s - 5400 * rng.random(), model, 40, 20, 1.0, 0.2, 200, "u", None, 1)
            for model, rate_rps in rates.items()
            for _ in range(round(5400 * rate_rps))
        ],
    )


def test_a_server_gets_what_its_traffic_asks_for(muxrt: CommandLine, tmp_path: Path) -> None:
    prepare(muxrt, tmp_path)
    keys = tmp_path / "admin.keys"
    keys.write_text(KEY)
    config = msgspec.structs.replace(
        load(tmp_path / "serve.yaml"),
        endpoint=Endpoint(port=0),
        admin=Admin(keys=ApiKeys(file=str(keys)), drain_s=5.0),
    )
    with real_server(config) as server:
        world = World(server, tmp_path)
        assert len(world.homes("hot")) == len(world.homes("cold")) == 1
        code, said = world.replan(muxrt, key="a-guess")
        assert code == 1 and ": 401: " in said
        assert len(world.homes("hot")) == 1
        code, said = world.replan(muxrt)
        assert code == 0 and said.startswith("change: ") and "serves the new placement" in said, (
            said
        )
        assert len(world.homes("hot")) == 2 and len(world.homes("cold")) >= 1
        for model in ("hot", "cold"):
            assert len(complete(server.url, model)["choices"]) == 1
        # The old placement is the server's, not the file's: what was changed is not changed again.
        code, said = world.replan(muxrt)
        assert code == 0 and said.startswith("stay: "), said
    code, said = world.replan(muxrt)
    assert code == 1 and "does not answer" in said


def test_a_server_of_other_models_is_refused(muxrt: CommandLine, tmp_path: Path) -> None:
    prepare(muxrt, tmp_path)
    keys = tmp_path / "admin.keys"
    keys.write_text(KEY)
    config = load(tmp_path / "serve.yaml")
    (unit,) = (u for u in config.units if u.models[0].name == "hot")
    config = msgspec.structs.replace(
        config,
        models=(config.model("hot"),),
        units=(unit,),
        endpoint=Endpoint(port=0),
        admin=Admin(keys=ApiKeys(file=str(keys))),
    )
    with real_server(config) as server:
        code, said = World(server, tmp_path).replan(muxrt)
    assert code == 2 and "the server's models differ from these: cold" in said


def test_a_server_without_admin_is_told_apart(muxrt: CommandLine, tmp_path: Path) -> None:
    prepare(muxrt, tmp_path)
    config = msgspec.structs.replace(load(tmp_path / "serve.yaml"), endpoint=Endpoint(port=0))
    with real_server(config) as server:
        code, said = World(server, tmp_path).replan(muxrt)
    assert code == 1 and "expected a muxrt server whose file has `admin`" in said


def test_applying_needs_a_key(muxrt: CommandLine, tmp_path: Path) -> None:
    prepare(muxrt, tmp_path)
    words = ["--traffic", tmp_path / "log", "--plan", tmp_path / "plan.yaml"]
    answer = muxrt("replan", tmp_path / "serve.yaml", *words, "--apply", "http://127.0.0.1:1")
    assert answer.code == 2 and "MUXRT_ADMIN_KEY" in answer.err
