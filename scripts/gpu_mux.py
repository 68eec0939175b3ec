"""Cases of bench_gpu.py --part mux: several models on one GPU, shared in three ways.

* `adbs`: one unit, KV by need, a lane for prompts and one for decode steps on disjoint SMs (green
  contexts), or on streams of their own;
* `spatial`: a unit per model, with a fixed part of the KV memory and of the SMs;
* `temporal`: one unit with one lane that serves whoever came first.

MuxServe (ICML 2024, section 4) compares the same three. The units are in this process: the brain
and the lanes that serve, without HTTP.
"""

import select
import statistics
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from bench_record import read
from bench_unit import OwnUnit, greedy
from gpu_engine import TINY_MODEL
from gpu_timing import Case

from muxrt.config.model import ModelShape
from muxrt.config.placement import Lanes, Memory, Mesh, ModelSpec, Scheduling, UnitModel, UnitSpec
from muxrt.config.presets import PRESETS, shape_of_sizes
from muxrt.core import Output
from muxrt.engine.build import UnitPlan, build_unit, plan_unit
from muxrt.models.device_llama import DeviceLlama
from muxrt.worker.device_build import open_device_executor
from muxrt.worker.device_lanes import Shares
from muxrt.worker.device_streams import device_sms, open_green, plain_share
from muxrt.worker.driver import open_driver
from muxrt.worker.green import share_out
from muxrt.worker.load import warm_up
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Lengths, PowerLaw, Traffic, Workload

SLO_SCALE = 8.0  # times what a request takes alone: MuxServe's default
GOOD, TOO_FEW = 0.99, 0.5  # attainment
SPARE = 1.1  # Poisson arrivals: a few more than are wanted
LOOK_S = 0.1  # between looks at the lanes, at most
LEAST_FOR_P99 = 1000  # requests
ALONE = "alone"
WARM_S = 3.0  # of traffic before the first point of a setting: graphs are captured in it
System = Literal["adbs", "spatial", "temporal"]
GIB = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """Models and traffic; tiny where there is no GPU."""

    shapes: Mapping[str, ModelShape]  # the most popular first
    dtype: Literal["float32", "bfloat16"]
    kv_bytes: int  # of all models together
    graph_bytes: int
    prompt: Lengths
    output: Lengths
    alphas: tuple[float, ...]
    rates: tuple[float, ...]  # requests/s, rising
    look_s: float  # of arrivals, to choose settings by
    requests: int  # of a point that counts, at least
    most_s: float  # of arrivals of a point
    max_sequences: int = 256
    singles: int = 5  # requests of each model alone
    warm_s: float = WARM_S


SIZES = Sizes(
    {name: PRESETS[name] for name in ("llama-7b", "llama-13b", "llama-30b")},
    "bfloat16",
    24 * GIB,
    2 * GIB,
    Lengths(mean_tokens=161, cv=1.0, min_tokens=4, max_tokens=1023),
    Lengths(mean_tokens=338, cv=1.0, min_tokens=4, max_tokens=1024),
    (0.9, 2.1),
    (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0),
    20.0,
    LEAST_FOR_P99,
    100.0,
)

TINY = Sizes(
    {name: shape_of_sizes(TINY_MODEL) for name in ("a", "b", "c")},
    "float32",
    12 << 20,
    0,
    Lengths(mean_tokens=12, cv=0.5, max_tokens=40),
    Lengths(mean_tokens=6, cv=0.5, max_tokens=10),
    (0.9,),
    (20.0, 40.0),
    0.5,
    10,
    0.5,
    max_sequences=16,
    singles=2,
    warm_s=0.2,
)


@dataclass(frozen=True)
class Setting:
    """One way to share a GPU."""

    system: System
    kind: Literal["green", "stream"]
    sm_pct: tuple[int, ...] | None = None  # None in `spatial`: by each model's part of the work

    @property
    def name(self) -> str:
        parts = "/".join(str(part) for part in self.sm_pct or ())
        return " ".join(part for part in (self.system, self.kind, parts) if part)


SETTINGS = (
    Setting("temporal", "stream", (100,)),
    Setting("spatial", "green", (34, 33, 33)),
    Setting("spatial", "green"),
    Setting("adbs", "green", (60, 40)),
    Setting("adbs", "green", (40, 60)),
    Setting("adbs", "stream", (50, 50)),
)


