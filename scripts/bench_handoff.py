"""What a hand-over costs a client: the delay of the second token, by prompt length.

    python scripts/bench_handoff.py                # docs/benchmarks/handoff.json
    python scripts/bench_handoff.py --rounds 2 --lengths 64 --transfers shared   # does it run?

One model, one request at a time. `one unit` does both phases; the others prefill in one process
and decode in another, K and V moved by NIXL or through memory that both have mapped: piece by piece
while the prompt is computed, or, where the name ends in `, serialised`, at once after it. All
endpoints are up all the time and asked in turns. `hidden` is what moving while computing takes off
the second token's delay, of what a hand-over adds to it: 1 - (pieces - one unit) / (serialised -
one unit).
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
SERIALISED = ", serialised"


def config_of(folder: Path, transfer: str, from_tokens: int) -> ServeConfig:
    """The model in one unit, or in one for each phase, on a core of its own each."""
    stream_tokens = 10**6 if transfer.endswith(SERIALISED) else from_tokens
    scheduling = Scheduling(prefix_reuse=False, stream_tokens=stream_tokens)
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
            transfer=transfer.removesuffix(SERIALISED),
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
    heads = ("prompt", "K and V, MB", "served by", "TTFT, ms", "second token, ms", "more, ms")
    table = Table(*heads, "hidden")
    for row in rows:
        figures = [row["ttft_s"], row["second_s"], row["more_s"]]
        cells = [f"{1e3 * figure:.2f}" for figure in figures]
        hidden = "" if row["hidden"] is None else f"{row['hidden']:.0%}"
        size = f"{row['kv_bytes'] / 1e6:.1f}"
        table.add_row(str(row["prompt"]), size, row["setup"], *cells, hidden)
    Console(width=100).print(table)


def main(
    preset: Annotated[str, typer.Option(help="Of scripts/bench_models.py.")] = "27m",
    lengths: Annotated[str, typer.Option(help="Of prompts, separated by commas.")] = (
        "32,64,128,256,512,1024,2000"
    ),
    transfers: Annotated[str, typer.Option(help="Likewise.")] = "shared,nixl",
    from_tokens: Annotated[int, typer.Option(min=1, help="Prompts that go in pieces.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Requests of each.")] = 15,
    out: Annotated[Path, typer.Option(help="JSON.")] = FOLDER / "handoff.json",
) -> None:
    """Measure each way of serving at each prompt length."""
    stop_on_sigterm()
    (folder,) = preset_folders([preset])
    each = transfers.split(",")
    names = [TOGETHER, *(name + way for name in each for way in ("", SERIALISED))]
    record = Record(out, {"preset": preset, "dtype": "float32", "rounds": rounds})
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(muxrt_serving(config_of(folder, name, from_tokens))).urls[0]
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
            "hidden": _hidden(second_s, name),
        }
        for name, done in found.items()
    ]


def _hidden(second_s: dict[str, float], name: str) -> float | None:
    """The share of a transfer that nobody waits for; None where all of it is waited for."""
    whole = second_s.get(name + SERIALISED)
    if whole is None:
        return None
    alone = second_s[TOGETHER]
    return 1 - (second_s[name] - alone) / (whole - alone)


if __name__ == "__main__":
    typer.run(main)
