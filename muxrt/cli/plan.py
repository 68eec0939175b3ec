"""`muxrt plan`: which models live together, on how many GPUs, and why."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from muxrt.cli.plan_input import Asked
    from muxrt.planner.capacity import Capacity
    from muxrt.planner.draft import Draft
    from muxrt.planner.queueing import QueueingJudge, Score
    from muxrt.planner.search import Judge
    from muxrt.planner.strategies.distserve import Options


class JudgeName(StrEnum):
    """Who decides between the best candidates of a search."""

    QUEUEING = "queueing"
    SIMULATOR = "simulator"


class StrategyName(StrEnum):
    """How to place."""

    AUTO = "auto"
    DISTSERVE = "distserve"
    MUXSERVE = "muxserve"
    SPATIAL = "spatial"
    SPLITWISE = "splitwise"
    TEMPORAL = "temporal"


class ObjectiveName(StrEnum):
    """What is to be least for the traffic that is asked for."""

    GPU = "gpu"
    DOLLAR = "dollar"
    WATT = "watt"


class AffinityName(StrEnum):
    """Where the two instances of a request may lie."""

    AUTO = "auto"
    HIGH = "high"
    LOW = "low"


Objectives = Annotated[
    ObjectiveName, typer.Option(help="distserve, splitwise: what is to be least.")
]
Affinities = Annotated[
    AffinityName, typer.Option(help="distserve: high: KV crosses nodes; low: it stays inside one.")
]
Stages = Annotated[
    int, typer.Option(min=1, help="distserve: pipeline stages; more than one is a plan only.")
]
Compat = Annotated[
    bool, typer.Option("--compat", help="distserve: with the paper's own simulator and its flaws.")
]
DISAGGREGATED = (StrategyName.DISTSERVE, StrategyName.SPLITWISE)


def plan(
    file: Annotated[Path, typer.Argument(help="Cluster and models: configs/plans/*.yaml.")],
    workload: Annotated[
        Path | None, typer.Argument(help="Instead of the file's: configs/workloads/*.yaml.")
    ] = None,
    strategy: Annotated[StrategyName, typer.Option(help="How to place.")] = StrategyName.AUTO,
    judge: Annotated[
        JudgeName, typer.Option(help="Who chooses between the final candidates of auto.")
    ] = JudgeName.QUEUEING,
    out: Annotated[Path | None, typer.Option(help="Write the placement to this file.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what every other place would cost.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw GPUs, weights and KV to scale: .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds of search.")] = 60.0,
    hour: Annotated[
        int | None, typer.Option(min=0, help="Of a diurnal workload; left out, the busiest.")
    ] = None,
    ttft: Annotated[
        float | None, typer.Option(min=1e-3, help="Seconds, for models without an slo.")
    ] = None,
    tpot: Annotated[
        float | None, typer.Option(min=1e-4, help="Seconds, for models without an slo.")
    ] = None,
    objective: Objectives = ObjectiveName.GPU,
    affinity: Affinities = AffinityName.AUTO,
    max_pp: Stages = 1,
    compat: Compat = False,
) -> None:
    """Choose which models live together, on how many GPUs, and say why.

    Ctrl-C ends the search and keeps the best so far.

    Example: muxrt plan configs/plans/muxserve.yaml --explain --out placement.yaml
    """
    if (ttft is None) != (tpot is None):
        raise typer.BadParameter("one goes with the other", param_hint="--ttft and --tpot")
    from muxrt.cli.plan_input import load_problem
    from muxrt.config.placement import Slo

    wanted = _Wanted(out, picture, explain, as_json)
    wanted.check()
    phases = _Phases(objective, affinity, max_pp, compat)
    _check_words(strategy, phases, judge, wanted)
    slo = Slo(ttft_s=ttft, tpot_s=tpot) if ttft is not None and tpot is not None else None
    asked = load_problem(file, workload, slo, hour)
    if strategy in DISAGGREGATED:
        from muxrt.cli.plan_disagg import report

        report(asked, strategy.value, phases.options(), out, as_json)
    else:
        _colocated(asked, strategy, judge, time_limit, wanted)


@dataclass(frozen=True, slots=True)
class _Phases:
    """What is asked of placements that take the phases apart."""

    objective: ObjectiveName = ObjectiveName.GPU
    affinity: AffinityName = AffinityName.AUTO
    max_pp: int = 1
    compat: bool = False

    def options(self) -> "Options":
        """The same in the planner's words."""
        from muxrt.planner.phase_plan import Objective
        from muxrt.planner.strategies.distserve import Affinity, Options

        return Options(
            affinity=Affinity(self.affinity.value),
            most_stages=self.max_pp,
            objective=Objective(self.objective.value),
            compat=self.compat,
        )