@dataclass(frozen=True)
class Alone:
    """What one request at a time takes, by model: seconds at a short and at a long prompt."""

    tokens: tuple[int, int]
    ttft_s: Mapping[str, tuple[float, float]]
    tpot_s: Mapping[str, float]
    note: str = ""

    @property
    def said(self) -> str:
        return ", ".join(f"{name} {1e3 * s:.1f} ms a token" for name, s in self.tpot_s.items())

    def latency_s(self, arrival: Arrival) -> float:
        """Of a request that nobody is beside: straight line between the two prompts."""
        (short, long), (first, second) = self.tokens, self.ttft_s[arrival.model]
        slope = max(0.0, (second - first) / (long - short))
        ttft_s = max(first, first + slope * (arrival.prompt_tokens - short))
        return ttft_s + (arrival.output_tokens - 1) * self.tpot_s[arrival.model]


@dataclass(frozen=True)
class Point:
    """One setting at one rate; p99 only from enough requests."""

    requests: int
    seconds: float  # from the first arrival to the last token
    attainment: float
    tokens_per_s: float
    requests_per_s: float
    ttft_p50_s: float
    tpot_p50_s: float
    ttft_p99_s: float | None
    tpot_p99_s: float | None
    note: str = ""

    @property
    def said(self) -> str:
        return f"{self.attainment:.1%} in time, {self.tokens_per_s:.0f} tokens/s"


@dataclass(slots=True)
class Told:
    """What a request has got; seconds after its arrival, in the end."""

    arrival: Arrival
    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


class Sharing:
    """A setting's units, open and warm."""

    def __init__(self, plans: Sequence[UnitPlan]) -> None:
        self.plans = plans
        self._told: dict[int, Told] = {}
        self._by_model: dict[str, OwnUnit] = {}
        self._units: list[OwnUnit] = []

    def open(
        self,
        llamas: Mapping[str, DeviceLlama],
        device: torch.device,
        shares: Sequence[Shares | None],
        stack: ExitStack,
    ) -> None:
        """Start the lanes of every unit on its share; `stack` closes them."""
        for plan, share in zip(self.plans, shares, strict=True):
            own = {name: llamas[name] for name in plan.models}
            executor = stack.enter_context(closing(open_device_executor(plan, own, device, share)))
            warm_up(plan, executor, lambda _: None)
            unit = OwnUnit(build_unit(plan, executor, time.monotonic, self._note), executor)
            self._units.append(unit)
            self._by_model.update(dict.fromkeys(plan.models, unit))

    def serve(self, plan: Sequence[Arrival]) -> list[Told]:
        """Serve `plan` to its end."""
        begun_s = time.monotonic()
        coming = deque(enumerate(plan))
        self._told.clear()
        while coming or not all(one.unit.is_idle for one in self._units):
            now_s = time.monotonic() - begun_s
            while coming and coming[0][1].at_s <= now_s:
                number, arrival = coming.popleft()
                self._told[number] = Told(arrival)
                prompt = 1 + np.arange(arrival.prompt_tokens) % 250
                request = greedy(number, arrival.model, prompt, arrival.output_tokens)
                self._by_model[arrival.model].unit.add(request)
            self._turn(coming[0][1].at_s - now_s if coming else LOOK_S)
        done = [self._told[number] for number in range(len(plan))]
        for one in done:
            one.first_s -= begun_s + one.arrival.at_s
            one.last_s -= begun_s + one.arrival.at_s
        return done

    def _turn(self, timeout_s: float) -> None:
        """Take in what is done; waits for the first, but not for longer than that."""
        waits = [one.executor.fileno() for one in self._units]
        ready, _, _ = select.select(waits, [], [], min(LOOK_S, max(0.0, timeout_s)))
        for one in self._units:
            if one.executor.fileno() in ready:
                one.executor.drain()
            timer_s = one.unit.next_timer()
            if timer_s is not None and timer_s <= time.monotonic():
                one.unit.tick()

    def _note(self, outputs: tuple[Output, ...]) -> None:
        now_s = time.monotonic()
        for output in outputs:
            if output.refusal is not None:
                raise RuntimeError(f"a request was refused: {output.refusal.message}")
            one = self._told[output.request_id]
            if output.tokens and not one.tokens:
                one.first_s = now_s
            one.tokens += len(output.tokens)
            one.last_s = now_s


