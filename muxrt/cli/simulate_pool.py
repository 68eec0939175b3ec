"""Simulations in one process or several, and a bar that says how far they are."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from typing import Protocol, TypeVar, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from muxrt.cli.simulate_input import Case, Known, Load, Variant, make_case
from muxrt.sim.group import GroupResult
from muxrt.sim.report import Report, make_report
from muxrt.sim.search import Found, attains, find_speed
from muxrt.sim.simulate import Map, Task, run_task, simulate

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

# Of this process and those of its pool: simulations that are done, with parts of those that run.
_done: "Synchronized[float]" = multiprocessing.Value("d", 0.0)


def _share(done: "Synchronized[float]") -> None:
    global _done
    _done = done


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation: a placement at a speed, from a seed."""

    variant: Variant
    known: Known
    load: Load
    speed: float
    number: int  # of the seed


@dataclass(frozen=True, slots=True)
class Rate:
    """The largest speed with the targets kept, and what it is in requests/s; 0 for none."""

    found: Found
    rate_rps: float


def find_rate(target: float, cell: Cell) -> Rate:
    """Search for the largest speed at which `target` of the requests meet their SLO."""

    def at(speed: float) -> Case:
        return make_case(cell.variant, cell.known, cell.load, speed, cell.number)

    def holds(speed: float) -> bool:
        case = at(speed)
        return attains(case.config, case.setting, case.arrivals, case.slos, target)

    found = find_speed(holds)
    case = at(found.speed or 1.0)
    _tell(1.0)
    return Rate(found, len(case.arrivals) / case.duration_s if found.speed else 0.0)


def find_rates(
    cells: list[Cell], target: float, processes: int, console: Console | None
) -> list[Rate]:
    """The largest rate of each cell, its speed left aside, as `run_cells` does it."""
    with _pool(processes) as map_, _bar(console, len(cells)):
        return list(map_(partial(find_rate, target), cells))


def _tell(part: float) -> None:
    with _done.get_lock():
        _done.value += part


@dataclass(frozen=True, slots=True)
class _Told:
    """Serves a group and counts its requests as parts of a simulation of `num_requests`."""

    num_requests: int

    def __call__(self, task: Task) -> GroupResult:
        return run_task(task, lambda num_requests: _tell(num_requests / self.num_requests))


def run_cell(cell: Cell, map_: Map = map) -> Report:
    """Simulate. Raises ConfigError."""
    case = make_case(cell.variant, cell.known, cell.load, cell.speed, cell.number)
    told = _Told(len(case.arrivals))
    done = simulate(case.config, case.setting, case.arrivals, map_, told)
    return make_report(done.served, done.units, case.slos, case.duration_s, cell.load.warmup_s)


def run_cells(cells: list[Cell], processes: int, console: Console | None) -> list[Report]:
    """All of them, spread over `processes`: reports in the order of the cells, whatever it is.

    A single one is spread by its groups of units. `console` shows a bar; None does not.
    """
    with _pool(processes) as map_, _bar(console, len(cells)):
        if len(cells) == 1:
            return [run_cell(cells[0], map_)]
        return list(map_(run_cell, cells))


class _Map(Protocol):
    """The `map` of a pool, or the one of one process."""

    def __call__(
        self, run: Callable[[Asked], Answer], asked: Iterable[Asked], /
    ) -> Iterable[Answer]: ...


@contextmanager
def _pool(processes: int) -> Iterator[_Map]:
    _share(multiprocessing.Value("d", 0.0))  # of the present way to start processes
    if processes == 1:
        yield cast(_Map, map)
        return
    with ProcessPoolExecutor(processes, initializer=_share, initargs=(_done,)) as pool:
        # All processes start here, before the bar has a thread that they would inherit.
        pool.submit(int).result()
        yield cast(_Map, pool.map)


class _Bar(Progress):
    """Looks up how far the simulations are whenever it is drawn."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            task.completed = _done.value
        yield from super().get_renderables()


@contextmanager
def _bar(console: Console | None, total: int) -> Iterator[None]:
    with ExitStack() as stack:
        if console is not None and console.is_terminal:
            bar = stack.enter_context(
                _Bar(
                    TextColumn("simulating"),
                    BarColumn(bar_width=None),
                    TaskProgressColumn(),
                    TimeElapsedColumn(),
                    console=console,
                    transient=True,
                    refresh_per_second=4,
                )
            )
            bar.add_task("", total=total)
        yield
