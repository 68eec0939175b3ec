"""What does sharing buy? One engine on the same cores, four ways to share memory and compute.

    python scripts/bench_sharing.py

Per cell (a set of models, a popularity) a first endpoint with memory for all finds the rate that
it sustains and the KV memory in use at that rate. Then an endpoint each with 60 % of that memory:

adbs        any block for any model, two lanes, ADBS
spatial     the same, but every model has a fixed share of the memory, by its known rate
moved       spatial, but popularity has moved since: shares are by the rate of the next model
temporal    any block for any model, one lane of all cores, first come first served

All are up all the time and get the same requests, one endpoint after the other.
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from bench_models import FOLDER as MODELS_FOLDER
from bench_models import preset_folders, random_folder
from bench_rates import WANTED, Load, Point, measure, sustained, warm_up
from bench_record import CORES, FOLDER, Record, draw, stop_on_sigterm
from bench_serving import Serving, muxrt_serving, one_unit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from muxrt.config.model import load_shape
from muxrt.config.placement import GIB, Lanes, Memory, Scheduling, Slo
from muxrt.config.serve import ServeConfig
from muxrt.engine.build import plan_unit
from muxrt.workload.spec import Lengths

HALVES = tuple(share for share in (len(CORES) - len(CORES) // 2, len(CORES) // 2) if share)
WALLS = Scheduling(policy="adbs", borrow=False, quota_period_s=0.0)
MODES = {
    "adbs": (Lanes(split=HALVES), Scheduling(policy="adbs")),
    "spatial": (Lanes(split=HALVES), WALLS),
    "moved": (Lanes(split=HALVES), WALLS),
    "temporal": (Lanes(split=(len(CORES),)), Scheduling(policy="fcfs")),
}
PROMPT_MOST, OUTPUT_MOST = 160, 160
SLACK = 64  # a prompt's text may become more tokens than it was made for
PROMPT = Lengths(mean_tokens=100, cv=0.5, max_tokens=PROMPT_MOST)
OUTPUT = Lengths(mean_tokens=80, cv=0.5, max_tokens=OUTPUT_MOST)
SLO = Slo(ttft_s=1.0, tpot_s=0.1)
ARENA_SHARE = 0.6  # of the peak demand
LADDER = 1.6  # from one rate to the next while the sustained one is looked for
# KV heads of 64 everywhere, so that all models take blocks of one size. Eight that are small
# enough for two cores to step each of them within a TPOT of 100 ms; the popular ones are small.
TINY = ("--hidden", "256", "--layers", "6", "--heads", "4")
SETS: dict[str, tuple[str, ...]] = {
    "3": ("27m", "27m-gqa", "88m"),
    "8": ("tiny-a", "tiny-b", "27m-gqa", "tiny-c", "27m", "tiny-d", "27m-gqa-b", "27m-b"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    sets: tuple[str, ...]
    alphas: tuple[float, ...]
    loads: tuple[float, ...]  # times the rate that memory for all sustains
    first_rps: float  # where the search for that rate begins
    seconds: float
    rounds: int
    modes: tuple[str, ...] = tuple(MODES)
    most_steps: int = 8  # of that search
    prompt: Lengths = PROMPT
    output: Lengths = OUTPUT
    max_model_len: int = PROMPT_MOST + OUTPUT_MOST + SLACK
    slo: Slo = SLO
    big_bytes: int = 2 * GIB


def set_folders(name: str, under: Path = MODELS_FOLDER) -> list[Path]:
    """The model folders of a set, most popular first."""
    return [_folder(model, under) for model in SETS[name]]


def _folder(model: str, under: Path) -> Path:
    if model.startswith("tiny"):
        return random_folder(under / model, *TINY)
    if model.endswith("-b"):  # the same shape under a second name
        return random_folder(under / model, "--preset", model.removesuffix("-b"))
    return preset_folders([model], under)[0]


@dataclass(frozen=True, slots=True)
class Cell:
    """A set of models with a popularity."""

    name: str
    folders: tuple[Path, ...]
    alpha: float

    @property
    def weights(self) -> tuple[float, ...]:
        """The models' traffic: the i-th in proportion to i^-alpha."""
        return tuple((rank + 1) ** -self.alpha for rank in range(len(self.folders)))


