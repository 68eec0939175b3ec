"""What a tensor-parallel mesh of cores costs: telling the ranks, exchanging sums, whole steps.

    python scripts/bench_mesh.py --model 88m --out docs/benchmarks
    python scripts/bench_mesh.py --model configs/demo_models/pydoc-s --rounds 10 --sequences 8

Telling: rank 0 encodes a decode step of `--sequences` sequences and sends it to one other rank,
which decodes it and answers with a byte, over each of three channels. Exchanges: an all-reduce of
[tokens, hidden] floats between two ranks, over shared memory and by gloo. Steps: batches of a
model on one core, and on two ranks of a core each.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import torch
import typer
import zmq
from bench_models import preset_folders
from bench_record import CORES, Record
from bench_unit import model_spec
from rich.console import Console
from rich.table import Table
from torch.distributed import PrefixStore, ProcessGroupGloo

from muxrt.config.model import load_shape
from muxrt.config.placement import (
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
    UnitModel,
    UnitSpec,
)
from muxrt.config.shard import Shard
from muxrt.core import Batch, BatchEntry, Phase, Prompt, SamplingParams, SlotOpen
from muxrt.engine.build import UnitPlan, plan_unit
from muxrt.models.llama import Llama
from muxrt.models.ranks import Ranks
from muxrt.worker.build import open_executor
from muxrt.worker.collectives import GroupRanks, open_store
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.frames import FrameReader, write_frame
from muxrt.worker.kv_storage import Segment
from muxrt.worker.mesh import open_mesh
from muxrt.worker.rank_processes import open_wake
from muxrt.worker.shared_ranks import SharedRanks, num_bytes

BLOCKS = 64  # ids that a sequence gets with a new block group: 32 layers x 32 heads / 16 planes
GROUP_TOKENS = 16  # so one sequence in so many needs a group
HIDDEN = 4096
KV_BYTES = 256 << 20
MAX_MODEL_LEN = 512

Send = Callable[[bytes], None]
FORK = get_context("fork")


class Channel(NamedTuple):
    """Both ends of a way to tell a rank something; made before the fork, opened behind it."""

    send: Callable[[], Send]
    receive: Callable[[], Iterator[bytes]]


def pipe() -> Channel:
    """What serves: frames over a pipe, as lanes that are processes have it."""
    out, into = os.pipe()

    def receive() -> Iterator[bytes]:
        reader = FrameReader(out)
        while True:
            yield from reader.read()

    return Channel(lambda: lambda data: write_frame(into, data), receive)


def ipc() -> Channel:
    """A pair of ZeroMQ sockets."""
    address = f"ipc:///tmp/muxrt-bench-mesh-{os.getpid()}"

    def send() -> Send:
        socket = zmq.Context().socket(zmq.PAIR)
        socket.bind(address)
        return lambda data: socket.send(data)

    def receive() -> Iterator[bytes]:
        socket = zmq.Context().socket(zmq.PAIR)
        socket.connect(address)
        while True:
            yield socket.recv()

    return Channel(send, receive)


def gloo() -> Channel:
    """torch.distributed: the length, then the bytes."""
    server = open_store()

    def open_group(rank: int) -> Callable[[torch.Tensor], None]:
        store = server if rank == 0 else open_store(server.port)
        options: Any = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_device(interface="lo")]
        options._timeout = timedelta(seconds=30)
        group = ProcessGroupGloo(PrefixStore("bench", store), rank, 2, options)
        return lambda tensor: group.broadcast(tensor, 0).wait()

    def send() -> Send:
        broadcast = open_group(0)

        def tell(data: bytes) -> None:
            broadcast(torch.tensor([len(data)]))
            broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

        return tell

    def receive() -> Iterator[bytes]:
        broadcast = open_group(1)
        while True:
            length = torch.zeros(1, dtype=torch.int64)
            broadcast(length)
            data = torch.empty(int(length), dtype=torch.uint8)
            broadcast(data)
            yield data.numpy().tobytes()

    return Channel(send, receive)


CHANNELS = {"pipe": pipe, "zmq": ipc, "gloo": gloo}


def decode_step(num_sequences: int) -> Batch:
    """A step of a 7B model: one sequence in 16 needs another block group."""
    rng = np.random.default_rng(0)
    entries = []
    for slot in range(num_sequences):
        ids = rng.integers(0, 1 << 20, BLOCKS, dtype=np.int32).tobytes()
        blocks = b"" if slot % GROUP_TOKENS else ids
        entries.append(BatchEntry(slot, 1000 + slot, 1, True, 63, blocks))
    return Batch(1, 0, "model", Phase.DECODE, tuple(entries))


def tell(name: str, batch: Batch, rounds: int) -> dict[str, Any]:
    """Microseconds of encoding and sending, and until the answer is there."""
    channel = CHANNELS[name]()
    answer, answered = os.pipe()

    def rank() -> None:
        os.sched_setaffinity(0, {CORES[-1]})
        for data in channel.receive():
            msgspec.msgpack.decode(data, type=Batch)
            os.write(answered, b".")

    child = FORK.Process(target=rank, daemon=True)
    child.start()
    send = channel.send()
    sent, there = [], []
    for number in range(rounds + rounds // 10):
        begun_s = perf_counter()
        send(msgspec.msgpack.encode(batch))
        sent_s = perf_counter()
        os.read(answer, 1)
        if number >= rounds // 10:
            sent.append(sent_s - begun_s)
            there.append(perf_counter() - begun_s)
    child.kill()
    child.join()
    size = len(msgspec.msgpack.encode(batch))
    return {"channel": name, "bytes": size, "sent_us": spread(sent), "answered_us": spread(there)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Microseconds."""
    found = np.percentile(seconds, [50, 90, 99]) * 1e6
    return dict(zip(("p50", "p90", "p99"), found.round(1).tolist(), strict=True))


