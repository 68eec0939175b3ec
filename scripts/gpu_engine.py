"""Cases of bench_gpu.py --part engine: prompts and decode steps of one model, as a lane runs them.

What is launched are batches as the scheduler makes them, two in flight, by the runner that serves.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec
import numpy as np
import torch
from gpu_timing import Bound, Case

from muxrt.config.model import ModelShape
from muxrt.config.placement import (
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
    UnitModel,
    UnitSpec,
)
from muxrt.config.placement import (
    Sizes as ModelSizes,
)
from muxrt.config.presets import PRESETS, shape_of_sizes
from muxrt.core import Batch, BatchEntry, Phase, Prompt, SamplingParams, SlotOpen
from muxrt.cost.memory import kv_token_bytes, num_params
from muxrt.engine.build import DTYPE_BYTES, plan_unit
from muxrt.models.device_llama import DeviceLlama
from muxrt.worker.device_runner import DeviceResident, DeviceRunner
from muxrt.worker.device_storage import DeviceStorage
from muxrt.worker.device_streams import open_steps, plain_share
from muxrt.worker.flight import Flight

DEPTH = 2  # works in flight, as `Lanes.depth`
WARM_STEPS = 5  # compile, capture, and fill the pipeline
MIB = 1 << 20
TINY_MODEL = ModelSizes(
    hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96, vocab_size=300
)
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Sizes:
    """Which model is measured with what; tiny where there is no GPU."""

    shapes: Mapping[str, ModelShape]
    dtype: DType
    decodes: tuple[tuple[int, int], ...]  # sequences, tokens of context
    prefills: tuple[tuple[int, int], ...]  # prompts, tokens of each
    steps: int = 100
    prompts: int = 10  # prefill batches


SIZES = Sizes(
    {name: PRESETS[name] for name in ("llama-7b", "llama-13b", "llama-30b")},
    "bfloat16",
    ((1, 512), (16, 512), (64, 512), (64, 1024)),
    ((1, 161), (1, 512), (4, 512), (1, 2000)),
)

TINY = Sizes(
    {"tiny": shape_of_sizes(TINY_MODEL)}, "float32", ((1, 20), (3, 20)), ((1, 33), (2, 20)), 4, 2
)


@dataclass(frozen=True)
class Step:
    """Batches of one kind; medians, milliseconds."""

    ms: float  # on the device
    wall_ms: float  # from one result to the next: more than `ms` where the host is late
    host_ms: float  # to launch one
    bound: Bound
    amount: float  # bytes or floating-point operations that none can do without
    note: str = ""

    @property
    def said(self) -> str:
        return f"{self.ms:.3f} ms on the device, {self.wall_ms:.3f} from one to the next"


def cases(size: Sizes, device: torch.device) -> Iterator[Case]:
    """The models one after the other: each is in memory while its cases run."""
    for name, shape in size.shapes.items():
        home: dict[str, Lane] = {}
        for sequences, context in size.decodes:
            title = f"{name}, decode {sequences} x {context}"
            yield Case(title, partial(_decodes, home, shape, size, device, sequences, context))
        for prompts, tokens in size.prefills:
            title = f"{name}, prefill {prompts} x {tokens}"
            yield Case(title, partial(_prefills, home, shape, size, device, prompts, tokens))
        home.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _decodes(
    home: dict[str, "Lane"],
    shape: ModelShape,
    size: Sizes,
    device: torch.device,
    sequences: int,
    context: int,
) -> Step:
    lane = _lane(home, shape, size, device)
    lane.fill(sequences, context)
    works = [lane.decode(sequences, context + step) for step in range(WARM_STEPS + size.steps)]
    lane.run(works[:WARM_STEPS])
    unit_bytes = DTYPE_BYTES[size.dtype]
    rows = 0 if shape.tied_embeddings else shape.vocab_size  # of the table, few are read
    read = (num_params(shape) - rows * shape.hidden_size) * unit_bytes
    token_bytes = kv_token_bytes(shape, 1, unit_bytes)
    amount = read + sequences * (context + size.steps / 2) * token_bytes
    return lane.timed(works[WARM_STEPS:], "bytes", amount)


def _prefills(
    home: dict[str, "Lane"],
    shape: ModelShape,
    size: Sizes,
    device: torch.device,
    prompts: int,
    tokens: int,
) -> Step:
    lane = _lane(home, shape, size, device)
    works = [lane.prefill(range(prompts), tokens) for _ in range(2 + size.prompts)]
    lane.run(works[:2])
    linear = 2.0 * num_params(shape) * prompts * tokens
    attention = 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * prompts * tokens**2
    return lane.timed(works[2:], "flops", linear + attention)


def _lane(home: dict[str, "Lane"], shape: ModelShape, size: Sizes, device: torch.device) -> "Lane":
    """Made for the model's first case that is not measured yet."""
    if not home:
        home["lane"] = Lane(shape, size, device)
    return home["lane"]