def _check_words(
    strategy: StrategyName, phases: _Phases, judge: JudgeName, wanted: "_Wanted"
) -> None:
    """Raise BadParameter for words that say nothing to the strategy."""
    if strategy in DISAGGREGATED:
        if wanted.picture is not None or wanted.explain or judge is not JudgeName.QUEUEING:
            raise typer.BadParameter(
                f"they go with colocated placements, not with {strategy.value}",
                param_hint="--picture, --explain, --judge",
            )
        if strategy is StrategyName.SPLITWISE and phases != _Phases(phases.objective):
            raise typer.BadParameter(
                "they go with distserve", param_hint="--max-pp, --affinity, --compat"
            )
    elif phases != _Phases():
        raise typer.BadParameter(
            "they go with distserve and splitwise",
            param_hint="--objective, --affinity, --max-pp, --compat",
        )


def _colocated(
    asked: "Asked", strategy: StrategyName, judge: JudgeName, time_limit: float, wanted: "_Wanted"
) -> None:
    """Search, and say what was found."""
    from muxrt.cli.show import console
    from muxrt.planner.assign import in_order
    from muxrt.planner.capacity import Capacity
    from muxrt.planner.feasible import check_feasible
    from muxrt.planner.queueing import QueueingJudge
    from muxrt.planner.search import Search
    from muxrt.planner.strategies import STRATEGIES

    estimator = QueueingJudge(asked.problem)
    capacity = Capacity(asked.problem, estimator)
    with _searching(console(stderr=True), time_limit) as (is_over, tell):
        tell("step times (the first plan on a machine compiles for some seconds)", 0, 1)
        check_feasible(asked.problem, capacity)
        search = Search(estimator, _judge(judge, asked, estimator), is_over, tell)
        draft = in_order(asked.problem, STRATEGIES[strategy.value](asked.problem, search))
    _report(asked, capacity, draft, estimator(draft), wanted)


def _judge(name: JudgeName, asked: "Asked", estimator: "QueueingJudge") -> "Judge":
    if name is JudgeName.QUEUEING:
        return estimator
    from muxrt.cli.plan_judge import simulator

    return simulator(asked, estimator)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be shown and written."""

    out: Path | None
    picture: Path | None
    explain: bool
    as_json: bool

    def check(self) -> None:
        """Raise ConfigError for a file that cannot be written, before anybody searches for long."""
        from muxrt.cli.plan_picture import check_name
        from muxrt.errors import ConfigError

        for path in (self.out, self.picture):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"{path}: found no folder {path.parent}, expected it to exist")
        if self.picture is not None:
            check_name(self.picture)


def _report(
    asked: "Asked", capacity: "Capacity", draft: "Draft", score: "Score", wanted: _Wanted
) -> None:
    import msgspec

    from muxrt.cli.plan_strategy import to_config
    from muxrt.cli.plan_tables import as_data, print_overloaded, print_plan, print_second_best
    from muxrt.cli.show import console
    from muxrt.config.load import dump
    from muxrt.config.placement import Placement
    from muxrt.planner.assign import overloaded
    from muxrt.planner.explain import second_best

    problem = asked.problem
    config = to_config(asked, draft, score)
    placement = Placement(config.units)
    others = second_best(problem, capacity, draft) if wanted.explain else []
    if wanted.out is not None:
        wanted.out.write_text(dump(config))
    if wanted.as_json:
        data = as_data(problem, capacity, draft, score, placement, others)
        print(msgspec.json.format(msgspec.json.encode(data)).decode())
    else:
        print_plan(console(), problem, capacity, draft, score, placement)
        print_overloaded(console(), overloaded(score), config.models)
        print_second_best(console(), others)
    if wanted.picture is not None:
        from muxrt.cli.plan_picture import draw

        draw(wanted.picture, problem, draft, score, placement)


@contextmanager
def _searching(
    console: "Console", limit_s: float
) -> Iterator[tuple[Callable[[], bool], Callable[[str, int, int], None]]]:
    """A bar while a search takes long; yields when it is over, and whom it tells."""
    import signal
    from time import monotonic

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    started_s = monotonic()
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    def is_over() -> bool:
        return interrupted or monotonic() - started_s > limit_s

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
        disable=not console.is_terminal,
    )
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with bar:
            task = bar.add_task("placing", total=None)

            def tell(what: str, done: int, total: int) -> None:
                bar.update(task, description=what, completed=done, total=total)

            yield is_over, tell
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        console.print("interrupted: the best placement so far")
