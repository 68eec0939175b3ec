"""A server that replans itself: on time, from its own log, beside what it answers."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import msgspec
import pytest
from command_line import CommandLine
from real_server import RealServer, real_server
from test_plan_cpu import complete
from test_replan_apply import KEY, World, prepare

from muxrt.cli.endpoint import OwnEndpoint, start_endpoint
from muxrt.config.load import dump, load
from muxrt.config.replan import Replan
from muxrt.config.serve import Admin, ApiKeys, Endpoint, ServeConfig, TrafficFolder
from muxrt.engine.reconcile import Deployment
from muxrt.errors import Conflict
from muxrt.server.replan import STATE, Decision, Outcome, Replanner

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two sets of cores")

PLANNED_S = 150.0  # a planner that has to compile, on a busy machine
MODELS = ("hot", "cold")


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def terms(home: Path, **options: Any) -> Replan:
    """What plans in seconds, from the log of 90 minutes that `prepare` writes."""
    given = {"least_history": "1h", "window": "2h", "scenarios": 1, **options}
    return Replan(plan=str(home / "plan.yaml"), **given)


def config_of(home: Path, **options: Any) -> ServeConfig:
    keys = home / "admin.keys"
    keys.write_text(KEY)
    return msgspec.structs.replace(
        load(home / "serve.yaml"),
        endpoint=Endpoint(port=0),
        admin=Admin(keys=ApiKeys(file=str(keys)), drain_s=30.0, journal=str(home / "journal")),
        traffic=TrafficFolder(path=str(home / "log")),
        replan=terms(home, **options),
    )


def ask(
    server: RealServer | OwnEndpoint, path: str = "/admin/replan", body: bytes | None = None
) -> Any:
    """Status and answer of an administrator's request; a body makes it a POST."""
    request = urllib.request.Request(server.url + path, body, {"Authorization": f"Bearer {KEY}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def until(is_so: Callable[[], Any], timeout_s: float = PLANNED_S) -> Any:
    """What `is_so` says once that is something."""
    end_s = time.monotonic() + timeout_s
    while not (found := is_so()):
        assert time.monotonic() < end_s, "it never came to that"
        time.sleep(0.05)
    return found


@dataclass
class Clients:
    """Ask each model again and again; what went wrong."""

    url: str
    answered: int = 0
    errors: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def ask(self, model: str) -> None:
        # Not too often: what they ask is in the log, and is planned for.
        while not self.is_over.wait(0.5):
            try:
                assert len(complete(self.url, model)["choices"]) == 1
                self.answered += 1
            except Exception as error:
                self.errors.append(repr(error))


@contextmanager
def asking(server: RealServer, models: tuple[str, ...] = MODELS) -> Iterator[Clients]:
    clients = Clients(server.url)
    threads = [threading.Thread(target=clients.ask, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        clients.is_over.set()
        for thread in threads:
            thread.join()


def metric(server: RealServer, name: str) -> float:
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def test_a_server_replans_on_time_and_drops_nobody(
    muxrt: CommandLine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    prepare(muxrt, tmp_path)
    with real_server(config_of(tmp_path, every="5s")) as server:
        world = World(server, tmp_path)
        assert len(world.homes("hot")) == 1
        with asking(server) as clients:
            applied = 'muxrt_replans_total{outcome="applied"}'
            until(lambda: metric(server, applied))
            until(lambda: server.server.deployer.progress.phase.value == "done")
            count = clients.answered
            until(lambda: clients.answered >= count + 4)
        assert not clients.errors
        assert len(world.homes("hot")) == 2 and len(world.homes("cold")) >= 1
        until(lambda: metric(server, 'muxrt_replans_total{outcome="kept"}'))
        _, said = ask(server)
        assert said["last"]["outcome"] == "kept" and said["last"]["asked_by"] == "schedule"
        assert said["last"]["goodput_rps"]["offered"] > 0.2
        assert said["next"].endswith("Z") or "+00:00" in said["next"]
    assert "event=replan_done outcome=applied" in caplog.text
    # After a restart the last is known, and what came due meanwhile is told and left.
    time.sleep(max(0.0, json.loads((tmp_path / "log" / STATE).read_text())["next_s"] - time.time()))
    with real_server(config_of(tmp_path)) as server:
        _, said = ask(server)
        assert said["last"]["outcome"] == "kept" and said["running_since"] is None
        assert said["missed"] == 1 and "why='the server was down'" in caplog.text
        assert metric(server, "muxrt_replan_running") == 0
        assert metric(server, "muxrt_replan_next_timestamp_seconds") > time.time()
        assert len(World(server, tmp_path).homes("hot")) == 2, "the journal has it"


def cmdline(pid: int) -> list[bytes]:
    """Its words; none of a process that is gone."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []


def planners(server: int | None = None) -> list[int]:
    """Pids of the planners that this process started, or that server."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == (server or os.getpid()) and b"replan" in cmdline(int(folder.name)):
            found.append(int(folder.name))
    return found


@dataclass
class Bench:
    """Replanners of their own terms on a real server."""

    server: RealServer
    home: Path

    def decide(
        self, meanwhile: Callable[[int], object] = lambda pid: None, **given: Any
    ) -> Decision:
        """How one that is asked for ends; `meanwhile` is told the planner's pid."""
        deployer = self.server.server.deployer
        assert deployer is not None
        replanner = Replanner(terms(self.home, **given), self.home / "log", deployer)
        self.run(replanner.start)

        async def begin() -> None:
            replanner.ask()
            with pytest.raises(Conflict, match="a replan goes on"):
                replanner.ask()

        self.run(begin)
        (pid,) = until(planners)
        meanwhile(pid)
        found = until(lambda: replanner.last)
        assert not planners() and replanner.begun_s is None
        self.run(replanner.stop)
        (self.home / "log" / STATE).unlink()
        assert isinstance(found, Decision)
        return found

    def run(self, work: Callable[[], Awaitable[object]]) -> None:
        self.server.run(work)


def kill(pid: int) -> None:
    until(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19)
    os.kill(pid, signal.SIGKILL)


def test_whatever_becomes_of_the_planner_the_old_placement_serves(
    muxrt: CommandLine, tmp_path: Path
) -> None:
    prepare(muxrt, tmp_path)
    with real_server(config_of(tmp_path)) as server:
        bench, deployer = Bench(server, tmp_path), server.server.deployer
        assert deployer is not None
        before = deployer.deployment
        found = bench.decide(kill)
        assert found.outcome is Outcome.FAILED and "(signal 9)" in found.reason
        found = bench.decide(timeout="0.5s")
        assert found.outcome is Outcome.FAILED and "longer than 0.5 s" in found.reason
        found = bench.decide(least_history="48h")
        assert found.outcome is Outcome.REFUSED and "in 48.0 h" in found.reason
        found = bench.decide(margin=1e9)
        assert found.outcome is Outcome.KEPT and "it does not earn" in found.reason
        assert deployer.deployment is before

        def share(pid: int) -> None:
            """An administrator changes something while the planner thinks."""
            (first, *rest) = before.units
            part = msgspec.structs.replace(first.models[0], traffic=2.0)
            unit = msgspec.structs.replace(first, models=(part, *first.models[1:]))
            wanted = Deployment(before.models, (unit, *rest))
            bench.run(lambda: deployer.apply(wanted))

        found = bench.decide(share)
        assert found.outcome is Outcome.REFUSED and "changed while" in found.reason
        assert deployer.deployment.units[0].models[0].traffic == 2.0
        for model in MODELS:
            assert len(complete(server.url, model)["choices"]) == 1


def test_an_operator_asks_for_one(muxrt: CommandLine, tmp_path: Path) -> None:
    prepare(muxrt, tmp_path)
    with real_server(config_of(tmp_path)) as server:
        status, said = ask(server)
        assert status == 200 and said["last"] is None and said["every"] == "24h"
        status, said = ask(server, body=b"")
        assert status == 202 and said["running_since"] is not None
        status, said = ask(server, body=b"")
        assert status == 409 and "a replan goes on" in said["error"]["message"]
        last = until(lambda: ask(server)[1]["last"])
        assert last["outcome"] == "applied" and last["asked_by"] == "operator"
        assert len(World(server, tmp_path).homes("hot")) == 2


def test_a_server_that_stops_ends_its_planner(muxrt: CommandLine, tmp_path: Path) -> None:
    prepare(muxrt, tmp_path)
    with real_server(config_of(tmp_path)) as server:
        assert ask(server, body=b"")[0] == 202
        until(planners)
    assert not planners()


def test_what_cannot_be_made_on_time_is_left(
    muxrt: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("muxrt.server.replan.LOOK_S", 0.01)
    prepare(muxrt, tmp_path)
    with real_server(config_of(tmp_path)) as server:
        deployer = server.server.deployer
        assert deployer is not None
        clock = [time.time()]
        replanner = Replanner(terms(tmp_path), tmp_path / "log", deployer, lambda: clock[0])
        server.run(replanner.start)
        due_s = replanner.next_s
        clock[0] = due_s + 1000  # the machine slept
        until(lambda: replanner.num_missed == 1)
        assert replanner.begun_s is None and replanner.next_s == due_s + 86400
        assert "stood still" in caplog.text
        clock[0] = due_s + 86400 + 1
        until(planners)
        clock[0] = due_s + 2 * 86400 + 1
        until(lambda: replanner.num_missed == 2)
        assert len(planners()) == 1 and "the one before goes on" in caplog.text
        server.run(replanner.stop)
        assert not planners()


def test_a_clock_that_was_ahead_delays_nothing(
    muxrt: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that started with the clock of next year waited for next year."""
    monkeypatch.setattr("muxrt.server.replan.LOOK_S", 0.01)
    prepare(muxrt, tmp_path)
    with real_server(config_of(tmp_path)) as server:
        deployer = server.server.deployer
        assert deployer is not None
        now_s = time.time()
        clock = [now_s + 365 * 86400]
        replanner = Replanner(terms(tmp_path), tmp_path / "log", deployer, lambda: clock[0])
        server.run(replanner.start)
        clock[0] = now_s
        until(lambda: replanner.next_s <= now_s + 86400)
        server.run(replanner.stop)


def test_the_planner_sees_no_keys(
    muxrt: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_ADMIN", "secret-of-admin")
    monkeypatch.setenv("OF_USERS", "secret-of-users")
    monkeypatch.setenv("MUXRT_ADMIN_KEY", "secret-of-commands")
    prepare(muxrt, tmp_path)
    config = config_of(tmp_path, scenarios=500)
    assert config.admin is not None
    admin = msgspec.structs.replace(config.admin, keys=ApiKeys(env="OF_ADMIN"))
    endpoint = msgspec.structs.replace(config.endpoint, api_keys=ApiKeys(env="OF_USERS"))
    with real_server(msgspec.structs.replace(config, admin=admin, endpoint=endpoint)) as server:
        replanner = server.server.replanner
        assert replanner is not None

        async def ask_once() -> None:
            replanner.ask()

        server.run(ask_once)
        (pid,) = until(planners)
        seen = until(lambda: Path(f"/proc/{pid}/environ").read_bytes())
        assert b"PATH=" in seen and b"secret" not in seen


def test_a_server_that_is_killed_leaves_no_planner(muxrt: CommandLine, tmp_path: Path) -> None:
    prepare(muxrt, tmp_path)
    file = tmp_path / "live.yaml"
    file.write_text(dump(config_of(tmp_path, scenarios=500)))  # it would take very long
    endpoint = start_endpoint(file, load(file), tmp_path / "serve.log")
    try:
        endpoint.wait_ready(lambda _: None)
        assert ask(endpoint, body=b"")[0] == 202
        (pid,) = until(lambda: planners(endpoint.process.pid))
        endpoint.process.kill()
        until(lambda: not cmdline(pid), 30)  # of its own accord it would not have ended by then
    finally:
        endpoint.stop()


def test_a_server_without_replan_says_so(muxrt: CommandLine, tmp_path: Path) -> None:
    prepare(muxrt, tmp_path)
    config = msgspec.structs.replace(config_of(tmp_path), replan=None)
    with real_server(config) as server:
        status, said = ask(server)
        assert status == 400 and "the served file has no replan" in said["error"]["message"]
