"""The choices of MuxServe's published planner that the paper does not state, each as a switch.

muxrt's own `muxserve` strategy is the published algorithm. This computes what the planner of its
repository does (muxserve/muxsched/placement.py, June 2024), written anew, to find out which of its
choices give its logged placements their structure.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from math import floor, inf
from pathlib import Path

import numpy as np

from muxrt.core import Phase
from muxrt.cost.profile import load_profile

PROFILE = Path(__file__).parent.parent / "configs" / "profiles" / "llama_a100.yaml"
PROMPT_TOKENS, OUTPUT_TOKENS = 161, 337
GPU_GB = 80.0
WEIGHT_GB = {"llama-7b": 14, "llama-13b": 26, "llama-30b": 60, "llama-65b": 130}
SCALE = {"llama-7b": 1, "llama-13b": 2, "llama-30b": 4, "llama-65b": 8}  # x rate = computation
LEAST_TP = {"llama-7b": 1, "llama-13b": 1, "llama-30b": 2, "llama-65b": 4}
CONTROL_S = {"llama-7b": 1e-4, "llama-13b": 8e-5, "llama-30b": 7e-5, "llama-65b": 7e-5}
ACTIVATIONS_GB = 6.0
WEIGHTS_SHARE = 0.54  # of a GPU may hold weights: 43.2 GB
SM_PCTS = tuple(range(30, 91, 10))
NODE_SPLITS = (
    (8,), (4, 4), (4, 2, 2), (4, 2, 1, 1), (4, 1, 1, 1, 1), (2, 2, 2, 2), (2, 2, 2, 1, 1),
    (2, 2, 1, 1, 1, 1), (2, 1, 1, 1, 1, 1, 1), (1,) * 8,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choices:
    """What the code does; each default is what reproduces its logged placements."""

    stale_gains: bool = True  # gains are taken from what stood at that place before the last sort
    weighted_mean: bool = True  # the rate-weighted mean throughput counts, not the sum
    rounds_up: bool = True  # a batch costs what the next larger profiled one does
    keeps_misses: bool = True  # a degree that does not meet the rate is a candidate too
    control: bool = True  # scheduling costs time per sequence and step
    overload_pct: float = 20.0  # beyond 100 % of the SMs, for all decodes of a mesh together
    reserved_gb: float = 0.0  # per LLM beside its weights when a mesh is checked (June 2024: 7.6)


@dataclass(frozen=True, slots=True)
class Llm:
    name: str
    model: str
    rate_rps: float

    @property
    def computation(self) -> float:
        return self.rate_rps * SCALE[self.model]


Guest = tuple[Llm, int]  # with its share of the SMs for decodes
Unit = tuple[int, tuple[str, ...]]  # GPUs, names


def place(llms: Sequence[Llm], choices: Choices, nodes: int = 4) -> list[Unit]:
    """Meshes that are used, with the names of their LLMs; none where nothing fits."""
    planner = _Planner(llms, choices)
    best: tuple[float, list[Unit]] = (-1.0, [])
    for splits in combinations_with_replacement(NODE_SPLITS, nodes):
        sizes = [size for split in splits for size in split]
        if max(sizes) >= planner.least and len(sizes) <= len(llms):
            found = planner.fill(sizes)
            if found is not None and found[0] > best[0]:
                best = found
    return best[1]


class _Mesh:
    def __init__(self, size: int) -> None:
        self.size = size
        self.guests: tuple[Guest, ...] = ()
        self.free_gb = WEIGHTS_SHARE * GPU_GB * size
        self.free_pct = 100.0
        self.load = 0.0

    @property
    def order(self) -> tuple[float, float]:
        return self.load, -self.free_gb


class _Planner:
    def __init__(self, llms: Sequence[Llm], choices: Choices) -> None:
        self._choices = choices
        weights_gb = sum(WEIGHT_GB[llm.model] + ACTIVATIONS_GB for llm in llms)
        # The share that weights take of the cluster is used as the share that KV gets.
        self._kv_gb = weights_gb / 32
        self._kept: dict[tuple[int, tuple[Guest, ...]], float] = {}
        self._llms = sorted(llms, key=lambda m: (-m.computation, -SCALE[m.model]))
        self._shares = {llm.name: self._candidates(llm) for llm in llms}
        self.least = max(min(shares) for shares in self._shares.values())

    def _candidates(self, llm: Llm) -> dict[int, int]:
        meets, misses = {}, {}
        for tp in (1, 2, 4, 8):
            if tp < LEAST_TP[llm.model] or not _is_profiled(llm.model, tp):
                continue
            most_rps = 0.0
            for pct in SM_PCTS:
                found = _alone(llm, tp, pct, self._kv_gb * tp, self._choices)
                if found.meets:
                    meets[tp] = pct
                    break
                if found.rps > most_rps:
                    most_rps, misses[tp] = found.rps, pct
        if self._choices.keeps_misses or not meets:
            return {**misses, **meets}
        return meets

    def fill(self, sizes: list[int]) -> tuple[float, list[Unit]] | None:
        """Score and units of one mesh group; None where an LLM finds no place."""
        given = [_Mesh(size) for size in sizes]
        ordered = sorted(given, key=lambda mesh: mesh.order)
        stale = [0.0] * len(given)
        for llm in self._llms:
            best, most = -1, -inf
            for place, mesh in enumerate(ordered):
                pct = self._shares[llm.name].get(mesh.size)
                if pct is None or not self._holds(mesh, llm, pct):
                    continue
                now = stale[place] if self._choices.stale_gains else self._value(mesh)
                gain = self._value(mesh, (llm, pct)) - now
                sizes_by_place = given if self._choices.stale_gains else ordered
                if gain > most or (gain == most and mesh.size < sizes_by_place[best].size):
                    best, most = place, gain
            if best < 0:
                return None
            self._add(ordered[best], llm)
            stale[best] += most
            ordered.sort(key=lambda mesh: mesh.order)
        return self._score(given), [
            (mesh.size, tuple(llm.name for llm, _ in mesh.guests)) for mesh in given if mesh.guests
        ]

    def _holds(self, mesh: _Mesh, llm: Llm, pct: int) -> bool:
        enough = mesh.free_pct + self._choices.overload_pct >= pct
        return enough and mesh.free_gb >= WEIGHT_GB[llm.model]

    def _add(self, mesh: _Mesh, llm: Llm) -> None:
        pct = self._shares[llm.name][mesh.size]
        mesh.guests = (*mesh.guests, (llm, pct))
        mesh.free_gb -= WEIGHT_GB[llm.model] + self._choices.reserved_gb
        mesh.free_pct -= pct
        mesh.load += llm.computation / mesh.size

    def _value(self, mesh: _Mesh, *more: Guest) -> float:
        key = (mesh.size, (*mesh.guests, *more))
        if key not in self._kept:
            self._kept[key] = _throughput(*key, self._choices) if key[1] else 0.0
        return self._kept[key]

    def _score(self, meshes: Sequence[_Mesh]) -> float:
        if not self._choices.weighted_mean:
            return sum(self._value(mesh) for mesh in meshes)
        rates = [sum(llm.rate_rps for llm, _ in mesh.guests) for mesh in meshes]
        weighted = (
            rate * self._value(mesh) for rate, mesh in zip(rates, meshes, strict=True) if rate
        )
        return sum(weighted) / sum(rates)


@dataclass(frozen=True, slots=True)
class _Alone:
    meets: bool
    rps: float
    batch: int


@cache
def _alone(llm: Llm, tp: int, pct: int, kv_gb: float, choices: Choices) -> _Alone:
    """Halving the batch's range until it is narrower than one sequence."""
    low, high = 1.0, max(2.0, _most(llm, tp, pct, kv_gb))
    batch = rps = 0.0
    while high - low >= 1:
        batch = (low + high) / 2
        prefill_s, decode_s = _times(llm.model, tp, pct, batch, choices)
        rps = batch / (decode_s * OUTPUT_TOKENS + prefill_s)
        low, high = (low, batch) if rps >= llm.rate_rps else (batch, high)
    meets = _nearly(rps) > llm.rate_rps
    return _Alone(meets, llm.rate_rps if meets else rps, int(batch))


