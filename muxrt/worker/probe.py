"""Times forward passes on lanes as a unit runs them: same lanes, runners, arena and messages.

Nothing is scheduled. Slots are opened once, their KV filled with random numbers, and then the same
batch is launched several times in a row: its time is what the lane needs, without waiting.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from typing import NamedTuple, Protocol, Self

import msgspec
import numpy as np
from torch import Tensor

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
from muxrt.core import (
    Batch,
    BatchEntry,
    Copy,
    CopyKind,
    Phase,
    Prompt,
    SamplingParams,
    SlotOpen,
)
from muxrt.cost.grid import Pass
from muxrt.engine.build import UnitPlan, plan_unit
from muxrt.errors import MuxrtError
from muxrt.models.llama import Llama
from muxrt.worker.build import residents, thread_lanes
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.kv_storage import KV_DTYPES, Storage
from muxrt.worker.lanes import Lane

AMPLE_BYTES = 1 << 50  # to lay an arena out before its size is known
BURST_S = 0.04  # of steps in a row
MOST_STEPS = 8
SLOW_S = 0.05  # from here on the step before those that count is left out, once warm
# As a client asks who states nothing, but that no answer ends.
SAMPLING = SamplingParams(ignore_eos=True)
UNIT = "profile"


class Beside(NamedTuple):
    """Seconds of two passes, each alone and while the other runs."""

    first_alone_s: float
    second_alone_s: float
    first_s: float
    second_s: float


class Slots:
    """Where the sequences of one model lie: decodes in the first slots, prefills behind them."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        decodes = _lengths([one for one in passes if one.phase is Phase.DECODE])
        prefills = _lengths([one for one in passes if one.phase is not Phase.DECODE])
        self.first_prefill = len(decodes)
        # A decode step at context n draws the token at position n.
        self.tokens = [*(length + 1 for length in decodes), *(length + 1 for length in prefills)]

    @property
    def longest(self) -> int:
        return max(self.tokens)


def _lengths(passes: Sequence[Pass]) -> list[int]:
    """Tokens that sequence i holds in the longest pass with more than i sequences."""
    most = max((one.batch for one in passes), default=0)
    return [max(one.seq_len for one in passes if one.batch > i) for i in range(most)]


class Opened(NamedTuple):
    """Lanes that a probe may launch on, and the arena behind them."""

    executor: LaneExecutor
    arena: Tensor | None  # [bytes] uint8; None: it is cut over ranks, behind a copy lane


class Place(Protocol):
    """Where a probe's lanes are."""

    num_lanes: int
    mesh: Mesh
    warm_runs: int  # of a pass on a lane, before its time counts

    def open(self, plan: UnitPlan) -> Opened:
        """Start the lanes. Raises MuxrtError where one cannot."""


def executor_of(lanes: Sequence[Lane], stack: ExitStack) -> LaneExecutor:
    """Once all have started; it takes over what `stack` gives back."""
    for lane in lanes:
        stack.callback(lane.close)
    for lane in lanes:
        lane.wait_started()
    return LaneExecutor(lanes, stack.pop_all())


class OnCores:
    """Lanes on sets of cores."""

    mesh = Mesh()
    warm_runs = 1  # records programs of this size

    def __init__(self, models: dict[str, Llama], lanes: Sequence[Sequence[int]]) -> None:
        """Sets may overlap: one is used at a time, or disjoint ones. `models` is emptied."""
        self.num_lanes = len(lanes)
        self._models = models
        self._lanes = lanes

    def open(self, plan: UnitPlan) -> Opened:
        with ExitStack() as stack:
            storage = Storage(plan)
            stack.callback(storage.close)
            lanes = list(thread_lanes(residents(plan, self._models, storage), self._lanes))
            return Opened(executor_of(lanes, stack), storage.arena.tensor())
        raise AssertionError("an exit stack swallows nothing")


