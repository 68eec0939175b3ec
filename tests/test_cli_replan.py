"""`muxrt replan`: yesterday's placement, today's traffic, and what is said of it."""

import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest
import yaml
from command_line import CommandLine
from msgspec.structs import replace
from real_server import real_config, real_server

from muxrt.cli.admin_client import AdminClient, AdminError
from muxrt.config.load import load
from muxrt.config.serve import Admin, ApiKeys
from muxrt.server.traffic_files import Entry, add_history

ROOT = Path(__file__).parent.parent
AT = "2026-03-10T12:00"
NOW_S = datetime(2026, 3, 10, 12, tzinfo=UTC).timestamp()
# Two GPUs so slow that a request in a second or two fills one: a log of hours stays small.
PLAN = """\
cluster:
  nodes: [{gpu: slow, gpus: 2}]
  kinds:
    - {name: slow, memory_bytes: 40GB, bandwidth_bytes_per_s: 1.0e+11, flops: 5.0e+12, sms: 100,
       link_bytes_per_s: 1.0e+10}
models: [{name: any, preset: llama-7b}]
largest_tp: 1
"""
SERVE = """\
models:
  - {name: a, preset: llama-7b, rate_rps: 0.4, slo: {ttft_s: 4, tpot_s: 0.5}}
  - {name: b, preset: llama-7b, rate_rps: 0.4, slo: {ttft_s: 4, tpot_s: 0.5}}
units:
  - {name: left, models: [{name: a}], memory: {kv_bytes: 20GB}, lanes: {kind: stream},
     mesh: {device: gpu, kind: slow, node: 0, gpus: [0]}}
  - {name: right, models: [{name: b}], memory: {kv_bytes: 20GB}, lanes: {kind: stream},
     mesh: {device: gpu, kind: slow, node: 0, gpus: [1]}}
"""


def history(folder: Path, hours: float, ends_s: float = NOW_S, **rates_rps: float) -> Path:
    """Poisson requests of 200 and 60 tokens up to `ends_s`."""
    rng = Random(0)
    entries = []
    for model, rate_rps in rates_rps.items():
        at_s = ends_s - 3600 * hours
        while (at_s := at_s + rng.expovariate(rate_rps)) < ends_s:
            prompt, output = rng.randint(100, 300), rng.randint(20, 100)
            entries.append(Entry(at_s, model, prompt, output, 1.0, 0.2, 200, "left", None, 1))
    add_history(folder, entries)
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "serve.yaml").write_text(SERVE)
    return tmp_path


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def words(world: Path, log: Path, file: str = "serve.yaml") -> list[object]:
    asked = [world / file, "--traffic", log, "--plan", world / "plan.yaml", "--at", AT]
    return ["replan", *asked, "--least-history", 2, "--window", 4, "--scenarios", 1]


def test_popularity_that_moved_moves_models(muxrt: CommandLine, world: Path) -> None:
    log = history(world / "log", 3, a=0.8, b=0.05)
    out, picture = world / "new.yaml", world / "both.svg"
    answer = muxrt(*words(world, log), "--out", out, "--picture", picture)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("change: it earns") and "is written" in answer.out
    config = load(out)
    homes = [unit.name for unit in config.units for part in unit.models if part.name == "a"]
    assert len(homes) == 2 and config.model("a").rate_rps == pytest.approx(0.8, rel=0.1)
    assert config.model("a").slo == load(world / "serve.yaml").model("a").slo
    drawn = picture.read_text()
    assert "now: " in drawn and "then: " in drawn and "changed" in drawn
    again = muxrt(*words(world, log, "new.yaml"), "--json")
    data = json.loads(again.out)
    assert not data["is_worth"], f"what was planned is kept: {data['reason']}"


def test_a_server_that_is_not_there_is_one_clear_line(muxrt: CommandLine, world: Path) -> None:
    log, out = history(world / "log", 3, a=0.8, b=0.05), world / "new.yaml"
    where = ["--apply", "http://127.0.0.1:9", "--admin-key", "sesame"]
    answer = muxrt(*words(world, log), *where, "--out", out)
    assert answer.code == 1 and "127.0.0.1:9 does not answer: Connection refused" in answer.err
    assert not out.exists(), "what is not served is not written"