class Runner:
    """Measures cells one after the other."""

    def __init__(self, plan: Plan, record: Record, progress: Progress) -> None:
        self._plan, self._record, self._progress = plan, record, progress

    def run(self, cell: Cell) -> None:
        """The demand first, then the modes."""
        demand = self._demand(cell)
        kv_bytes = int(demand["arena_bytes"])
        task = self._progress.add_task(cell.name, total=self._plan.rounds * len(self._plan.loads))
        with ExitStack() as stack:
            endpoints = {
                mode: stack.enter_context(muxrt_serving(self._config(cell, kv_bytes, mode)))
                for mode in self._plan.modes
            }
            for serving in endpoints.values():
                warm_up(serving.urls, self._load(cell), self._plan.first_rps)
            for seed in range(self._plan.rounds):
                for times in self._plan.loads:
                    rate_rps = times * demand["sustained_rps"]
                    for mode, serving in endpoints.items():
                        point = self._measure(cell, mode, serving, rate_rps, seed)
                        row = {"cell": cell.name, "load": times, "round": seed}
                        self._record.add("points", row | asdict(point))
                    self._progress.advance(task)

    def _demand(self, cell: Cell) -> dict[str, Any]:
        """The rate that is sustained with memory for all, and the memory in use there."""
        config = self._config(cell, self._plan.big_bytes, "adbs")
        unit = config.units[0]
        shapes = {folder.name: load_shape(folder) for folder in cell.folders}
        plan = plan_unit(unit, {spec.name: spec for spec in config.models}, shapes)
        points: list[Point] = []
        with muxrt_serving(config) as serving:
            warm_up(serving.urls, self._load(cell), self._plan.first_rps)
            for step in range(self._plan.most_steps):
                rate_rps = self._plan.first_rps * LADDER**step
                points.append(self._measure(cell, "demand", serving, rate_rps, seed=0))
                if points[-1].attainment < WANTED:
                    break
            at_90 = sustained(points)
            peak = self._measure(cell, "demand", serving, at_90.rate_rps, seed=0)
        # Less than one sequence of full length per model is refused at the start.
        floor_blocks = sum(model.floor_blocks for model in plan.models.values())
        used_blocks = peak.blocks_used or 0
        blocks = max(floor_blocks, int(ARENA_SHARE * used_blocks))
        row = {
            "cell": cell.name,
            "sustained_rps": at_90.rate_rps,
            "sustained_how": at_90.how,
            "peak_bytes": used_blocks * plan.arena.block_bytes,
            "floor_bytes": floor_blocks * plan.arena.block_bytes,
            "arena_bytes": blocks * plan.arena.block_bytes,
            "arena_share": blocks / used_blocks if used_blocks else None,
            "at_peak": asdict(peak),
        }
        self._record.add("demand", row)
        return row

    def _config(self, cell: Cell, kv_bytes: int, mode: str) -> ServeConfig:
        lanes, scheduling = MODES[mode]
        weights = cell.weights
        return one_unit(
            cell.folders,
            (*weights[1:], weights[0]) if mode == "moved" else weights,
            Memory(kv_bytes=kv_bytes, swap_bytes=kv_bytes),
            lanes,
            scheduling,
            max_model_len=self._plan.max_model_len,
            slo=self._plan.slo,
        )

    def _load(self, cell: Cell) -> Load:
        plan = self._plan
        names = tuple(folder.name for folder in cell.folders)
        return Load(names, cell.weights, plan.prompt, plan.output, plan.slo)

    def _measure(
        self, cell: Cell, setting: str, serving: Serving, rate_rps: float, seed: int
    ) -> Point:
        load = self._load(cell)
        point = measure(setting, serving.urls, load, rate_rps, self._plan.seconds, seed)
        self._progress.console.print(
            f"{cell.name}, {setting}: {point.offered_rps:.1f}/s offered, {point.attainment:.0%} in"
            f" SLO, {point.blocks_used} blocks, {point.preempted} preempted"
        )
        return point


