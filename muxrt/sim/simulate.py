"""What a placement would give: the serving brain on a virtual clock, with step times of `cost/`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from muxrt.config.placement import ModelSpec, Placement, Slo, UnitSpec
from muxrt.config.serve import ServeConfig
from muxrt.engine.router import Switch
from muxrt.errors import ConfigError
from muxrt.sim.group import Group, GroupResult, Served, Simulation, Tell, groups
from muxrt.sim.report import Report, make_report
from muxrt.sim.setting import Setting
from muxrt.sim.use import UnitUse
from muxrt.workload.arrivals import Arrival


@dataclass(frozen=True, slots=True)
class Task:
    """One group with its requests: it needs nothing else, so any process may run it."""

    group: Group
    setting: Setting
    arrivals: tuple[tuple[int, Arrival], ...]


def run_task(task: Task, tell: Tell = lambda num_requests: None) -> GroupResult:
    """Serve the requests of one group."""
    return Simulation(task.group, task.setting).run(task.arrivals, tell)


# `map`, or the `map` of a pool of processes: results in the order of the tasks.
Map = Callable[[Callable[[Task], GroupResult], Iterable[Task]], Iterable[GroupResult]]


@dataclass(frozen=True, slots=True)
class Run:
    """What became of every request (in order of arrival) and every unit (in the placement's)."""

    served: tuple[Served, ...]
    units: tuple[UnitUse, ...]
    switches: tuple[tuple[float, Switch], ...] = ()  # of roles, in order


def tasks(config: ServeConfig, setting: Setting, arrivals: Sequence[Arrival]) -> list[Task]:
    """The independent parts of a simulation, those with the most requests first.

    So that processes which deal them out among each other end at about the same time. Raises
    ConfigError for a model without a place.
    """
    placed = {part.name for unit in config.units for part in unit.models}
    for arrival in arrivals:
        if arrival.model not in placed:
            raise ConfigError(f"requests ask for {arrival.model!r}, which is in no unit")
    names = [unit.name for unit in config.units]
    for failure in setting.failures:
        if failure.unit not in names:
            known = ", ".join(names)
            raise ConfigError(f"found a failure of {failure.unit!r}, expected one of: {known}")
    found = groups(config.units, config.models, config.routing)
    home = {spec.name: index for index, group in enumerate(found) for spec in group.models}
    dealt: list[list[tuple[int, Arrival]]] = [[] for _ in found]
    for place, arrival in sorted(enumerate(arrivals), key=lambda item: item[1].at_s):
        dealt[home[arrival.model]].append((place, arrival))
    parts = [Task(g, setting, tuple(mine)) for g, mine in zip(found, dealt, strict=True)]
    return sorted(parts, key=lambda task: -len(task.arrivals))


def simulate(
    config: ServeConfig,
    setting: Setting,
    arrivals: Sequence[Arrival],
    map_: Map = map,
    run: Callable[[Task], GroupResult] = run_task,
) -> Run:
    """Serve `arrivals` with the units of `config`, until the last request has ended.

    Raises ConfigError where a unit cannot be laid out, a model is in no unit, or a failure is of no
    unit. The result does not depend on `map_`; `run` is for those who watch its progress.
    """
    results = list(map_(run, tasks(config, setting, arrivals)))
    served = sorted((s for result in results for s in result.served), key=lambda s: s.index)
    by_name = {use.unit: use for result in results for use in result.units}
    switches = sorted((s for result in results for s in result.switches), key=lambda one: one[0])
    uses = tuple(by_name[unit.name] for unit in config.units)
    return Run(tuple(served), uses, tuple(switches))


def targets(models: Iterable[ModelSpec], default: Slo | None = None) -> dict[str, Slo | None]:
    """The targets of each model, its own before `default`."""
    return {model.name: model.slo or default for model in models}


class SimJudge:
    """Judges placements of the same models by their goodput under the same requests.

    Groups of units that were judged before, in whatever placement, are not simulated again.
    """

    def __init__(
        self,
        models: Sequence[ModelSpec],
        setting: Setting,
        arrivals: Sequence[Arrival],
        duration_s: float,
        slos: Mapping[str, Slo | None] | None = None,
        warmup_s: float = 0.0,
    ) -> None:
        """Requests come over `duration_s` seconds; those of the first `warmup_s` do not count.

        `slos` None takes those of the models.
        """
        self._models = tuple(models)
        self._setting = setting
        self._arrivals = tuple(arrivals)
        self._duration_s, self._warmup_s = duration_s, warmup_s
        self._slos = targets(models) if slos is None else slos
        self._kept: dict[tuple[UnitSpec, ...], GroupResult] = {}

    def __call__(self, placement: Placement) -> float:
        """Requests/s that meet both targets."""
        return self.report(placement).total.goodput_rps or 0.0

    def report(self, placement: Placement) -> Report:
        """All figures of a placement."""
        config = ServeConfig(models=self._models, units=placement.units)
        run = simulate(config, self._setting, self._arrivals, self._map)
        return make_report(run.served, run.units, self._slos, self._duration_s, self._warmup_s)

    def _map(
        self, run: Callable[[Task], GroupResult], asked: Iterable[Task]
    ) -> Iterable[GroupResult]:
        for task in asked:
            units = task.group.units
            if units not in self._kept:
                self._kept[units] = run(task)
            yield self._kept[units]