def test_a_server_changes_its_placement(tmp_path: Path) -> None:
    keys = tmp_path / "admin.keys"
    keys.write_text("sesame\n")
    before = real_config(tmp_path, {"main": ["a", "b"]})
    config = replace(before, admin=Admin(keys=ApiKeys(file=str(keys))))
    (unit,) = config.units
    split = tuple(replace(unit, name=part.name, models=(part,)) for part in unit.models)
    with real_server(config) as server:
        with pytest.raises(AdminError, match="API key"):
            AdminClient(server.url, "guess").apply(split)
        served = AdminClient(server.url, "sesame").apply(split)
        assert [[part.name for part in one.models] for one in served] == [["a"], ["b"]]
        assert server.server.dispatcher.is_served("a") and server.server.dispatcher.is_served("b")
        assert set(server.server.supervisor.units) >= {one.name for one in served}


def test_figures_for_machines(muxrt: CommandLine, world: Path) -> None:
    log = history(world / "log", 3, a=0.8, b=0.05, other=0.1)
    data = json.loads(muxrt(*words(world, log), "--json").out)
    a, b = data["models"]
    assert a["attainment"]["before"] < a["attainment"]["after"] and b["model"] == "b"
    assert data["goodput_rps"]["before"] < data["goodput_rps"]["after"] <= 1.0
    assert data["cost"]["total_bytes"] > 13e9 and data["cost"]["reduced_s"] > 5
    assert data["forecast"]["days"] == 0 and data["unknown_models"] == ["other"]
    assert {unit["is"] for unit in data["units"]} <= {"kept", "changed", "added", "removed"}


def test_a_placement_that_serves_stays(muxrt: CommandLine, world: Path) -> None:
    log = history(world / "log", 3, a=0.05, b=0.05)
    out = world / "new.yaml"
    answer = muxrt(*words(world, log), "--out", out)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("stay: ") and "is not written" in answer.out
    assert not out.exists()


def test_a_move_that_costs_more_than_it_earns_is_not_made(muxrt: CommandLine, world: Path) -> None:
    log = history(world / "log", 3, a=0.8, b=0.05)
    answer = muxrt(*words(world, log), "--margin", 1e9)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("stay: it earns") and "it does not earn" in answer.out


@pytest.mark.parametrize(
    ("hours", "ends_s", "said"),
    [
        (1.1, NOW_S, "in 1.1 h, expected at least 100 in 2.0 h"),
        (3.0, NOW_S - 86400, "the newest request came 24.0 h ago"),
        (3.0, NOW_S + 86400, "no request came before"),
    ],
)
def test_too_little_or_too_old_traffic_is_refused(
    muxrt: CommandLine, world: Path, hours: float, ends_s: float, said: str
) -> None:
    log = history(world / "log", hours, ends_s, a=0.3)
    answer = muxrt(*words(world, log))
    assert answer.code == 1 and said in answer.err.replace("\n", " "), answer.err


def test_the_log_of_another_server_is_told_apart(muxrt: CommandLine, world: Path) -> None:
    answer = muxrt(*words(world, history(world / "log", 3, other=0.3)))
    assert answer.code == 1 and "found requests for other, expected some for" in answer.err
    assert "a, b; is it the log of another server?" in answer.err


def test_the_served_file_may_name_log_and_plan(muxrt: CommandLine, world: Path) -> None:
    history(world / "log", 3, a=0.05, b=0.05)
    less = ["--at", AT, "--least-history", 2, "--window", 4, "--scenarios", 1]
    answer = muxrt("replan", world / "serve.yaml", *less)
    assert answer.code == 2 and "keeps no traffic log, expected --traffic FOLDER" in answer.err
    more = "traffic: {path: log}\nadmin: {keys: {env: ADMIN}}\n"
    (world / "serve.yaml").write_text(SERVE + more)
    answer = muxrt("replan", world / "serve.yaml", *less)
    assert answer.code == 2 and "has no replan.plan, expected --plan FILE" in answer.err
    (world / "serve.yaml").write_text(SERVE + more + "replan: {plan: plan.yaml}\n")
    answer = muxrt("replan", world / "serve.yaml", *less)
    assert answer.code == 0 and answer.out.startswith("stay: "), answer.err


