"""A day of drifting traffic in ten minutes, replanned every hour, against yesterday's plan.

    python scripts/day.py measure --out docs/benchmarks
    python scripts/day.py show docs/benchmarks/day.json

Two sets of one core hold four of six models each, so two can be in both. Popularity follows Zipf's
law, and who is popular changes every four hours; the two days before were alike. Both servers start
with the plan for the mean of those days (`muxrt plan`). One keeps it; the other is replanned at
every full hour by `muxrt replan --apply`, beside the traffic, on the same cores.

`--model` and `--profile` are for who has measured before, and for a day that is only to be tried
(tests/test_day.py). An hour takes `--hour` seconds. For the planner it has 3,600: a request stands
for as many as are left out, and what a move takes is longer by as much.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Annotated, Any

import msgspec
import typer
import yaml
from bench_models import preset_folders
from bench_record import FOLDER, provenance, stop_on_sigterm
from day_plot import draw

from muxrt.bench.client import replay, session
from muxrt.bench.job import Job, Outcome, Progress, Status, Target
from muxrt.cli.endpoint import start_endpoint
from muxrt.config.cluster import Cluster, NodeGroup
from muxrt.config.load import dump, load, stated
from muxrt.config.model import load_shape
from muxrt.config.placement import Memory, ModelSpec, Slo, UnitModel, UnitSpec
from muxrt.config.plan import EngineFacts, PlanFile
from muxrt.config.profile import dump_profile, read_profile
from muxrt.config.serve import Admin, ApiKeys, Endpoint, ServeConfig, TrafficFolder
from muxrt.cost.profile import read_cells, table_of
from muxrt.engine.build import weight_bytes
from muxrt.metrics import is_met
from muxrt.server.traffic_files import Entry, add_history, read_entries
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Lengths, Traffic, Workload

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
PRESET, MODELS = "27m", tuple(f"m{number}" for number in range(6))
HOURS, SHIFT = 24, 4  # hours, and after how many somebody else is the most popular
DAYS_BEFORE = 2
ZIPF = 1.5
PROMPT = Lengths(mean_tokens=100, cv=0.5, max_tokens=300)
OUTPUT = Lengths(mean_tokens=60, cv=0.5, max_tokens=150)
SLO = Slo(ttft_s=1.0, tpot_s=0.15)
MAX_MODEL_LEN = 512
HELD = 4  # models whose weights a core's memory has room for
KV_BYTES = 256 << 20
SETS = 2
HOUR_S, MOVE_S, LOAD_BYTES_PER_S = 3600.0, 3.4, 2e9
MIDNIGHT_S = datetime(2026, 3, 10, tzinfo=UTC).timestamp()
KEY = "of-this-day-only"
KIND = "core"
MUXRT = (sys.executable, "-m", "muxrt")


@dataclass(frozen=True, slots=True)
class Day:
    """What is asked."""

    rate_rps: float
    hour_s: float  # of a real clock
    move_s: float = MOVE_S  # what a unit takes to start, as the planner is told

    @property
    def squeeze(self) -> float:
        """Seconds of the planner's clock in one of the real one."""
        return HOUR_S / self.hour_s

    def rates(self, hour: int) -> dict[str, float]:
        """Requests/s of each model."""
        first = hour // SHIFT % len(MODELS)
        weights = {
            name: ((place - first) % len(MODELS) + 1) ** -ZIPF for place, name in enumerate(MODELS)
        }
        total = sum(weights.values())
        return {name: self.rate_rps * weight / total for name, weight in weights.items()}

    def requests(self, number: int) -> list[Arrival]:
        """Those of day `number`, in real seconds since its midnight."""
        found = []
        for hour in range(HOURS):
            models = tuple(Traffic(name=n, rate_rps=r) for n, r in self.rates(hour).items())
            part = Workload(
                duration_s=self.hour_s,
                seed=1000 * number + hour,
                models=models,
                prompt=PROMPT,
                output=OUTPUT,
            )
            found += [replace(one, at_s=one.at_s + hour * self.hour_s) for one in arrivals(part)]
        return found


