"""The measuring of `muxrt profile`: which cell when, until all are known or the time is up."""

import os
import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from muxrt.cli.profile_control import Control, measure_control
from muxrt.cli.profile_service import Service, measure_service
from muxrt.cli.profile_source import Subject
from muxrt.cli.profile_target import Target
from muxrt.config.profile import SideBySide
from muxrt.core import Phase
from muxrt.cost.grid import Pass, levels
from muxrt.cost.memory import kv_token_bytes
from muxrt.cost.profile import Cell, Profile
from muxrt.engine.build import DTYPE_BYTES, kv_dtype
from muxrt.errors import ConfigError, MuxrtError
from muxrt.metrics import percentile
from muxrt.worker.probe import Beside, Probe, Slots

BURSTS, QUICK_BURSTS = 9, 3  # of each cell, if the time allows
QUICK_LEVELS = 2
BESIDE_S = 0.25  # of two passes beside each other, each time
BESIDE_SHARE = 0.15  # of the budget
SERVICE_SHARE, QUICK_SERVICE_S = 0.5, 2.0  # of requests, beyond the budget of cells
BESIDE_BATCH = 8
# A prompt as chats have them; longer ones read their weights more seldom and suffer less.
BESIDE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure."""

    lanes: tuple[int, ...]  # cores, or SMs, of each
    budget_s: float
    kv_bytes: int
    is_quick: bool = False

    @property
    def num_levels(self) -> int | None:
        return QUICK_LEVELS if self.is_quick else None

    @property
    def service_s(self) -> float:
        """Seconds of requests on lanes of either arrangement."""
        return QUICK_SERVICE_S if self.is_quick else SERVICE_SHARE * self.budget_s

    @property
    def num_bursts(self) -> int:
        return QUICK_BURSTS if self.is_quick else BURSTS


Key = tuple[str, int, Pass]  # model, cores or SMs of the lane, pass


@dataclass(slots=True)
class Found:
    """What was measured; times in seconds, lanes in parts of a device."""

    target: Target
    lanes: tuple[int, ...]
    load_average: float
    num_planned: int  # cells
    bursts: dict[Key, list[float]] = field(default_factory=dict)
    side_by_side: tuple[SideBySide, ...] = ()
    control: Control | None = None
    service: Service | None = None
    elapsed_s: float = 0.0

    @property
    def is_whole(self) -> bool:
        return len(self.bursts) == self.num_planned

    def share_pct(self, parts: int) -> int:
        """The part of the mesh's cores or SMs, as the profile's `sm_percent`."""
        return max(1, round(100 * parts / self.target.parts))

    def cells(self) -> tuple[Cell, ...]:
        """The table's rows: a prefill and a decode of the same sizes share one."""
        times: dict[tuple[str, int, int, int], dict[Phase, float]] = {}
        for (model, cores, one), bursts in self.bursts.items():
            key = (model, self.share_pct(cores), one.batch, one.seq_len)
            times.setdefault(key, {})[one.phase] = _estimate(bursts)
        return tuple(
            Cell(
                model,
                self.target.tp,
                pct,
                batch,
                length,
                found.get(Phase.PREFILL),
                found.get(Phase.DECODE),
            )
            for (model, pct, batch, length), found in times.items()
        )

    def spreads(self) -> list[float]:
        """Of each cell with several bursts: the interquartile range over the median."""
        found = []
        for bursts in self.bursts.values():
            low, high = percentile(bursts, 25), percentile(bursts, 75)
            if len(bursts) > 1 and low is not None and high is not None:
                found.append((high - low) / statistics.median(bursts))
        return found


def _estimate(bursts: list[float]) -> float:
    return statistics.median(bursts)


