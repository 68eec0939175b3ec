"""What a hand-over costs a client: the delay of the second token, by prompt length.

    python scripts/bench_handoff.py                # docs/benchmarks/handoff.json
    python scripts/bench_handoff.py --rounds 2 --lengths 64 --transfers shared   # does it run?

One model, one request at a time. `one unit` does both phases; the others prefill in one process
and decode in another, K and V moved by NIXL or through memory that both have mapped: piece by piece
while the prompt is computed, or, where the name ends in `, serialised`, at once after it. All
endpoints are up all the time and asked in turns.

`more` is the second token's delay beyond that of one unit, `waited` its delay beyond the third
token's in the same unit: what is waited for of the transfer, without what else differs between two
units (caches and pages are colder, threads share a core). `hidden` is the share of either that
moving in pieces saves: 1 - pieces / serialised.
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import msgspec
import typer
from bench_models import preset_folders
from bench_record import FOLDER, Record, stop_on_sigterm
from bench_serving import muxrt_serving, one_unit
from rich.console import Console
from rich.table import Table

from muxrt.bench.client import body, session
from muxrt.bench.job import Job, Target
from muxrt.config.placement import GIB, Lanes, Memory, Mesh, Role, Scheduling, UnitModel
from muxrt.config.serve import ServeConfig

TOGETHER = "one unit"
SERIALISED = ", serialised"
NUM_TOKENS = 3


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


@dataclass(frozen=True, slots=True)
class Times:
    """When the first tokens of an answer came, in seconds after it was asked for."""

    first_s: float
    second_s: float
    third_s: float

    @property
    def delay_s(self) -> float:
        """Of the second token."""
        return self.second_s - self.first_s

    @property
    def waited_s(self) -> float:
        """What the second token took longer than the third, which waits for no transfer."""
        return self.delay_s - (self.third_s - self.second_s)


async def ask(url: str, model: str, num_tokens: int) -> Times:
    """One request for three tokens. Exits where it is not served with an event for each."""
    prompt = [1 + number % 97 for number in range(num_tokens)]
    target, times = Target(url), list[float]()
    data = msgspec.json.encode(body(target, Job(0.0, model, prompt, NUM_TOKENS)))
    async with session(target) as http:
        asked_s = perf_counter()
        async with http.post(target.route, data=data) as response:
            async for line in response.content:
                if b'"text":"' in line and b'"text":""' not in line:
                    times.append(perf_counter() - asked_s)
    if len(times) != NUM_TOKENS:
        raise SystemExit(f"{url}: found {len(times)} tokens, expected {NUM_TOKENS}")
    return Times(*times)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """First and second token by prompt length."""
    heads = ("prompt", "MB", "served by", "TTFT", "2nd token", "more", "waited")
    table = Table(*heads, "hidden of more", "of waited", title="milliseconds")
    for row in rows:
        figures = [row["ttft_s"], row["second_s"], row["more_s"], row["waited_s"]]
        cells = [f"{1e3 * figure:.2f}" for figure in figures]
        shares = ["" if share is None else f"{share:.0%}" for share in row["hidden"]]
        size = f"{row['kv_bytes'] / 1e6:.1f}"
        table.add_row(str(row["prompt"]), size, row["setup"], *cells, *shares)
    Console(width=110).print(table)


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
            found: dict[str, list[Times]] = {name: [] for name in names}
            for _ in range(rounds + 1):
                for name in names:
                    found[name].append(asyncio.run(ask(urls[name], folder.name, length)))
            rows += rows_of(folder, length, {name: done[1:] for name, done in found.items()})
            record.put("rows", rows)
    show(rows)


def rows_of(folder: Path, length: int, found: dict[str, list[Times]]) -> list[dict[str, Any]]:
    """Medians; the first request of each warmed its path up and is gone."""
    from muxrt.config.model import load_shape
    from muxrt.cost.memory import kv_token_bytes

    kv_bytes = length * kv_token_bytes(load_shape(folder), 1, 4)
    second_s = {name: median(one.delay_s for one in done) for name, done in found.items()}
    waited_s = {name: median(one.waited_s for one in done) for name, done in found.items()}
    more_s = {name: delay_s - second_s[TOGETHER] for name, delay_s in second_s.items()}
    return [
        {
            "setup": name,
            "prompt": length,
            "kv_bytes": kv_bytes,
            "ttft_s": median(one.first_s for one in done),
            "second_s": second_s[name],
            "more_s": more_s[name],
            "waited_s": waited_s[name],
            "hidden": [_hidden(more_s, name), _hidden(waited_s, name)],
        }
        for name, done in found.items()
    ]


def _hidden(cost_s: dict[str, float], name: str) -> float | None:
    """The share of a serialised transfer's cost that moving in pieces saves; None: it does not."""
    whole_s = cost_s.get(name + SERIALISED)
    return None if whole_s is None else 1 - cost_s[name] / whole_s


if __name__ == "__main__":
    typer.run(main)