def summary(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per cell: medians over the rounds, and adbs over the other modes."""
    cells = dict.fromkeys(row["cell"] for row in data.get("points", []))
    return [_cell_summary(data, cell) for cell in cells]


def _cell_summary(data: dict[str, Any], cell: str) -> dict[str, Any]:
    goodput: dict[str, dict[str, float]] = {}  # mode -> load -> requests/s
    settings = {row["setting"] for row in data["points"]}
    for mode in (mode for mode in MODES if mode in settings):
        rows = [row for row in data["points"] if (row["cell"], row["setting"]) == (cell, mode)]
        goodput[mode] = {
            f"{times:g}": statistics.median(
                row["goodput_rps"] for row in rows if row["load"] == times
            )
            for times in sorted({row["load"] for row in rows})
        }
    best = {mode: max(by_load.values(), default=0.0) for mode, by_load in goodput.items()}
    others = [mode for mode in best if mode != "adbs" and best[mode]]
    return {
        "cell": cell,
        "goodput_rps": goodput,
        "best_goodput_rps": best,
        "adbs_over": {mode: best["adbs"] / best[mode] for mode in others},
        "adbs_over_at_equal_load": {
            mode: {load: goodput["adbs"][load] / rps for load, rps in goodput[mode].items() if rps}
            for mode in others
        },
    }


def show(data: dict[str, Any]) -> None:
    """Goodput by cell, mode and load."""
    loads = [f"{times:g}" for times in data["settings"]["loads"]]
    table = Table("cell", "mode", *(f"goodput/s\nat {load} x" for load in loads), "best", "adbs /")
    for row in data["summary"]:
        for mode, by_load in row["goodput_rps"].items():
            cells = [f"{by_load.get(load, 0):.2f}" for load in loads]
            over = f"{row['adbs_over'][mode]:.2f}" if mode in row["adbs_over"] else ""
            table.add_row(row["cell"], mode, *cells, f"{row['best_goodput_rps'][mode]:.2f}", over)
        table.add_section()
    Console().print(table)


def cells_of(plan: Plan) -> Iterator[Cell]:
    """Every set with every popularity."""
    for name in plan.sets:
        folders = tuple(set_folders(name))
        for alpha in plan.alphas:
            yield Cell(f"{len(folders)} models, alpha {alpha:g}", folders, alpha)


def sharing(plan: Plan, cells: Sequence[Cell], out: Path) -> dict[str, Any]:
    """Measure, write, print."""
    modes = {mode: msgspec.to_builtins(MODES[mode]) for mode in plan.modes}
    record = Record(out, {**msgspec.to_builtins(plan), "modes": modes, "arena": ARENA_SHARE})
    with Progress() as progress:
        for cell in cells:
            Runner(plan, record, progress).run(cell)
            record.put("summary", summary(record.data))
    show(record.data)
    return record.data


def main(
    sets: Annotated[str, typer.Option(help="How many models: 3, 8.")] = "3,8",
    alphas: Annotated[str, typer.Option(help="Of the power law of popularity.")] = "0.9,2.1",
    loads: Annotated[
        str, typer.Option(help="Offered, times the rate that memory for all sustains.")
    ] = "0.9,1.1",
    first_rate: Annotated[float, typer.Option(help="Where the search for it begins.")] = 4.0,
    seconds: Annotated[float, typer.Option(help="Of load per run.")] = 15.0,
    rounds: Annotated[int, typer.Option(help="Runs of each kind; the median counts.")] = 1,
    modes: Annotated[str, typer.Option(help="Ways to share.")] = ",".join(MODES),
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the plot.")] = FOLDER,
) -> None:
    """Goodput of the ways to share.

    Example: bench_sharing.py --sets 3 --alphas 0.9 --rounds 3
    """
    plan = Plan(
        sets=tuple(sets.split(",")),
        alphas=tuple(float(alpha) for alpha in alphas.split(",")),
        loads=tuple(float(times) for times in loads.split(",")),
        first_rps=first_rate,
        seconds=seconds,
        rounds=rounds,
        modes=tuple(modes.split(",")),
    )
    sharing(plan, list(cells_of(plan)), out / "sharing.json")
    draw("sharing", out)


if __name__ == "__main__":
    stop_on_sigterm()
    typer.run(main)