class Lane:
    """A model alone on a device, with room for the largest case."""

    def __init__(self, shape: ModelShape, size: Sizes, device: torch.device) -> None:
        longest = max(context + WARM_STEPS + size.steps for _, context in size.decodes)
        self._room = max(longest, *(tokens for _, tokens in size.prefills)) + 1
        slots = max(count for count, _ in (*size.decodes, *size.prefills))
        token_bytes = kv_token_bytes(shape, 1, DTYPE_BYTES[size.dtype])
        spec = UnitSpec(
            name="bench",
            models=(UnitModel(name="model"),),
            # A group may be half empty, and so may its last block.
            memory=Memory(kv_bytes=2 * slots * (self._room + 64) * token_bytes + MIB),
            mesh=Mesh(device="gpu", gpus=(0,)),
            lanes=Lanes(kind="stream"),
            scheduling=Scheduling(max_sequences=slots),
        )
        model = ModelSpec(name="model", dtype=size.dtype, max_model_len=self._room)
        self._plan = plan_unit(spec, {"model": model}, {"model": shape})
        self._layout = self._plan.models["model"].layout
        storage = DeviceStorage(self._plan, device)
        llama = DeviceLlama.random(shape, getattr(torch, size.dtype), device)
        resident = DeviceResident.of(llama, "model", storage)
        share = plain_share("whole", device, 0)
        steps = open_steps(self._plan, device)
        self._runner = DeviceRunner({"model": resident}, steps, lambda: share)
        self._payload = b""

    def _ids(self, slot: int) -> bytes:
        """The blocks of a slot, always the same."""
        count = self._layout.num_blocks(self._room)
        return np.arange(slot * count, (slot + 1) * count, dtype=np.int32).tobytes()

    def prefill(self, slots: Iterable[int], tokens: int) -> Batch:
        """Whole prompts, one per slot."""
        ids = (1 + np.arange(tokens) % 250).astype("<i4").tobytes()
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        payload = msgspec.msgpack.encode(Prompt(ids, sampling))
        taken = list(slots)
        entries = tuple(BatchEntry(slot, 0, tokens, True, 0, self._ids(slot)) for slot in taken)
        opened = tuple(SlotOpen(slot, payload) for slot in taken)
        return Batch(0, 0, "model", Phase.PREFILL, entries, opened)

    def fill(self, sequences: int, context: int) -> None:
        """Every slot gets a prompt of `context` tokens."""
        self.run([self.prefill([slot], context) for slot in range(sequences)])

    def decode(self, sequences: int, start: int) -> Batch:
        """The token after `start` of each sequence."""
        entries = tuple(BatchEntry(slot, start, 1, True) for slot in range(sequences))
        return Batch(0, 0, "model", Phase.DECODE, entries)

    def run(self, works: Iterable[Batch]) -> tuple[list[float], list[float]]:
        """Seconds of each on the device, and of the host to launch it; two are in flight."""
        device_s, host_s = [], []
        flying: deque[Flight] = deque()
        for work in works:
            if len(flying) == DEPTH:
                device_s.append(flying.popleft().wait().elapsed_s)
            begun_s = time.perf_counter()
            flying.append(self._runner.launch(work))
            host_s.append(time.perf_counter() - begun_s)
        device_s += [flight.wait().elapsed_s for flight in flying]
        return device_s, host_s

    def timed(self, works: list[Batch], bound: Bound, amount: float) -> Step:
        """Medians of `works`."""
        begun_s = time.perf_counter()
        device_s, host_s = self.run(works)
        wall_s = (time.perf_counter() - begun_s) / len(works)
        medians = (statistics.median(device_s), wall_s, statistics.median(host_s))
        return Step(*(1e3 * seconds for seconds in medians), bound, amount)
