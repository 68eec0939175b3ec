"""What a hand-over costs a client: the delay of the second token, by prompt length.

    python scripts/bench_handoff.py                # docs/benchmarks/handoff.json
    python scripts/bench_handoff.py --rounds 2 --lengths 64 --transfers shared   # does it run?

One model, one request at a time. `one unit` does both phases; the others prefill in one process
and decode in another, K and V moved by NIXL or through memory that both have mapped. All endpoints
are up all the time and asked in turns. A prompt is moved after it was computed, so its transfer
is not hidden behind anything.
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import typer
from bench_models import preset_folders
from bench_record import FOLDER, Record, stop_on_sigterm
from bench_serving import muxrt_serving, one_unit
from rich.console import Console
from rich.table import Table

from muxrt.bench.client import replay, session
from muxrt.bench.job import Job, Outcome, Progress, Status, Target
from muxrt.config.placement import GIB, Lanes, Memory, Mesh, Role, Scheduling, UnitModel
from muxrt.config.serve import ServeConfig

TOGETHER = "one unit"


def config_of(folder: Path, transfer: str) -> ServeConfig:
    """The model in one unit, or in one for each phase, on a core of its own each."""
    scheduling = Scheduling(prefix_reuse=False, prefill_tokens=2048)
    whole = one_unit([folder], [1.0], Memory(kv_bytes=GIB), Lanes(split=(1,)), scheduling)
    if transfer == TOGETHER:
        return whole
    cores = sorted(os.sched_getaffinity(0))[:2]
    roles: tuple[Role, ...] = ("prefill", "decode")
    units = tuple(
        msgspec.structs.replace(
            whole.units[0],
            name=role,
            models=(UnitModel(name=folder.name, role=role),),
            mesh=Mesh(cores=(core,)),
            transfer=transfer,
        )
        for role, core in zip(roles, cores, strict=True)
    )
    return msgspec.structs.replace(whole, units=units)


async def ask(url: str, model: str, num_tokens: int) -> Outcome:
    """One request for two tokens."""
    prompt = [1 + number % 97 for number in range(num_tokens)]
    target = Target(url)
    async with session(target) as http:
        jobs = [Job(0.0, model, prompt, 2)]
        (outcome,) = await replay(http, {model: target}, jobs, Progress(1))
    if outcome.status is not Status.OK:
        raise SystemExit(f"{url} does not answer: {outcome.error}")
    return outcome


def show(rows: Sequence[dict[str, Any]]) -> None:
    """First and second token by prompt length."""
    table = Table("prompt", "K and V, MB", "served by", "TTFT, ms", "second token, ms", "more, ms")
    for row in rows:
        figures = [row["ttft_s"], row["second_s"], row["more_s"]]
        cells = [f"{1e3 * figure:.2f}" for figure in figures]
        table.add_row(str(row["prompt"]), f"{row['kv_bytes'] / 1e6:.1f}", row["setup"], *cells)
    Console(width=100).print(table)


def main(
    preset: Annotated[str, typer.Option(help="Of scripts/bench_models.py.")] = "27m",
    lengths: Annotated[str, typer.Option(help="Of prompts, separated by commas.")] = (
        "32,128,512,1024,2000"
    ),
    transfers: Annotated[str, typer.Option(help="Likewise.")] = "shared,nixl",
    rounds: Annotated[int, typer.Option(min=1, help="Requests of each.")] = 15,
    out: Annotated[Path, typer.Option(help="JSON.")] = FOLDER / "handoff.json",
) -> None:
    """Measure each way of serving at each prompt length."""
    stop_on_sigterm()
    (folder,) = preset_folders([preset])
    names = [TOGETHER, *transfers.split(",")]
    record = Record(out, {"preset": preset, "dtype": "float32", "rounds": rounds})
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(muxrt_serving(config_of(folder, name))).urls[0]
            for name in names
        }
        for length in map(int, lengths.split(",")):
            found: dict[str, list[Outcome]] = {name: [] for name in names}
            for _ in range(rounds + 1):
                for name in names:
                    found[name].append(asyncio.run(ask(urls[name], folder.name, length)))
            rows += rows_of(folder, length, {name: done[1:] for name, done in found.items()})
            record.put("rows", rows)
    show(rows)


def rows_of(folder: Path, length: int, found: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """Medians; the first request of each warmed its path up and is gone."""
    from muxrt.config.model import load_shape
    from muxrt.cost.memory import kv_token_bytes

    kv_bytes = length * kv_token_bytes(load_shape(folder), 1, 4)
    second_s = {
        name: median((o.last_s or 0.0) - (o.ttft_s or 0.0) for o in done)
        for name, done in found.items()
    }
    return [
        {
            "setup": name,
            "prompt": length,
            "kv_bytes": kv_bytes,
            "ttft_s": median(o.ttft_s or 0.0 for o in done),
            "second_s": second_s[name],
            "more_s": second_s[name] - second_s[TOGETHER],
        }
        for name, done in found.items()
    ]


if __name__ == "__main__":
    typer.run(main)