class Home:
    """The folder that everything is written to: models, profile, plan, yesterday's placement.

    All models are the one in the folder `model`; `profile` is of one core, None = measure it.
    """

    def __init__(
        self, folder: Path, day: Day, budget_s: float, model: Path | None, profile: Path | None
    ) -> None:
        self.folder, self.day = folder, day
        path = model.absolute() if model is not None else preset_folders([PRESET])[0]
        spec = ModelSpec(
            name=PRESET,
            path=str(path),
            dtype="float32" if model is None else "auto",
            max_model_len=MAX_MODEL_LEN,
        )
        self.models = tuple(
            msgspec.structs.replace(spec, name=name, slo=SLO, max_queue=100_000) for name in MODELS
        )
        self.weights = weight_bytes(spec, load_shape(path))
        self.vocab_size = load_shape(path).vocab_size
        self._set_of_cores(profile or self._profile(spec, budget_s))
        self._plan()

    @property
    def plan(self) -> Path:
        return self.folder / "plan.yaml"

    @cached_property
    def served(self) -> Path:
        """The placement for the mean of the days before, as `muxrt plan` has it."""
        mean = [sum(self.day.rates(hour)[name] for hour in range(HOURS)) / HOURS for name in MODELS]
        traffic = Workload(
            models=tuple(Traffic(name=n, rate_rps=r) for n, r in zip(MODELS, mean, strict=True)),
            prompt=PROMPT,
            output=OUTPUT,
            slo=SLO,
        )
        (self.folder / "traffic.yaml").write_text(yaml.safe_dump(stated(traffic)))
        out = self.folder / "placement.yaml"
        run("plan", self.plan, self.folder / "traffic.yaml", "--out", out)
        return out

    def _profile(self, spec: ModelSpec, budget_s: float) -> Path:
        """Lanes of one core of this machine, measured."""
        unit = UnitSpec(
            name="one", models=(UnitModel(name=spec.name),), memory=Memory(kv_bytes=KV_BYTES)
        )
        model, whole = self.folder / "one.yaml", self.folder / "whole.yaml"
        model.write_text(dump(ServeConfig(models=(spec,), units=(unit,))))
        options = ["--lanes", "1", "--quick", "--budget", budget_s, "--out", whole]
        run("profile", model, *options)
        return whole

    def _set_of_cores(self, profile: Path) -> None:
        """One core as a kind of its own, with memory for some of the models."""
        read = read_profile(profile)
        assert read.file.kind is not None, "muxrt profile writes it"
        memory = HELD * self.weights + KV_BYTES
        kind = msgspec.structs.replace(read.file.kind, name=KIND, sms=1, memory_bytes=memory)
        cells = [replace(cell, sm_pct=100) for cell in read_cells(read.table)]
        file = msgspec.structs.replace(read.file, gpu=KIND, table="core.csv", kind=kind)
        (self.folder / "core.csv").write_text(table_of(cells))
        (self.folder / "core.yaml").write_text(dump_profile(file))

    def _plan(self) -> None:
        squeeze = self.day.squeeze
        file = PlanFile(
            cluster=Cluster(
                nodes=(NodeGroup(gpu=KIND, gpus=SETS),),
                load_bytes_per_s=LOAD_BYTES_PER_S / squeeze,
                unit_start_s=self.day.move_s * squeeze,
            ),
            models=self.models,
            profiles=("core.yaml",),
            engine=EngineFacts(runtime_bytes=1, activation_bytes=1),
        )
        self.plan.write_text(yaml.safe_dump(stated(file)))

    def history(self, log: Path) -> None:
        """The days before, as the planner's clock has them."""
        for back in range(1, DAYS_BEFORE + 1):
            midnight_s = MIDNIGHT_S - back * HOURS * HOUR_S
            days = self.day.requests(-back)
            add_history(log, [self.entry(midnight_s, one) for one in days])

    def entry(self, midnight_s: float, one: Arrival) -> Entry:
        """A request that stands for as many as an hour lacks."""
        many, at_s = round(self.day.squeeze), midnight_s + one.at_s * self.day.squeeze
        prompt, output = many * one.prompt_tokens, many * one.output_tokens
        return Entry(at_s, one.model, prompt, output, None, None, 200, None, None, many)


