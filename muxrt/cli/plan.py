"""`muxrt plan`: which models live together, on how many GPUs, and why."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from muxrt.cli.plan_input import Asked
    from muxrt.planner.strategies.distserve import Options
    from muxrt.planner.strategies.mixed import Found


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
    ObjectiveName | None,
    typer.Option(
        help="auto, distserve, splitwise: what is to be least for the traffic; left out, auto"
        " serves the most that the cluster can."
    ),
]
Mixes = Annotated[
    bool,
    typer.Option(help="auto: models may have prefills and decodes on GPUs of their own."),
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
    objective: Objectives = None,
    mix: Mixes = True,
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
    phases = _Phases(objective, mix, affinity, max_pp, compat)
    _check_words(strategy, phases, judge, wanted)
    slo = Slo(ttft_s=ttft, tpot_s=tpot) if ttft is not None and tpot is not None else None
    asked = load_problem(file, workload, slo, hour)
    if strategy in DISAGGREGATED:
        from muxrt.cli.plan_disagg import report

        report(asked, strategy.value, phases.options(), out, as_json)
    else:
        found = _search(asked, strategy, judge, time_limit, phases)
        _report(asked, found, wanted)


@dataclass(frozen=True, slots=True)
class _Phases:
    """What is asked of placements that may take the phases apart."""

    objective: ObjectiveName | None = None
    may_mix: bool = True
    affinity: AffinityName = AffinityName.AUTO
    max_pp: int = 1
    compat: bool = False

    def options(self) -> "Options":
        """The same in the planner's words, for strategies that always take them apart."""
        from muxrt.planner.phase_plan import Objective
        from muxrt.planner.strategies.distserve import Affinity, Options

        return Options(
            affinity=Affinity(self.affinity.value),
            most_stages=self.max_pp,
            objective=Objective(self.objective or ObjectiveName.GPU),
            compat=self.compat,
        )


def _check_words(
    strategy: StrategyName, phases: _Phases, judge: JudgeName, wanted: "_Wanted"
) -> None:
    """Raise BadParameter for words that say nothing to the strategy."""
    if strategy in DISAGGREGATED and (
        wanted.picture is not None or wanted.explain or judge is not JudgeName.QUEUEING
    ):
        raise typer.BadParameter(
            f"they do not go with {strategy.value}", param_hint="--picture, --explain, --judge"
        )
    said = {
        "--objective": phases.objective is not None,
        "--no-mix": not phases.may_mix,
        "--affinity": phases.affinity is not AffinityName.AUTO,
        "--max-pp": phases.max_pp > 1,
        "--compat": phases.compat,
    }
    known = {
        StrategyName.AUTO: {"--objective", "--no-mix"},
        StrategyName.DISTSERVE: {"--objective", "--affinity", "--max-pp", "--compat"},
        StrategyName.SPLITWISE: {"--objective"},
    }
    wrong = [
        word for word, is_said in said.items() if is_said and word not in known.get(strategy, ())
    ]
    if wrong:
        fitting = [one.value for one, words in known.items() if wrong[0] in words]
        raise typer.BadParameter(
            f"it goes with {' and '.join(fitting)}, not with {strategy.value}",
            param_hint=wrong[0],
        )


def _search(
    asked: "Asked", strategy: StrategyName, judge: JudgeName, time_limit: float, phases: _Phases
) -> "Found":
    """A placement by a strategy that can colocate."""
    from muxrt.cli.plan_judge import Simulator
    from muxrt.cli.plan_strategy import colocated
    from muxrt.cli.show import console
    from muxrt.planner.phase_plan import Objective
    from muxrt.planner.queueing import QueueingJudge
    from muxrt.planner.search import Search
    from muxrt.planner.strategies.mixed import Found, Terms, mixed

    estimator, simulator = QueueingJudge(asked.problem), Simulator(asked)
    is_simulated = judge is JudgeName.SIMULATOR
    with _searching(console(stderr=True), time_limit) as (is_over, tell):
        tell("step times (the first plan on a machine compiles for some seconds)", 0, 1)
        of_drafts = partial(simulator.draft, estimator) if is_simulated else estimator
        search = Search(estimator, of_drafts, is_over, tell)
        if strategy is not StrategyName.AUTO:
            return Found(colocated(asked, strategy.value, search), None)
        least = None if phases.objective is None else Objective(phases.objective.value)
        terms = Terms(simulator.mix, is_simulated, least, may_split=phases.may_mix)
        return mixed(asked.problem, search, terms)


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


def _report(asked: "Asked", found: "Found", wanted: _Wanted) -> None:
    from muxrt.cli.plan_report import report

    report(
        asked,
        found,
        out=wanted.out,
        picture=wanted.picture,
        explain=wanted.explain,
        as_json=wanted.as_json,
    )


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