class Bench:
    """The models on a device; one setting at a time is open."""

    def __init__(self, size: Sizes, device: torch.device) -> None:
        self.size, self.device = size, device
        self._llamas: dict[str, DeviceLlama] = {}
        self._open: tuple[Setting, float, Sharing] | None = None
        self._stack = ExitStack()

    def close(self) -> None:
        """Close what is open and let go of the models."""
        self._open = None
        self._stack.close()
        self._llamas.clear()

    def alone(self) -> Alone:
        """Single requests of each model, nothing beside them."""
        size, sharing = self.size, self._sharing(SETTINGS[0], 0.0)
        longest = (size.prompt.max_tokens or 2) - 1
        tokens = (min(int(size.prompt.mean_tokens or 1), longest // 2), longest)
        outputs = min(32, size.output.max_tokens or 32)
        ttft_s: dict[str, tuple[float, float]] = {}
        tpot_s: dict[str, float] = {}
        for name in size.shapes:
            firsts, steps = [], []
            for prompt in tokens:
                one = [Arrival(0.0, name, prompt, outputs)]
                runs = [sharing.serve(one)[0] for _ in range(size.singles)]
                firsts.append(statistics.median(run.first_s for run in runs))
                steps += [(run.last_s - run.first_s) / (outputs - 1) for run in runs]
            ttft_s[name] = (firsts[0], firsts[1])
            tpot_s[name] = statistics.median(steps)
        return Alone(tokens, ttft_s, tpot_s)

    def point(
        self, setting: Setting, alpha: float, rate_rps: float, alone: Alone, seconds: float
    ) -> Point:
        """A setting under Poisson arrivals."""
        sharing = self._sharing(setting, alpha)
        return _point(sharing.serve(arrivals(self._traffic(alpha, rate_rps, seconds))), alone)

    def _traffic(self, alpha: float, rate_rps: float, seconds: float) -> Workload:
        return Workload(
            duration_s=seconds,
            models=tuple(Traffic(name=name) for name in self.size.shapes),
            power_law=PowerLaw(alpha=alpha, rate_rps=rate_rps),
            prompt=self.size.prompt,
            output=self.size.output,
        )

    def _sharing(self, setting: Setting, alpha: float) -> Sharing:
        if self._open is None or self._open[:2] != (setting, alpha):
            self._stack.close()
            weights = [(rank + 1) ** -alpha for rank in range(len(self.size.shapes))]
            sharing = Sharing(list(self._plans(setting, weights)))
            if self.device.type == "cuda":
                self._stack.callback(torch.cuda.empty_cache)
            shares = self._shares(setting, weights)
            sharing.open(self._models(), self.device, shares, self._stack)
            warm = self._traffic(alpha, self.size.rates[-1], self.size.warm_s)
            sharing.serve(arrivals(warm))
            self._open = (setting, alpha, sharing)
        return self._open[2]

    def _models(self) -> dict[str, DeviceLlama]:
        """Made for the first case that is not measured yet."""
        if not self._llamas:
            dtype = getattr(torch, self.size.dtype)
            for name, shape in self.size.shapes.items():
                self._llamas[name] = DeviceLlama.random(shape, dtype, self.device)
        return self._llamas

    def _plans(self, setting: Setting, weights: Sequence[float]) -> Iterator[UnitPlan]:
        size, names = self.size, list(self.size.shapes)
        parts = [[name] for name in names] if setting.system == "spatial" else [names]
        specs = {
            name: ModelSpec(name=name, dtype=size.dtype, rate_rps=weight)
            for name, weight in zip(names, weights, strict=True)
        }
        for part in parts:
            spec = UnitSpec(
                name="+".join(part),
                models=tuple(UnitModel(name=name) for name in part),
                memory=Memory(
                    kv_bytes=size.kv_bytes // len(parts),
                    graph_bytes=size.graph_bytes // len(parts),
                ),
                mesh=Mesh(device="gpu", gpus=(0,)),
                lanes=Lanes(kind=setting.kind, sm_pct=setting.sm_pct if len(parts) == 1 else None),
                scheduling=Scheduling(
                    policy="adbs" if setting.system == "adbs" else "fcfs",
                    prefix_reuse=False,
                    max_sequences=size.max_sequences,
                ),
            )
            yield plan_unit(spec, {n: specs[n] for n in part}, {n: size.shapes[n] for n in part})

    def _shares(self, setting: Setting, weights: Sequence[float]) -> list[Shares | None]:
        """Of each unit; None: it has the device to itself."""
        if setting.system != "spatial":
            return [None]
        if self.device.type != "cuda":
            own = [plain_share("whole", self.device, 0) for _ in self.size.shapes]
        else:
            total, granule = device_sms(self.device)
            counts = share_out(total, granule, setting.sm_pct or self._by_work(weights))
            urgent = [0] * len(counts)
            own = open_green(open_driver(), self.device, counts, urgent, self._stack)
        return [Shares([share], [share]) for share in own]

    def _by_work(self, weights: Sequence[float]) -> tuple[int, ...]:
        """Percents in proportion to traffic x layers x width^2."""
        shapes = self.size.shapes.values()
        work = [
            weight * shape.num_layers * shape.hidden_size**2
            for weight, shape in zip(weights, shapes, strict=True)
        ]
        return tuple(max(1, round(100 * one / sum(work))) for one in work)


def _point(done: Sequence[Told], alone: Alone) -> Point:
    ttft_s = [one.first_s for one in done]
    tpot_s = [(one.last_s - one.first_s) / (one.tokens - 1) for one in done if one.tokens > 1]
    end_s = max(one.arrival.at_s + one.last_s for one in done)
    in_time = [one.last_s <= SLO_SCALE * alone.latency_s(one.arrival) for one in done]
    p99 = [
        float(np.percentile(times, 99)) if len(done) >= LEAST_FOR_P99 else None
        for times in (ttft_s, tpot_s)
    ]
    return Point(
        len(done),
        end_s,
        statistics.fmean(in_time),
        sum(one.tokens for one in done) / end_s,
        len(done) / end_s,
        statistics.median(ttft_s),
        statistics.median(tpot_s),
        *p99,
    )


# -- the experiment --------------------------------------------------------------------------------


class Experiment:
    """What is to be measured next, given what `path` has.

    A quick look at every setting, at the lowest rate at which one lane no longer keeps up, chooses
    each system's; those are measured at rising rates until fewer than half are in time.
    """

    def __init__(self, bench: Bench, path: Path) -> None:
        self._bench, self._path = bench, path

    def cases(self) -> Iterator[Case]:
        """All of the part, the models alone first."""
        size = self._bench.size
        yield Case(ALONE, self._bench.alone)
        for alpha in size.alphas:
            rate_rps = yield from self._look(alpha)
            for setting in self._best(alpha, rate_rps):
                for higher_rps in size.rates:
                    seconds = min(size.most_s, SPARE * size.requests / higher_rps)
                    yield self._case(setting, alpha, higher_rps, "point", seconds)
                    if self._has(setting, alpha, higher_rps, "point")["attainment"] < TOO_FEW:
                        break
        self._bench.close()

    def _look(self, alpha: float) -> Generator[Case, None, float]:
        """Every setting at the rate that is returned."""
        size, first = self._bench.size, SETTINGS[0]
        for rate_rps in size.rates:
            yield self._case(first, alpha, rate_rps, "look", size.look_s)
            if self._has(first, alpha, rate_rps, "look")["attainment"] < GOOD:
                break
        for setting in SETTINGS[1:]:
            yield self._case(setting, alpha, rate_rps, "look", size.look_s)
        return rate_rps

    def _best(self, alpha: float, rate_rps: float) -> list[Setting]:
        """Of each system the setting with the most requests in time, then the most tokens."""

        def merit(setting: Setting) -> tuple[float, float]:
            figure = self._has(setting, alpha, rate_rps, "look")
            return figure["attainment"], figure["tokens_per_s"]

        systems = dict.fromkeys(setting.system for setting in SETTINGS)
        return [max((s for s in SETTINGS if s.system == one), key=merit) for one in systems]

    def _case(
        self, setting: Setting, alpha: float, rate_rps: float, what: str, seconds: float
    ) -> Case:
        def measure() -> Point:
            return self._bench.point(setting, alpha, rate_rps, self._alone(), seconds)

        return Case(_title(setting, alpha, rate_rps, what), measure)

    def _has(self, setting: Setting, alpha: float, rate_rps: float, what: str) -> dict[str, Any]:
        figure: dict[str, Any] = self._done()[_title(setting, alpha, rate_rps, what)]
        return figure

    def _alone(self) -> Alone:
        kept = self._done()[ALONE]
        return Alone(tuple(kept["tokens"]), kept["ttft_s"], kept["tpot_s"])

    def _done(self) -> dict[str, Any]:
        figures: dict[str, Any] = read(self._path)["mux"]
        return figures


def _title(setting: Setting, alpha: float, rate_rps: float, what: str) -> str:
    return f"alpha {alpha:g}, {setting.name}, {rate_rps:g}/s, {what}"


def summary(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per alpha and setting: the most tokens/s, and the largest rate with 99 % in time."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for title, figure in figures.items():
        if not title.endswith(", point"):
            continue
        alpha, setting, rate, _ = title.split(", ")
        row = rows.setdefault((alpha, setting), {"tokens_per_s": 0.0, "rate_in_time": 0.0})
        row["tokens_per_s"] = max(row["tokens_per_s"], figure["tokens_per_s"])
        if figure["attainment"] >= GOOD:
            row["rate_in_time"] = max(row["rate_in_time"], float(rate.removesuffix("/s")))
    return [{"alpha": alpha, "setting": name, **row} for (alpha, name), row in rows.items()]