def run(*words: object) -> str:
    """What a command of muxrt prints. Raises SystemExit with what it says where it fails."""
    done = subprocess.run([*MUXRT, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"muxrt {words[0]} failed: {done.stderr}")
    return done.stdout


@dataclass
class Replanner:
    """Copies the server's log to the planner's clock, and replans at full hours."""

    home: Home
    url: str
    begun_s: float  # when the day began
    log: Path  # the server's
    decisions: list[dict[str, Any]] = field(default_factory=list)
    seen_s: float = 0.0

    def replan(self, hour: int) -> None:
        """At the full hour; what it decides is kept."""
        begun_s = time.monotonic()
        scaled = self.home.folder / "scaled"
        until_s = self.begun_s + hour * self.home.day.hour_s
        new = [e for e in read_entries(self.log, self.begun_s, until_s) if e.at_s > self.seen_s]
        self.seen_s = max([self.seen_s, *(entry.at_s for entry in new)])
        add_history(scaled, [self._scaled(entry) for entry in new])
        at = datetime.fromtimestamp(MIDNIGHT_S + hour * HOUR_S, UTC)
        words = [*MUXRT, "replan", self.home.served, "--traffic", scaled, "--plan", self.home.plan]
        words += ["--at", f"{at:%Y-%m-%dT%H:%M}", "--window", 1, "--least-gain", 0.02, "--json"]
        words += ["--apply", self.url, "--admin-key", KEY]
        done = subprocess.run(["nice", *map(str, words)], capture_output=True, text=True)
        said: dict[str, Any] = {"error": done.stderr.strip()[-500:]}
        if done.returncode == 0:
            data = json.loads(done.stdout)
            said = {key: data[key] for key in ("is_worth", "reason")}
        took_s = time.monotonic() - begun_s
        self.decisions.append({"hour": hour, "took_s": round(took_s, 1), **said})

    def _scaled(self, entry: Entry) -> Entry:
        one = Arrival(
            entry.at_s - self.begun_s,
            entry.model,
            entry.prompt_tokens or 1,
            entry.output_tokens or 1,
        )
        return self.home.entry(MIDNIGHT_S, one)


@contextmanager
def serving(home: Home, name: str) -> Iterator[tuple[str, Path]]:
    """`muxrt serve` of yesterday's placement: its address, and its traffic log."""
    keys, log = home.folder / "admin.keys", home.folder / f"log-{name}"
    keys.write_text(KEY)
    keys.chmod(0o600)
    planned = load(home.served)
    config = msgspec.structs.replace(
        planned,
        # A plan that expects overload has requests time out; here all are to be answered.
        models=tuple(msgspec.structs.replace(m, queue_timeout_s=None) for m in planned.models),
        endpoint=Endpoint(port=0, drain_s=5.0),
        admin=Admin(keys=ApiKeys(file=str(keys)), drain_s=60.0),
        traffic=TrafficFolder(path=str(log)),
    )
    file = home.folder / f"serve-{name}.yaml"
    file.write_text(dump(config))
    endpoint = start_endpoint(file, config, home.folder / f"serve-{name}.log")
    try:
        endpoint.wait_ready(lambda _: None)
        yield endpoint.url, log
    finally:
        endpoint.stop()


def jobs_of(home: Home, requests: Sequence[Arrival]) -> list[Job]:
    """The requests with prompts of random tokens."""
    random, words = Random(0), range(home.vocab_size)
    return [
        Job(one.at_s, one.model, random.choices(words, k=one.prompt_tokens), one.output_tokens)
        for one in requests
    ]


def live(home: Home, name: str, hours: int, is_replanned: bool) -> dict[str, Any]:
    """Serve the day once; goodput by hour, and what was decided."""
    requests = [one for one in home.day.requests(0) if one.at_s < hours * home.day.hour_s]
    with serving(home, name) as (url, log):
        target = Target(url)

        async def send(jobs: Sequence[Job]) -> list[Outcome]:
            async with session(target) as http:
                return await replay(http, dict.fromkeys(MODELS, target), jobs, Progress(len(jobs)))

        asyncio.run(send([Job(0.0, model, [1, 2, 3], 2) for model in MODELS]))  # warm
        replanner = Replanner(home, url, time.time(), log)
        with ThreadPoolExecutor(1) as pool:
            waits: list[Future[None]] = []
            if is_replanned:
                waits = [pool.submit(_at_hour, replanner, hour) for hour in range(hours)]
            done = asyncio.run(send(jobs_of(home, requests)))
            for wait in waits:
                wait.result()
    return {
        "hours": [_hour(home.day, done, hour) for hour in range(hours)],
        "failed": [one.error or one.status.value for one in done if one.status is not Status.OK],
        "decisions": replanner.decisions,
    }


def _at_hour(replanner: Replanner, hour: int) -> None:
    """Wait for it; an hour that is over already is left out, as its successor is due."""
    day = replanner.home.day
    due_s = replanner.begun_s + hour * day.hour_s
    if time.time() < due_s + day.hour_s:
        time.sleep(max(0.0, due_s - time.time()))
        replanner.replan(hour)


def _hour(day: Day, done: Sequence[Outcome], hour: int) -> dict[str, float]:
    """Requests/s that came in it, and of those the ones that were served within targets."""
    mine = [one for one in done if hour <= one.due_s / day.hour_s < hour + 1]
    good = [one for one in mine if one.status is Status.OK and is_met(one.timing, SLO)]
    return {
        "offered_rps": round(len(mine) / day.hour_s, 3),
        "goodput_rps": round(len(good) / day.hour_s, 3),
    }


Out = Annotated[Path, typer.Option(help="Folder of the JSON and the picture.")]


@app.command()
def measure(
    rate: Annotated[float, typer.Option(min=0.1, help="Requests/s of all models.")] = 8.0,
    hour: Annotated[float, typer.Option(min=1, help="Seconds that an hour takes.")] = 25.0,
    hours: Annotated[int, typer.Option(min=1, max=HOURS, help="Of the day.")] = HOURS,
    budget: Annotated[float, typer.Option(min=1, help="Seconds of the profile.")] = 60.0,
    move: Annotated[
        float, typer.Option(min=0, help="Seconds of a unit's start; in short hours, less.")
    ] = MOVE_S,
    model: Annotated[Path | None, typer.Option(help="A folder; left out, random weights.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Of one core; left out, measured.")] = None,
    out: Out = FOLDER,
) -> None:
    """Profile, plan, and serve the day twice."""
    stop_on_sigterm()
    day = Day(rate, hour, move)
    with tempfile.TemporaryDirectory(prefix="muxrt-day-") as folder:
        home = Home(Path(folder), day, budget, model, profile)
        home.history(home.folder / "scaled")
        found = {
            name: live(home, name, hours, name == "replanned") for name in ("static", "replanned")
        }
        placement = home.served.read_text()
    served = PRESET if model is None else model.name
    about = {**provenance(), **asdict(day), "models": len(MODELS), "preset": served}
    path = out / "day.json"
    path.write_text(json.dumps({**about, "placement": placement, **found}, indent=1) + "\n")
    show(path)


@app.command()
def show(path: Annotated[Path, typer.Argument(help="What `measure` wrote.")]) -> None:
    """Print the totals and draw the picture beside the file."""
    data = json.loads(path.read_text())
    means = {}
    for name in ("static", "replanned"):
        hours = data[name]["hours"]
        means[name] = sum(one["goodput_rps"] for one in hours) / len(hours)
        changes = sum(one.get("is_worth", False) for one in data[name]["decisions"])
        print(
            f"{name}: {means[name]:.2f} requests/s within targets, {len(data[name]['failed'])}"
            f" failed, {changes} changes"
        )
    print(f"ratio: {means['replanned'] / means['static']:.2f}")
    draw(data, path.with_suffix(".png"))


if __name__ == "__main__":
    app()