def _nearly(rps: float) -> float:
    return rps + min(0.5, 0.1 * rps)


def _most(llm: Llm, tp: int, pct: int, kv_gb: float) -> float:
    """The largest batch: what the KV holds, and what was profiled."""
    sequence_gb = _kv_token_gb(llm.model) * (PROMPT_TOKENS + OUTPUT_TOKENS)
    return min(floor(kv_gb / sequence_gb), _curve(llm.model, tp, pct, Phase.DECODE)[0][-1])


def _throughput(size: int, guests: tuple[Guest, ...], choices: Choices) -> float:
    """Of a unit: the best seen while batches grow, worst served LLM first."""
    kv_gb = 0.98 * GPU_GB * size - sum(WEIGHT_GB[m.model] + ACTIVATIONS_GB for m, _ in guests)
    weights = [llm.rate_rps * _kv_token_gb(llm.model) for llm, _ in guests]
    shares_gb = [max(0.0, kv_gb) * weight / sum(weights) for weight in weights]
    most = [_most(m, size, pct, gb) for (m, pct), gb in zip(guests, shares_gb, strict=True)]
    batches = [
        _alone(llm, size, pct, gb, choices).batch
        for (llm, pct), gb in zip(guests, shares_gb, strict=True)
    ]
    best = 0.0
    while any(batch < limit for batch, limit in zip(batches, most, strict=True)):
        served = _served(size, guests, batches, choices)
        best = max(best, _of_unit(guests, served, choices))
        behind = [
            (rps / llm.rate_rps, index)
            for index, ((llm, _), rps) in enumerate(zip(guests, served, strict=True))
            if _nearly(rps) < llm.rate_rps and batches[index] < most[index]
        ]
        if not behind:
            break
        batches[min(behind)[1]] += 1
    return best