def measure(subject: Subject, target: Target, effort: Effort, console: Console) -> Found:
    """Load the models, measure until all is known, the budget is over or Ctrl-C.

    Raises ConfigError for models that cannot be run here, MuxrtError where nothing was measured.
    """
    grids = _grids(subject, effort, target)
    planned = len(effort.lanes) * sum(len(level) for grid in grids.values() for level in grid)
    found = Found(target, effort.lanes, os.getloadavg()[0], planned)
    with _showing(console, effort.budget_s) as show, _interruptible() as is_interrupted:
        models = {}
        for spec in subject.specs:
            show(f"loading {spec.name}", 0.0)
            models[spec.name] = target.load(spec, subject.shapes[spec.name])
        show("warming up", 0.0)
        passes = {name: [one for level in grid for one in level] for name, grid in grids.items()}
        place = target.place(models, effort.lanes)
        with Probe(subject.specs, subject.shapes, place, passes) as probe:
            begun_s = monotonic()
            clock = _Clock(begun_s, effort.budget_s, is_interrupted, show)
            _measure_cells(probe, grids, effort, clock, found)
            if len(target.halves) > 1:
                _measure_beside(probe, grids, effort, clock, found)
            found.elapsed_s = monotonic() - begun_s
        if not is_interrupted():
            show("the endpoint beside the steps", effort.budget_s)
            found.control = _control(subject, target.tp, console)
    if is_interrupted():
        console.print("interrupted: what was measured so far is kept")
    if not found.bursts:
        raise MuxrtError("nothing was measured: give it more time with --budget")
    return found


def _control(subject: Subject, tp: int, console: Console) -> Control | None:
    try:
        return measure_control(subject, tp)
    except MuxrtError as error:  # weights without a tokenizer can be measured, not served
        console.print(f"what the endpoint takes was not measured: {error.message}", markup=False)
        return None


def in_service(
    subject: Subject, profile: Profile, tp: int, effort: Effort, console: Console
) -> Service | None:
    """What steps take among those of other models, on lanes of the smallest size."""
    with _showing(console, effort.budget_s) as show:
        show("the models, served together", effort.budget_s)
        try:
            return measure_service(subject, profile, tp, effort.lanes[0], effort.service_s)
        except MuxrtError as error:
            console.print(f"steps in service were not measured: {error.message}", markup=False)
            return None


@dataclass(frozen=True, slots=True)
class _Clock:
    """When to stop, and whom to tell."""

    begun_s: float
    budget_s: float
    is_interrupted: Callable[[], bool]
    show: Callable[[str, float], None]

    def goes_on(self, share: float, doing: str) -> bool:
        """Whether less than `share` of the budget is used, and nobody wants to stop."""
        used_s = monotonic() - self.begun_s
        self.show(doing, used_s)
        return used_s < share * self.budget_s and not self.is_interrupted()


def _grids(subject: Subject, effort: Effort, target: Target) -> dict[str, list[list[Pass]]]:
    """Levels of passes by model. Raises ConfigError where KV memory holds no useful ones."""
    found = {}
    for spec in subject.specs:
        shape, tp = subject.shapes[spec.name], target.tp
        dtype_bytes = DTYPE_BYTES[kv_dtype(spec, shape, target.device)]
        token_bytes = tp * kv_token_bytes(shape, tp, dtype_bytes)
        room = effort.kv_bytes // len(subject.specs) // token_bytes
        longest = spec.max_model_len or shape.max_positions
        grid = _grid(longest, room)[: effort.num_levels]
        if len({one.batch for one in grid[0] if one.phase is Phase.DECODE}) < 2:
            raise ConfigError(
                f"--kv: {spec.name} has room for {room} tokens, expected enough for decodes of two"
                f" batch sizes and prompts of {longest} tokens at most: more memory would do"
            )
        found[spec.name] = grid
    return found


def _grid(longest: int, room: int) -> list[list[Pass]]:
    """Levels whose slots, which lie beside each other, hold at most `room` tokens together."""
    most = room
    while most:
        grid = levels(longest, most)
        if sum(Slots([one for level in grid for one in level]).tokens) <= room:
            return grid
        most //= 2
    return [[]]


