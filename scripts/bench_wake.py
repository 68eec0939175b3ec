"""How fast a model wakes: its weights from host memory, against plain copies of as many bytes.

    python scripts/bench_wake.py --out docs/benchmarks

`copy` moves bytes between buffers whose pages are there (numpy, a part per thread): the bandwidth
that is meant by the memory's. `copy to new pages` does the same into memory that was given back:
the system zeroes each page before, which `zero` does and nothing else. `wake` takes over the pages
of a model that made room for it, or of blocks that did; `wake to own pages` finds those that the
system could have had since the model fell asleep and did not need; `wake to new pages` is the first
one, or after the system did. Lanes that are processes share their weights: shared pages cannot
change hands, so they are always new. Figures are medians over alternating rounds.
"""

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from bench_models import preset_folders
from bench_record import CORES, FOLDER, provenance

from muxrt.models.llama import Llama
from muxrt.worker.host_weights import PIECE_BYTES, HostWeights
from muxrt.worker.kv_storage import Segment

PAGE = 4096  # bytes

Case = Callable[[], float]


class Wakes(NamedTuple):
    """What can be timed of a model that sleeps."""

    num_bytes: int
    cases: dict[str, Case]


def timed(work: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def copies(num_bytes: int, threads: ThreadPoolExecutor) -> dict[str, Case]:
    """Seconds of one copy of `num_bytes`, into pages that are there and into new ones."""
    source = np.ones(num_bytes, dtype=np.uint8)
    warm = np.zeros(num_bytes, dtype=np.uint8)
    fresh = Segment(num_bytes, is_private=True)
    target = fresh.tensor().numpy()
    parts = [slice(b, min(b + PIECE_BYTES, num_bytes)) for b in range(0, num_bytes, PIECE_BYTES)]

    def copy(to: Any) -> None:
        list(threads.map(lambda part: np.copyto(to[part], source[part]), parts))

    def copy_new() -> float:
        fresh.discard()
        return timed(lambda: copy(target))

    def zero() -> float:
        fresh.discard()
        return timed(lambda: list(threads.map(lambda part: target[part][::PAGE].fill(0), parts)))

    copy(warm)
    return {
        "copy": lambda: timed(lambda: copy(warm)),
        "zero": zero,
        "copy to new pages": copy_new,
    }


def wakes(folder: Path, kind: str, threads: ThreadPoolExecutor, stack: ExitStack) -> Wakes:
    """A model of lanes of this kind, put to sleep and woken."""
    is_private = kind == "cores"
    weights, other = (HostWeights.of(Llama.load(folder, "auto"), is_private)[0] for _ in range(2))
    stack.callback(weights.close)
    stack.callback(other.close)

    def wake_to_new() -> float:
        weights.drop()
        return timed(lambda: weights.load(threads))

    def take_and_load() -> None:
        weights.weights.segment.take_pages(0, other.weights.segment)
        weights.load(threads)

    def wake() -> float:
        weights.drop()
        other.load(threads)
        seconds = timed(take_and_load)
        other.drop()
        return seconds

    def wake_to_own() -> float:
        weights.load(threads)
        weights.weights.segment.offer()
        return timed(lambda: weights.load(threads))

    def sleep() -> float:
        weights.load(threads)
        return timed(weights.weights.segment.offer)

    cases = {"wake to new pages": wake_to_new, "sleep": sleep}
    if is_private:
        cases |= {"wake": wake, "wake to own pages": wake_to_own}
    return Wakes(weights.num_bytes, cases)


def measure(folder: Path, kind: str, num_threads: int, rounds: int) -> dict[str, Any]:
    """Medians of all cases for one model, as GB/s."""
    with ThreadPoolExecutor(num_threads) as threads, ExitStack() as stack:
        num_bytes, cases = wakes(folder, kind, threads, stack)
        cases = copies(num_bytes, threads) | cases
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                seconds[name].append(case())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    sleep_s = medians.pop("sleep")
    return {
        "model": folder.name,
        "lanes": kind,
        "mb": round(num_bytes / 1e6, 1),
        "threads": num_threads,
        "gb_per_s": {name: round(num_bytes / s / 1e9, 2) for name, s in medians.items()},
        "of_copy": {name: round(medians["copy"] / s, 2) for name, s in medians.items()},
        "sleep_ms": round(sleep_s * 1e3, 2),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for wake.json.")] = FOLDER,
    models: Annotated[list[str], typer.Option(help="Presets.")] = ["27m", "88m"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Measure and write wake.json."""
    rows = [
        measure(folder, kind, num_threads, rounds)
        for folder in preset_folders(models)
        for kind in ("cores", "processes")
        for num_threads in sorted({1, len(CORES)})
    ]
    for row in rows:
        print(json.dumps(row))
    out.mkdir(parents=True, exist_ok=True)
    data = {**provenance(), "rounds": rounds, "rows": rows}
    (out / "wake.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
