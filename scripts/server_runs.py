"""Runs of our own server as `validate_server.py` records them, and the same requests simulated."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import msgspec

from muxrt.config.cluster import KINDS
from muxrt.config.plan import EngineFacts
from muxrt.config.serve import ServeConfig
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.engine.messages import BatchStats
from muxrt.engine.metered import Metered
from muxrt.metrics import percentile, tpot_s
from muxrt.sim.group import Simulation
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import tasks
from muxrt.workload.arrivals import Arrival

PERCENTILES = (50, 90)
RUNS = 5  # of a simulation, as the server is asked several times
LATE_S = 0.002  # at most, of a client's requests: which step one still meets depends on it


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """A request as the server counted it."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


class Run(msgspec.Struct, frozen=True):
    """One replay of the requests of a load, on the server or in the simulator; seconds."""

    ttft_s: tuple[float, ...]  # by request
    tpot_s: tuple[float | None, ...]  # None: an answer of one token
    wall_s: float  # until the last token
    batches: tuple[BatchStats, ...]
    client_s: float = 0.0  # what the client computed, on the same machine


class Load(msgspec.Struct, frozen=True):
    """Requests at one rate, as they were sent several times."""

    load: float  # of what the server can answer
    rate_rps: float
    asked: tuple[Asked, ...]
    runs: tuple[Run, ...] = ()


class Setup(msgspec.Struct, frozen=True):
    """A server and its loads."""

    name: str
    config: ServeConfig
    profile: str  # file beside the record
    loads: tuple[Load, ...] = ()


class Record(msgspec.Struct, frozen=True):
    """Everything that was measured."""

    about: dict[str, Any]
    setups: tuple[Setup, ...] = ()


@dataclass(frozen=True, slots=True)
class World:
    """What a setup's requests are simulated in."""

    config: ServeConfig
    setting: Setting


def world(setup: Setup, folder: Path) -> World:
    """The setup's profile, found in `folder`, and its models' shapes as the profile has them.

    The client's own time per token, where it shares the lanes' cores, counts as control.
    """
    profile = load_profile(folder / setup.profile)
    assert profile.file is not None and profile.file.kind is not None, "muxrt profile wrote it"
    gpus = {**KINDS, profile.gpu: profile.file.kind}
    known = {
        name: value
        for name, value in msgspec.structs.asdict(profile.file.engine).items()
        if value is not None
    }
    known["control_s"] = known.get("control_s", 0.0) + _client_token_s(setup)
    shapes = {model.name: profile.shapes[model.name] for model in setup.config.models}
    engine = EngineFacts(**known)
    cost = CostModel([profile], gpus)
    setting = Setting(shapes, cost, engine, gpus, asks_exactly=True, fold=False)
    return World(setup.config, setting)


def _client_token_s(setup: Setup) -> float:
    tokens = sum(one.output_tokens for load in setup.loads for one in load.asked for _ in load.runs)
    return sum(run.client_s for load in setup.loads for run in load.runs) / max(tokens, 1)


def replays(world: World, asked: Sequence[Asked]) -> tuple[Run, ...]:
    """The requests, simulated several times; each is up to LATE_S late, as no client is exact."""
    return tuple(replay(world, asked, Random(number)) for number in range(RUNS))


def replay(world: World, asked: Sequence[Asked], late: Random | None = None) -> Run:
    """The requests, simulated; exactly when they were due unless `late` says otherwise."""
    arrivals = [
        Arrival(
            a.at_s + (late.uniform(0, LATE_S) if late else 0.0),
            a.model,
            a.prompt_tokens,
            a.output_tokens,
        )
        for a in asked
    ]
    (task,) = tasks(world.config, world.setting, arrivals)
    simulation = Simulation(task.group, task.setting)
    (unit,) = simulation.units.values()
    meter = unit.unit.executor = Metered(unit.unit.executor)
    served = simulation.run(task.arrivals).served
    assert all(one.is_answered for one in served), "nobody is refused or too long"
    ends = [(one.first_s or 0.0, one.last_s or 0.0) for one in served]
    return Run(
        tuple(first - one.at_s for one, (first, _) in zip(served, ends, strict=True)),
        tuple(tpot_s(*end, one.output_tokens) for one, end in zip(served, ends, strict=True)),
        max(last for _, last in ends),
        meter.stats(),
    )


def capacity_rps(world: World, asked: Sequence[Asked]) -> float:
    """Requests/s that are answered when all of `asked` come at once."""
    at_once = [Asked(0.0, a.model, a.prompt_tokens, a.output_tokens) for a in asked]
    return len(asked) / replay(world, at_once).wall_s


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of a load: the server's runs, and the simulator's."""

    what: str
    unit: str
    measured: tuple[float, ...]  # by run
    simulated: float  # the mean of the simulator's

    @property
    def mean(self) -> float:
        return fmean(self.measured)

    @property
    def spread(self) -> float:
        """Of identical runs: from the least to the largest, over their mean."""
        return (max(self.measured) - min(self.measured)) / self.mean

    @property
    def error(self) -> float:
        return self.simulated / self.mean - 1


def figures(load: Load, simulated: Sequence[Run]) -> list[Line]:
    """What a user would look at."""
    tokens = sum(one.output_tokens for one in load.asked)

    def line(what: str, unit: str, value: Any) -> Line:
        ours = fmean(value(run) for run in simulated)
        return Line(what, unit, tuple(value(run) for run in load.runs), ours)

    found = [line("throughput", "tokens/s", lambda run: tokens / run.wall_s)]
    for what, times in (("TTFT", lambda r: r.ttft_s), ("TPOT", lambda r: _known(r.tpot_s))):
        found.append(line(f"{what} mean", "ms", lambda run, t=times: 1e3 * fmean(t(run))))
        for pct in PERCENTILES:
            value = lambda run, t=times, p=pct: 1e3 * (percentile(sorted(t(run)), p) or 0.0)  # noqa: E731
            found.append(line(f"{what} p{pct}", "ms", value))
    return found


def steps(loads: Iterable[tuple[Load, Sequence[Run]]]) -> list[Line]:
    """Mean times of prefills and decode steps of each model, all loads of a run together."""
    pairs = list(loads)
    keys = sorted({(b.model, b.phase.value) for _, runs in pairs for b in runs[0].batches})
    num_runs = min(len(load.runs) for load, _ in pairs)
    found = []
    for model, phase in keys:
        mean = [
            _mean_ms([load.runs[number] for load, _ in pairs], model, phase)
            for number in range(num_runs)
        ]
        simulated = _mean_ms([run for _, runs in pairs for run in runs], model, phase)
        found.append(Line(f"{model} {phase}", "ms", tuple(mean), simulated))
    return found


def _mean_ms(runs: Sequence[Run], model: str, phase: str) -> float:
    mine = [b for run in runs for b in run.batches if (b.model, b.phase.value) == (model, phase)]
    return 1e3 * sum(b.seconds for b in mine) / sum(b.batches for b in mine)


def _known(times: Iterable[float | None]) -> list[float]:
    return [time for time in times if time is not None]