class Probe:
    """Models on lanes, every slot open, each lane warm for every pass that comes."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        shapes: Mapping[str, ModelShape],
        place: Place,
        passes: Mapping[str, Sequence[Pass]],
    ) -> None:
        """`passes` of each model are all that will be asked for.

        Raises ConfigError where the models cannot share an arena, MuxrtError where one cannot run.
        """
        self._slots = {name: Slots(passes[name]) for name in passes}
        self._decode = {name: _least_decode(passes[name]) for name in passes}
        self.plan = _plan(specs, shapes, self._slots, place)
        self._warm_runs = place.warm_runs
        self._ids = count()
        self._warm: set[tuple[int, str, Pass]] = set()
        opened = place.open(self.plan)
        self._executor = opened.executor
        try:
            if opened.arena is None:
                self._run(list(self._copies()))
            else:
                _fill(self.plan, opened.arena, self._slots)
            for name in self._slots:
                self._run(list(self._openings(name, shapes[name].vocab_size)))
        except BaseException:
            self.close()
            raise

    def burst(self, lane: int, model: str, one: Pass) -> float:
        """Seconds of the pass on that lane, the median of some.

        Decode steps come in a row, of which the first does not count: caches hold something else. A
        prefill comes after a decode step, as in service.
        """
        key = (lane, model, one)
        if key not in self._warm:
            self._run([self._batch(lane, model, one)] * self._warm_runs)
            self._warm.add(key)
        if one.phase is not Phase.DECODE:
            return self._prefill(lane, model, one)
        [first_s] = self._run([self._batch(lane, model, one)])
        steps = min(MOST_STEPS, max(1, round(BURST_S / first_s)))
        if first_s > SLOW_S:
            return first_s
        return statistics.median(self._run([self._batch(lane, model, one)] * steps))

    def _prefill(self, lane: int, model: str, one: Pass) -> float:
        decode = self._decode[model]
        between = [self._batch(lane, model, decode)] if decode is not None else []
        found: list[float] = []
        while sum(found) < BURST_S and len(found) < MOST_STEPS:
            found.append(self._run([*between, self._batch(lane, model, one)])[-1])
        return statistics.median(found)

    def beside(
        self, first: tuple[int, str, Pass], second: tuple[int, str, Pass], wanted_s: float
    ) -> Beside:
        """(Lane, model, pass) alone, the other alone, both together: about `wanted_s` each."""
        several = []
        for part in (first, second):
            steps = max(2, round(wanted_s / self.burst(*part)))
            several.append([self._batch(*part)] * steps)
        alone = [statistics.median(self._run(batches)) for batches in several]
        times = self._run([*several[0], *several[1]])
        split = (times[: len(several[0])], times[len(several[0]) :])
        overlap_s = min(sum(split[0]), sum(split[1]))
        return Beside(*alone, *(statistics.median(_within(part, overlap_s)) for part in split))

    def close(self) -> None:
        """End the lanes and give their memory back."""
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _run(self, asked: Sequence[Batch] | Sequence[Copy]) -> list[float]:
        """Launch them all at once; seconds of each on its lane."""
        works = [msgspec.structs.replace(work, id=next(self._ids)) for work in asked]
        results = self._executor.run(works)
        for work, result in zip(works, results, strict=True):
            if result.error is not None:
                raise MuxrtError(f"{work.model} failed a pass: {result.error}")
        return [result.elapsed_s for result in results]

    def _batch(self, lane: int, model: str, one: Pass) -> Batch:
        slots = self._slots[model]
        if one.phase is Phase.DECODE:
            entries = [BatchEntry(i, one.seq_len - 1, 1, True) for i in range(one.batch)]
        else:
            first = slots.first_prefill
            entries = [BatchEntry(first + i, 0, one.seq_len, True) for i in range(one.batch)]
        return Batch(0, lane, model, one.phase, tuple(entries))

    def _openings(self, model: str, vocab_size: int) -> Iterator[Batch]:
        """Give every slot random tokens and its blocks, a slot a batch."""
        random = np.random.default_rng(0)
        layout = self.plan.models[model].layout
        blocks = _blocks(self.plan, self._slots)[model]
        for slot, num_tokens in enumerate(self._slots[model].tokens):
            tokens = random.integers(0, vocab_size, num_tokens - 1, dtype="<i4")
            opened = SlotOpen(slot, msgspec.msgpack.encode(Prompt(tokens.tobytes(), SAMPLING)))
            number = layout.num_blocks(num_tokens)
            ids, blocks = blocks[:number], blocks[number:]
            entry = BatchEntry(slot, 0, 1, True, 0, ids.tobytes())
            yield Batch(0, 0, model, Phase.DECODE, (entry,), (opened,))

    def _copies(self) -> Iterator[Copy]:
        """Write every block of every slot on all ranks: see `_fill`. Each gets the host's one."""
        for name, blocks in _blocks(self.plan, self._slots).items():
            layout = self.plan.models[name].layout
            for slot, num_tokens in enumerate(self._slots[name].tokens):
                number = layout.num_blocks(num_tokens)
                ids, blocks = blocks[:number], blocks[number:]
                host = np.zeros(number, np.int32).tobytes()
                lane, kind = self.plan.num_lanes, CopyKind.SWAP_IN
                yield Copy(0, lane, name, kind, slot, ids.tobytes(), host)


