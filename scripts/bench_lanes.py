"""What does a way of cutting the cores into lanes cost? One load, four splits, one table.

    python scripts/bench_lanes.py --models DIR [DIR ...] --out docs/benchmarks

One lane of all cores, one lane per core as threads of one process (they share the GIL), the same
as processes, and one lane of all cores in a process of its own. The load is open-loop Poisson;
the brain is the served one, without HTTP. Figures are medians over `--rounds` alternating runs.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import typer
from bench_record import CORES, provenance
from bench_unit import greedy, model_spec, own_unit
from rich.console import Console
from rich.progress import track
from rich.table import Table

from muxrt.config.placement import Lanes, Memory, UnitModel, UnitSpec
from muxrt.core import Output, Request

KV_BYTES = 1 << 30
MAX_MODEL_LEN = 512
MEAN_PROMPT, MEAN_OUTPUT = 100, 60
SPLITS = {
    "1 lane, all cores, thread": Lanes(kind="cores", split=(len(CORES),)),
    "1 lane per core, threads": Lanes(kind="cores", split=(1,) * len(CORES)),
    "1 lane per core, processes": Lanes(kind="processes", split=(1,) * len(CORES)),
    "1 lane, all cores, process": Lanes(kind="processes", split=(len(CORES),)),
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the load."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run gave."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


class Timeline:
    """When each request got its tokens."""

    def __init__(self) -> None:
        self.first_s: dict[int, float] = {}
        self.last_s: dict[int, float] = {}
        self.num_tokens: dict[int, int] = {}

    def emit(self, outputs: tuple[Output, ...]) -> None:
        now = time.monotonic()
        for output in outputs:
            rid = output.request_id
            self.first_s.setdefault(rid, now)
            self.last_s[rid] = now
            self.num_tokens[rid] = self.num_tokens.get(rid, 0) + len(output.tokens)


def make_load(models: list[str], rate_rps: float, duration_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals, popularity 1/rank, lognormal lengths."""
    random, at_s, load = Random(seed), 0.0, []
    weights = [1 / (rank + 1) for rank in range(len(models))]
    while (at_s := at_s + random.expovariate(rate_rps)) < duration_s:
        model = random.choices(models, weights)[0]
        lengths = [
            min(MAX_MODEL_LEN // 2, max(1, round(mean * random.lognormvariate(-0.125, 0.5))))
            for mean in (MEAN_PROMPT, MEAN_OUTPUT)
        ]
        load.append(Arrival(at_s, model, *lengths))
    return load


def measure(folders: list[Path], lanes: Lanes, load: list[Arrival]) -> Figures:
    """Serve `load` with the cores cut like `lanes`."""
    names = [folder.name for folder in folders]
    spec = UnitSpec(
        name="bench",
        models=tuple(UnitModel(name=name) for name in names),
        memory=Memory(kv_bytes=KV_BYTES),
        lanes=lanes,
    )
    models = tuple(
        model_spec(folder, dtype="float32", max_model_len=MAX_MODEL_LEN) for folder in folders
    )
    timeline = Timeline()
    with own_unit(spec, models, timeline.emit) as own:
        for name in names:  # a first request each: nobody is charged for warming up
            own.unit.add(request_of(10_000_000 + names.index(name), Arrival(0, name, 100, 8)))
        own.finish()
        begun_s, rest = time.monotonic(), list(enumerate(load))[::-1]
        while rest or not own.unit.is_idle:
            while rest and rest[-1][1].at_s <= time.monotonic() - begun_s:
                own.unit.add(request_of(*rest.pop()))
            wait_s = rest[-1][1].at_s - (time.monotonic() - begun_s) if rest else 0.1
            own.turn(max(0.0, min(0.1, wait_s)))
    return figures_of(timeline, load, begun_s)


def request_of(rid: int, arrival: Arrival) -> Request:
    """A request of random tokens that runs to its full length."""
    tokens = np.random.default_rng(rid).integers(10, 2_000, arrival.prompt_tokens, dtype=np.int32)
    return greedy(rid, arrival.model, tokens, arrival.output_tokens)


def figures_of(timeline: Timeline, load: list[Arrival], begun_s: float) -> Figures:
    ttft = [timeline.first_s[rid] - begun_s - load[rid].at_s for rid in range(len(load))]
    tpot = [
        (timeline.last_s[rid] - timeline.first_s[rid]) / (timeline.num_tokens[rid] - 1)
        for rid in range(len(load))
        if timeline.num_tokens[rid] > 1
    ]
    tokens = sum(timeline.num_tokens[rid] for rid in range(len(load)))
    elapsed_s = max(timeline.last_s.values()) - begun_s
    return Figures(
        tokens / elapsed_s,
        *(float(x) for x in np.percentile(ttft, [50, 99])),
        *(float(x) for x in np.percentile(tpot, [50, 99])),
    )


def median(runs: list[Figures]) -> Figures:
    columns = zip(*(asdict(run).values() for run in runs), strict=True)
    return Figures(*(statistics.median(column) for column in columns))


def main(
    models: Annotated[list[Path], typer.Option(help="Hugging Face folders, most popular first.")],
    rate: Annotated[float, typer.Option(help="Requests per second offered, all models.")] = 3.0,
    duration: Annotated[float, typer.Option(help="Seconds of load per run.")] = 20.0,
    rounds: Annotated[int, typer.Option(help="Runs of each split, alternating.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON.")] = None,
) -> None:
    """Compare ways to cut the cores into lanes."""
    runs: dict[str, list[Figures]] = {name: [] for name in SPLITS}
    for number in track(range(rounds * len(SPLITS)), "measuring"):
        name = list(SPLITS)[number % len(SPLITS)]
        load = make_load([m.name for m in models], rate, duration, seed=number // len(SPLITS))
        runs[name].append(measure(models, SPLITS[name], load))
    found = {name: median(results) for name, results in runs.items()}
    table = Table("lanes", "tokens/s", "TTFT p50 ms", "p99", "TPOT p50 ms", "p99")
    for name, row in found.items():
        times = (row.ttft_p50_s, row.ttft_p99_s, row.tpot_p50_s, row.tpot_p99_s)
        table.add_row(name, f"{row.tokens_per_s:.0f}", *(f"{1e3 * t:.1f}" for t in times))
    Console().print(table)
    if out:
        report = {
            **provenance(),
            "models": [m.name for m in models],
            "rate_rps": rate,
            "duration_s": duration,
            "rounds": rounds,
            "lanes": {name: asdict(row) for name, row in found.items()},
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "lanes.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