def _measure_cells(
    probe: Probe,
    grids: dict[str, list[list[Pass]]],
    effort: Effort,
    clock: _Clock,
    found: Found,
) -> None:
    """Round after round over all cells, there and back; finer levels join in later rounds.

    So each cell's bursts lie far apart, and lanes alternate within a round: what the machine does
    slowly is not taken for a difference between cells.
    """
    most_levels = max(len(grid) for grid in grids.values())
    for number in range(effort.num_bursts + most_levels - 1):
        keys = [
            (model, lane, one)
            for level in range(min(number + 1, most_levels))
            for model, grid in grids.items()
            for one in grid[level]
            for lane in range(len(effort.lanes))
        ]
        for model, lane, one in keys if number % 2 == 0 else reversed(keys):
            bursts = found.bursts.get((model, effort.lanes[lane], one), [])
            if len(bursts) >= effort.num_bursts:
                continue
            doing = f"{model}: {one.phase.value} {one.batch} x {one.seq_len}"
            if not clock.goes_on(1 - BESIDE_SHARE, doing):
                return
            bursts.append(probe.burst(lane, model, one))
            found.bursts[model, effort.lanes[lane], one] = bursts


def _measure_beside(
    probe: Probe,
    grids: dict[str, list[list[Pass]]],
    effort: Effort,
    clock: _Clock,
    found: Found,
) -> None:
    """Each model's prefill beside decodes of the next one, on two halves of the mesh."""
    first_lane = len(effort.lanes)
    names = list(grids)
    pairs = list(zip(names, [*names[1:], names[0]], strict=True))
    rounds: dict[tuple[str, str], list[Beside]] = {}
    while clock.goes_on(1.0, "side by side") and len(rounds.get(pairs[-1], [])) < effort.num_bursts:
        for pair in pairs:
            if not clock.goes_on(1.0, f"{pair[0]} beside {pair[1]}"):
                break
            times = probe.beside(
                (first_lane, pair[0], _beside_prefill(grids[pair[0]])),
                (first_lane + 1, pair[1], _beside_decode(grids[pair[1]])),
                BESIDE_S,
            )
            rounds.setdefault(pair, []).append(times)
    found.side_by_side = tuple(
        _side_by_side(pair, several, grids, found.target) for pair, several in rounds.items()
    )


def _beside_prefill(grid: list[list[Pass]]) -> Pass:
    """A prompt of a size nearest to BESIDE_TOKENS."""
    prefills = [one for level in grid for one in level if one.phase is Phase.PREFILL]
    return min(prefills, key=lambda one: (abs(one.tokens - BESIDE_TOKENS), one.batch))


def _beside_decode(grid: list[list[Pass]]) -> Pass:
    """Decodes of level 0 at the batch size nearest to BESIDE_BATCH, and the longest context."""
    decodes = [one for one in grid[0] if one.phase is Phase.DECODE]
    return min(decodes, key=lambda one: (abs(one.batch - BESIDE_BATCH), -one.seq_len))


def _side_by_side(
    pair: tuple[str, str],
    rounds: list[Beside],
    grids: dict[str, list[list[Pass]]],
    target: Target,
) -> SideBySide:
    decode = _beside_decode(grids[pair[1]])
    times = Beside(*(_estimate(list(column)) for column in zip(*rounds, strict=True)))
    return SideBySide(
        prefill=pair[0],
        prefill_tokens=_beside_prefill(grids[pair[0]]).tokens,
        decode=pair[1],
        batch=decode.batch,
        context=decode.seq_len,
        lanes=target.halves,
        prefill_slowdown=round(times.first_s / times.first_alone_s, 4),
        decode_slowdown=round(times.second_s / times.second_alone_s, 4),
    )


@contextmanager
def _showing(console: Console, budget_s: float) -> Iterator[Callable[[str, float], None]]:
    """A bar of the budget; yields what to call with what is done now and the seconds used."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=2,  # it shares the cores with what is measured
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=budget_s)
        yield lambda doing, used_s: bar.update(task, description=doing, completed=used_s)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed; a second one ends the program."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