def _least_decode(passes: Sequence[Pass]) -> Pass | None:
    decodes = [one for one in passes if one.phase is Phase.DECODE]
    return min(decodes, key=lambda one: one.tokens, default=None)


def _plan(
    specs: Sequence[ModelSpec],
    shapes: Mapping[str, ModelShape],
    slots: Mapping[str, Slots],
    place: Place,
) -> UnitPlan:
    """An arena that holds exactly what the slots need."""
    short = {
        spec.name: msgspec.structs.replace(spec, max_model_len=slots[spec.name].longest)
        for spec in specs
    }
    unit = UnitSpec(
        name=UNIT,
        models=tuple(UnitModel(name=spec.name) for spec in specs),
        memory=Memory(kv_bytes=AMPLE_BYTES),
        mesh=place.mesh,
        lanes=Lanes(split=(1,) * place.num_lanes),
        scheduling=Scheduling(max_sequences=max(len(s.tokens) for s in slots.values())),
    )
    ample = plan_unit(unit, short, shapes)
    needed = sum(len(ids) for ids in _blocks(ample, slots).values())
    block_bytes = ample.arena.block_bytes
    host_blocks = 1 if place.mesh.tp > 1 else 0  # see `Probe._copies`
    memory = Memory(kv_bytes=needed * block_bytes, swap_bytes=host_blocks * block_bytes)
    return plan_unit(msgspec.structs.replace(unit, memory=memory), short, shapes)


def _blocks(plan: UnitPlan, slots: Mapping[str, Slots]) -> dict[str, np.ndarray]:
    """The block ids of each model's slots, in random order: int32 [blocks]."""
    random, begin, found = np.random.default_rng(0), 0, {}
    for name, model in slots.items():
        layout = plan.models[name].layout
        end = begin + sum(layout.num_blocks(tokens) for tokens in model.tokens)
        found[name] = random.permutation(np.arange(begin, end, dtype=np.int32))
        begin = end
    return found


def _fill(plan: UnitPlan, arena: Tensor, slots: Mapping[str, Slots]) -> None:
    """Random K and V: pages that were never written are one page of zeros, too quick to read."""
    block_bytes = plan.arena.block_bytes
    for name, ids in _blocks(plan, slots).items():
        dtype = KV_DTYPES[plan.kv_dtypes[name]]
        begin = int(ids.min()) * block_bytes
        arena[begin : begin + len(ids) * block_bytes].view(dtype).normal_()


def _within(times_s: Sequence[float], limit_s: float) -> list[float]:
    """Those of consecutive works that ended by `limit_s`; at least the first."""
    ends = np.cumsum(times_s)
    number = max(1, int((ends <= limit_s * (1 + 1e-9)).sum()))
    return list(times_s[:number])
