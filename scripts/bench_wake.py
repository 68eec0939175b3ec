"""How fast a model wakes: its weights from host memory, against plain copies of as many bytes.

    python scripts/bench_wake.py --out docs/benchmarks

`copy` moves bytes between buffers whose pages are there (numpy, a part per thread): the bandwidth
that is meant by the memory's. `copy to new pages` does the same into memory that was given back:
the system zeroes each page before. A `wake` takes over the pages of a model that made room for it;
where no model had to, its pages are new. Figures are medians over alternating rounds.
"""

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bench_models import preset_folders
from bench_record import CORES, FOLDER, provenance

from muxrt.models.llama import Llama
from muxrt.worker.host_weights import PIECE_BYTES, HostWeights
from muxrt.worker.kv_storage import Segment

Case = Callable[[], float]


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

    copy(warm)
    return {"copy": lambda: timed(lambda: copy(warm)), "copy to new pages": copy_new}


def measure(folder: Path, num_threads: int, rounds: int) -> dict[str, Any]:
    """Medians of all cases for one model, as GB/s."""
    pair = [HostWeights.of(Llama.load(folder, "auto"), is_private=True)[0] for _ in range(2)]
    weights, other = pair
    with ThreadPoolExecutor(num_threads) as threads:
        cases = copies(weights.num_bytes, threads)

        def wake_to_new() -> float:
            weights.drop()
            return timed(lambda: weights.load(threads))

        def wake() -> float:
            weights.drop()
            other.load(threads)
            seconds = timed(lambda: weights.load(threads, [other.weights.segment]))
            other.drop()
            return seconds

        cases |= {"wake to new pages": wake_to_new, "wake": wake}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                seconds[name].append(case())
        drop_s = statistics.median(timed(weights.drop) for _ in range(rounds))
    for one in pair:
        one.close()
    speeds = {
        name: round(weights.num_bytes / statistics.median(values) / 1e9, 2)
        for name, values in seconds.items()
    }
    return {
        "model": folder.name,
        "mb": round(weights.num_bytes / 1e6, 1),
        "threads": num_threads,
        "gb_per_s": speeds,
        "wake_ms": round(statistics.median(seconds["wake"]) * 1e3, 2),
        "sleep_ms": round(drop_s * 1e3, 2),
        "wake_of_copy": round(speeds["wake"] / speeds["copy"], 2),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for wake.json.")] = FOLDER,
    models: Annotated[list[str], typer.Option(help="Presets.")] = ["27m", "88m"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Measure and write wake.json."""
    rows = [
        measure(folder, num_threads, rounds)
        for folder in preset_folders(models)
        for num_threads in sorted({1, len(CORES)})
    ]
    for row in rows:
        print(json.dumps(row))
    out.mkdir(parents=True, exist_ok=True)
    data = {**provenance(), "rounds": rounds, "rows": rows}
    (out / "wake.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