def _served(
    size: int, guests: tuple[Guest, ...], batches: Sequence[int], choices: Choices
) -> list[float]:
    times = [
        _times(llm.model, size, pct, batch, choices)
        for (llm, pct), batch in zip(guests, batches, strict=True)
    ]
    prefills_s = sum(prefill_s for prefill_s, _ in times)
    return [
        batch / (decode_s * OUTPUT_TOKENS + prefills_s)
        for batch, (_, decode_s) in zip(batches, times, strict=True)
    ]


def _of_unit(guests: tuple[Guest, ...], served: Sequence[float], choices: Choices) -> float:
    if not choices.weighted_mean:
        return sum(min(m.rate_rps, rps) for (m, _), rps in zip(guests, served, strict=True))
    weighted = sum(m.rate_rps * rps for (m, _), rps in zip(guests, served, strict=True))
    return weighted / sum(llm.rate_rps for llm, _ in guests)


@cache
def _times(model: str, tp: int, pct: int, batch: float, choices: Choices) -> tuple[float, float]:
    """Seconds of a prefill at 100 % and of a decode step at `pct`."""
    decodes, prefills = _curve(model, tp, pct, Phase.DECODE), _curve(model, tp, 100, Phase.PREFILL)
    if choices.rounds_up:
        # One place for both: that of the decode.
        index = bisect_left(decodes[0], batch)
        prefill_s, decode_s = (
            times[min(index, len(times) - 1)] for _, times in (prefills, decodes)
        )
    else:
        prefill_s, decode_s = (float(np.interp(batch, *curve)) for curve in (prefills, decodes))
    return prefill_s, decode_s + (CONTROL_S[model] * batch if choices.control else 0.0)


@cache
def _curve(model: str, tp: int, pct: int, phase: Phase) -> tuple[list[int], list[float]]:
    """Batches and seconds at the mean length: of the first profiled length above it."""
    length = PROMPT_TOKENS if phase is Phase.PREFILL else OUTPUT_TOKENS
    batches, times = [], []
    for batch, by_length in sorted(_cells()[model, tp, pct].items()):
        measured = [
            (seq_len, time_s)
            for seq_len, cell in sorted(by_length.items())
            if (time_s := cell[phase]) is not None
        ]
        if not measured:
            continue
        last = next(
            (i for i, (seq_len, _) in enumerate(measured) if seq_len > length), len(measured) - 1
        )
        values = [time_s for _, time_s in measured[: last + 1]]
        if phase is Phase.DECODE:  # a mean of running means
            running = [sum(values[: i + 1]) / (i + 1) for i in range(len(values))]
            values = [sum(running) / len(running)]
        batches.append(batch)
        times.append(values[-1])
    return batches, times


@cache
def _cells() -> dict[tuple[str, int, int], dict[int, dict[int, dict[Phase, float | None]]]]:
    found: dict[tuple[str, int, int], dict[int, dict[int, dict[Phase, float | None]]]] = {}
    for cell in load_profile(PROFILE).cells:
        by_batch = found.setdefault((cell.model, cell.tp, cell.sm_pct), {})
        by_batch.setdefault(cell.batch, {})[cell.seq_len] = {
            phase: cell.time_s(phase) for phase in (Phase.PREFILL, Phase.DECODE)
        }
    return found


@cache
def _is_profiled(model: str, tp: int) -> bool:
    return (model, tp, SM_PCTS[0]) in _cells()


@cache
def _kv_token_gb(model: str) -> float:
    shape = load_profile(PROFILE).shapes[model]
    return 4 * shape.num_layers * shape.hidden_size / 2**30