def exchange(kind: str, num_tokens: int, rounds: int) -> dict[str, Any]:
    """An all-reduce of [tokens, HIDDEN] between two processes of one core each."""
    server, memory = open_store(), Segment(num_bytes(2))
    wakes = [open_wake() for _ in range(2)]

    def times(rank: int) -> list[float]:
        os.sched_setaffinity(0, {CORES[rank % len(CORES)]})
        torch.set_num_threads(1)
        line: Ranks
        if kind == "gloo":
            store = server if rank == 0 else open_store(server.port)
            line = GroupRanks(store, "bench", Shard(rank, 2), 30.0)
        else:
            line = SharedRanks(memory.tensor(), wakes, Shard(rank, 2), 30.0)
        values, found = torch.zeros(num_tokens, HIDDEN), []
        for _ in range(rounds + rounds // 10):
            begun_s = perf_counter()
            line.add(values)
            found.append(perf_counter() - begun_s)
        return found[rounds // 10 :]

    def other() -> None:
        times(1)
        os._exit(0)

    child = FORK.Process(target=other, daemon=True)
    child.start()
    found = times(0)
    child.join()
    memory.close()
    return {"kind": kind, "tokens": num_tokens, "hidden": HIDDEN, "us": spread(found)}


def plan_of(model: Path, tp: int, kind: Any) -> tuple[UnitPlan, ModelSpec]:
    spec = model_spec(model, name="m", dtype="float32", max_model_len=MAX_MODEL_LEN)
    unit = UnitSpec(
        name="bench",
        models=(UnitModel(name="m"),),
        memory=Memory(kv_bytes=KV_BYTES),
        mesh=Mesh(gpus=tuple(range(tp)), exchange=kind),
        lanes=Lanes(split=(1,)),
        scheduling=Scheduling(max_sequences=64),
    )
    return plan_unit(unit, {"m": spec}, {"m": load_shape(model)}), spec


@contextmanager
def executor_of(model: Path, tp: int, kind: str) -> Iterator[tuple[UnitPlan, LaneExecutor]]:
    plan, spec = plan_of(model, tp, kind)
    shapes = {"m": load_shape(model)}

    def load(shard: Shard) -> dict[str, Llama]:
        return {"m": Llama.load(model, "float32", shard=shard)}

    with ExitStack() as stack:
        if tp == 1:
            yield plan, stack.enter_context(open_executor(plan, load(Shard()), CORES[:1]))
        else:
            cores = [CORES[rank % len(CORES)] for rank in range(tp)]
            yield plan, stack.enter_context(open_mesh(plan, [spec], shapes, cores, load))


class Timed(NamedTuple):
    """A batch that is timed, and the one that comes before."""

    name: str
    first: Batch
    timed: Batch


def passes(plan: UnitPlan) -> Iterator[Timed]:
    """Prefills and decodes of all sizes."""
    layout = plan.models["m"].layout
    for phase, size, length in (("prefill", 1, 256), ("decode", 1, 100), ("decode", 16, 100)):
        groups = layout.num_blocks(length + 1)
        ids = np.arange(size * groups, dtype=np.int32).reshape(size, groups)
        prompt = Prompt(np.arange(length, dtype="<i4").tobytes(), SamplingParams(temperature=0.0))
        opened = tuple(SlotOpen(slot, msgspec.msgpack.encode(prompt)) for slot in range(size))
        whole = tuple(
            BatchEntry(slot, 0, length, True, 0, ids[slot].tobytes()) for slot in range(size)
        )
        first = Batch(0, 0, "m", Phase.PREFILL, whole, opened)
        one = tuple(BatchEntry(slot, length, 1, True) for slot in range(size))
        decode = Batch(0, 0, "m", Phase.DECODE, one)
        name = f"{phase}, {size} x {length if phase == 'prefill' else 1}"
        yield Timed(name, first, first if phase == "prefill" else decode)


def steps(model: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of batches on one rank and on two, each way in turn."""
    ways = {"1 rank": (1, "shared"), "2, shared": (2, "shared"), "2, gloo": (2, "gloo")}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(executor_of(model, *way)) for name, way in ways.items()}
        # Blocks of two ranks have other planes where heads do not come out even.
        for several in zip(*(passes(plan) for plan, _ in opened.values()), strict=True):
            name, found = several[0].name, {way: list[float]() for way in ways}
            batches = dict(zip(ways, several, strict=True))
            for way, (_, executor) in opened.items():
                executor.run([batches[way].first])
                executor.run([batches[way].timed])
            for _ in range(rounds):
                for way, (_, executor) in opened.items():
                    (result,) = executor.run([batches[way].timed])
                    found[way].append(result.elapsed_s * 1e3)
            for way, times in found.items():
                best, middle = round(min(times), 3), round(statistics.median(times), 3)
                yield {"step": name, "ranks": way, "best_ms": best, "median_ms": middle}


def main(
    model: Annotated[
        str, typer.Option(help="Whose steps: a shape of llama_folder.py, or a model folder.")
    ] = "88m",
    sequences: Annotated[int, typer.Option(help="Of the step that ranks are told of.")] = 256,
    rounds: Annotated[int, typer.Option(help="Repetitions of everything.")] = 2000,
    out: Annotated[Path | None, typer.Option(help="Folder for mesh.json.")] = None,
) -> None:
    """Measure a mesh of two ranks on this machine."""
    folder = Path(model) if Path(model).is_dir() else preset_folders([model])[0]
    settings = {"model": model, "sequences": sequences, "rounds": rounds}
    record = Record((out or Path.cwd()) / "mesh.json", settings)
    os.sched_setaffinity(0, {CORES[0]})
    for name in CHANNELS:
        record.add("tell", tell(name, decode_step(sequences), rounds))
    for kind in ("shared", "gloo"):
        for tokens in (1, 16, 256):
            few = max(20, rounds // (1 + tokens // 4))
            record.add("exchange", exchange(kind, tokens, few))
    os.sched_setaffinity(0, set(CORES))
    for row in steps(folder, max(20, rounds // 20)):
        record.add("steps", row)
    show(record.data)


def show(data: dict[str, Any]) -> None:
    console = Console()
    table = Table("telling a rank", "us to send p50 / p99", "us to be answered p50 / p99")
    for row in data["tell"]:
        sent, there = row["sent_us"], row["answered_us"]
        table.add_row(
            f"{row['channel']}, {row['bytes']} bytes",
            f"{sent['p50']} / {sent['p99']}",
            f"{there['p50']} / {there['p99']}",
        )
    console.print(table)
    table = Table("all-reduce of tokens x hidden", "us p50 / p99")
    for row in data["exchange"]:
        name = f"{row['kind']}, {row['tokens']} x {row['hidden']}"
        table.add_row(name, f"{row['us']['p50']} / {row['us']['p99']}")
    console.print(table)
    table = Table("step", "ranks", "ms best / median")
    for row in data["steps"]:
        table.add_row(row["step"], row["ranks"], f"{row['best_ms']} / {row['median_ms']}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