def test_weekends_of_the_log_are_told_apart(muxrt: CommandLine, world: Path) -> None:
    """AT is a Tuesday; the weekends before had a tenth of the requests of other days."""
    rng, entries = Random(0), []
    for hour in range(1, 24 * 16 + 1):
        at_s = NOW_S - 3600 * hour
        rate = 2 if datetime.fromtimestamp(at_s, UTC).weekday() >= 5 else 20
        entries += [
            Entry(at_s + 3600 * rng.random(), model, 200, 60, 1.0, 0.2, 200, "left", None, 1)
            for model in ("a", "b")
            for _ in range(rate)
        ]
    add_history(world / "log", entries)
    answer = muxrt(*words(world, world / "log"), "--window", 120, "--json")
    data = json.loads(answer.out)
    assert data["forecast"]["weekends_apart"] == ["a", "b"]
    busiest, quietest = data["forecast"]["bands"][0], data["forecast"]["bands"][-1]
    # Saturday begins 84 hours from then: 36 of 120 hours are of a weekend, and the quietest band
    # of four has 30 of them.
    assert quietest["rates_rps"]["a"] < 0.2 * busiest["rates_rps"]["a"]
    answer = muxrt(*words(world, world / "log"), "--timezone", "Mars/Olympus")
    assert answer.code == 2 and "found --timezone Mars/Olympus" in answer.err


@pytest.mark.parametrize(
    ("what", "instead", "said"),
    [
        (", slo: {ttft_s: 4, tpot_s: 0.5}", "", "found no slo of a, b, expected one in the file"),
        ("kind: slow, ", "", "units[0].mesh: found no kind and gpus [0], expected a kind"),
        ("kind: slow, ", "kind: fast, ", "found fast and gpus [0], expected a kind of the plan's"),
    ],
)
def test_what_cannot_be_planned_over_is_named(
    muxrt: CommandLine, world: Path, what: str, instead: str, said: str
) -> None:
    (world / "serve.yaml").write_text(SERVE.replace(what, instead))
    answer = muxrt(*words(world, history(world / "log", 3, a=0.1)))
    assert answer.code == 2 and said in answer.err, answer.err


def test_requests_without_answers_have_no_lengths(muxrt: CommandLine, world: Path) -> None:
    refused = [
        Entry(NOW_S - 60 * number, "a", None, 0, None, None, 429, None, None, 1)
        for number in range(1, 200)
    ]
    add_history(world / "log", refused)
    answer = muxrt(*words(world, world / "log"))
    assert answer.code == 1 and "no lengths to plan by" in answer.err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--at", "soon"), "found --at soon"),
        (("--out", "none/new.yaml"), "expected it to exist"),
        (("--picture", "x.gif"), "expected a picture named"),
        (("--ttft", 1), "one goes with the other"),
        (("--plan", "none.yaml"), "no such file"),
        (("--traffic", "none"), "no such traffic log"),
        (
            ("--apply", "localhost", "--admin-key", "k"),
            "found localhost, expected an address: http",
        ),
    ],
)
def test_mistakes_are_one_clear_line(
    muxrt: CommandLine, world: Path, asked: tuple[object, ...], said: str
) -> None:
    answer = muxrt(*words(world, history(world / "log", 3, a=0.1)), *asked)
    assert answer.code == 2 and said in answer.err, answer.err


def commands() -> dict[str, list[str]]:
    """What configs/replan runs, after the word muxrt."""
    (line,) = (
        line
        for line in (ROOT / "configs/replan/crontab").read_text().splitlines()
        if line and not line.startswith("#")
    )
    cron = line.partition("muxrt replan ")[2].partition(" >")[0]
    job = yaml.safe_load((ROOT / "configs/replan/cronjob.yaml").read_text())
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["muxrt", "replan"]
    kubernetes = [*container["command"][2:], *container["args"]]
    return {"cron": shlex.split(cron), "kubernetes": kubernetes}


@pytest.mark.parametrize("where", ["cron", "kubernetes"])
def test_what_is_shipped_runs(
    muxrt: CommandLine, world: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(world)
    history(world / "traffic", 3, a=0.8, b=0.05)
    moved = [word.replace("/config/", "").replace("/data/", "") for word in commands()[where]]
    answer = muxrt("replan", *moved, "--at", AT, "--least-history", 2, "--window", 2)
    assert answer.code == 0, answer.err
    assert (world / "new.yaml").is_file()


def test_the_shipped_server_keeps_a_log() -> None:
    traffic = load(ROOT / "configs/replan/serve.yaml").traffic
    assert traffic is not None and traffic.path.endswith("configs/replan/traffic")
