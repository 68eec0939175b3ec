"""Three models over HTTP: one muxrt endpoint against three vLLM servers, at rising rates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import vllm_servers
from bench_models import preset_folders
from bench_rates import (
    Load,
    Point,
    best_per_rate,
    measure,
    most_goodput,
    rising,
    sustained,
    warm_up,
)
from bench_record import CORES, Record
from bench_serving import Serving, muxrt_serving, one_unit
from process_memory import tree_memory
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from muxrt.config.model import load_shape
from muxrt.config.placement import Lanes, Memory, Scheduling, Slo
from muxrt.config.serve import ServeConfig
from muxrt.cost.memory import num_params
from muxrt.workload.spec import Lengths

MODELS = ("27m", "27m-gqa", "88m")
MAX_MODEL_LEN = 512
SLO = Slo(ttft_s=1.0, tpot_s=0.1)
PROMPT = Lengths(mean_tokens=100, cv=0.5, max_tokens=300)
OUTPUT = Lengths(mean_tokens=60, cv=0.5, max_tokens=150)
OVERLOAD = 3.0  # times the sustained rate
VLLM, MUXRT = "vllm", "muxrt"

Serve = Callable[[], AbstractContextManager[Serving]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    models: tuple[str, ...]
    weights: tuple[float, ...]  # of the models' traffic
    rates: dict[str, tuple[float, ...]]  # requests/s, by side
    settings: dict[str, tuple[str, ...]]  # by side: bound, unbound; see `config`
    kv_bytes: int  # of all models together, on either side
    seconds: float  # of load at each rate, at least
    requests: int  # at each rate, at least
    most_seconds: float  # of load at each rate, whatever `requests` asks for
    trace: str | None = None

    def load(self) -> Load:
        trace = Path(self.trace) if self.trace else None
        return Load(self.models, self.weights, PROMPT, OUTPUT, SLO, trace)

    def duration_s(self, rate_rps: float) -> float:
        return min(self.most_seconds, max(self.seconds, self.requests / rate_rps))


def trio(plan: Plan, out: Path, folders: Sequence[Path] | None = None) -> dict[str, Any]:
    """Measure, write, print."""
    folders = folders or preset_folders(plan.models)
    record = Record(out, _settings(plan))
    weights = sum(4 * num_params(load_shape(folder)) for folder in folders)
    with Progress() as progress:
        runner = Runner(plan, record, progress, weights)
        for setting in plan.settings[VLLM]:
            env = vllm_servers.environment(CORES, bound=setting == "bound")
            part = plan.kv_bytes // len(folders)
            serve = partial(vllm_servers.vllm_serving, folders, part, MAX_MODEL_LEN, env)
            runner.rise(VLLM, setting, serve)
        for setting in plan.settings[MUXRT]:
            runner.rise(MUXRT, setting, partial(muxrt_serving, config(plan, folders, setting)))
    record.put("summary", summary(record.data))
    show(record.data)
    return record.data


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        **msgspec.to_builtins(plan),
        "trace": plan.trace and Path(plan.trace).name,
        "slo": msgspec.to_builtins(SLO),
        "prompt": msgspec.to_builtins(PROMPT),
        "output": msgspec.to_builtins(OUTPUT),
        "max_model_len": MAX_MODEL_LEN,
        "both": "fp32 weights and KV, greedy, ignore_eos; the sides never run at the same time",
        "vllm": {
            setting: vllm_servers.said(vllm_servers.environment(CORES, setting == "bound"))
            for setting in plan.settings[VLLM]
        },
        "vllm_start": "three servers at once, compiled code of earlier runs reused where there",
    }


def config(plan: Plan, folders: Sequence[Path], setting: str) -> ServeConfig:
    """One unit with all models; a setting is cores per lane, and maybe a queue timeout: 1+1/1.0."""
    lanes, _, timeout = setting.partition("/")
    return one_unit(
        folders,
        plan.weights,
        Memory(kv_bytes=plan.kv_bytes),
        Lanes(split=tuple(int(cores) for cores in lanes.split("+"))),
        Scheduling(),
        max_model_len=MAX_MODEL_LEN,
        slo=SLO,
        queue_timeout_s=float(timeout) if timeout else None,
    )


class Runner:
    """Runs settings one after the other and records what they do."""

    def __init__(self, plan: Plan, record: Record, progress: Progress, weight_bytes: int) -> None:
        self._plan, self._record, self._progress = plan, record, progress
        self._weight_bytes = weight_bytes

    def rise(self, side: str, setting: str, serve: Serve) -> None:
        """Start a server, offer more and more, note its memory, end it."""
        plan, points = self._plan, list[Point]()
        with self._served(side, setting, serve) as (serving, task):
            warm_up(serving.urls, plan.load(), min(plan.rates[side]))
            for number, rate_rps in enumerate(rising(plan.rates[side], points)):
                point = self._measure(side, setting, serving, task, rate_rps, seed=number)
                points.append(point)
                self._record.add("points", {"side": side, **asdict(point)})

    def _measure(
        self, side: str, setting: str, serving: Serving, task: TaskID, rate_rps: float, seed: int
    ) -> Point:
        duration_s = self._plan.duration_s(rate_rps)
        self._progress.update(
            task, description=f"{side} {setting}: {rate_rps:g}/s for {duration_s:.0f} s"
        )
        load = self._plan.load()
        point = measure(setting, serving.urls, load, rate_rps, duration_s, seed)
        self._progress.console.print(
            f"{side} {setting}: {point.offered_rps:.2f}/s offered, {point.attainment:.0%} in SLO,"
            f" goodput {point.goodput_rps:.2f}/s"
        )
        self._progress.advance(task)
        return point

    @contextmanager
    def _served(self, side: str, setting: str, serve: Serve) -> Iterator[tuple[Serving, TaskID]]:
        task = self._progress.add_task(f"{side} {setting}: starting", total=None)
        with serve() as serving:
            at_ready = tree_memory(serving.pids)
            yield serving, task
            at_end = tree_memory(serving.pids)
        # Weights and arena apart, when ready: vLLM writes zeros to all of its KV memory when it
        # starts; muxrt's pages come with use (what its warm-up touched counts against it).
        kv = self._plan.kv_bytes if side == VLLM else 0
        row = {"side": side, "setting": setting, "ready_s": serving.ready_s}
        row |= {"at_ready": asdict(at_ready), "at_end": asdict(at_end)}
        row |= {"weight_bytes": self._weight_bytes, "kv_resident_bytes": kv}
        self._record.add(
            "servers", row | {"rest_bytes": at_ready.pss_bytes - self._weight_bytes - kv}
        )
        self._progress.remove_task(task)


def points_of(data: dict[str, Any], side: str) -> list[Point]:
    """The points of a record, as they were measured."""
    rows = [row for row in data.get("points", []) if row["side"] == side]
    return [Point(**{key: row[key] for key in row if key != "side"}) for row in rows]


def summary(data: dict[str, Any]) -> dict[str, Any]:
    """Each side at its best setting per rate, and muxrt over vLLM."""
    sides = {}
    for side in (VLLM, MUXRT):
        if points := best_per_rate(points_of(data, side)):
            sides[side] = _side(data, side, points)
    found: dict[str, Any] = {**sides}
    if MUXRT in sides and (far := _overloaded(data, sides[MUXRT])):
        share = far.goodput_rps / sides[MUXRT]["most_goodput_rps"]
        found["overload"] = {"rate_rps": far.rate_rps, "goodput_over_most": share}
    if len(sides) == 2:
        keys = ("sustained_rps", "most_goodput_rps", "ready_s", "rest_bytes")
        found["muxrt_over_vllm"] = {
            key: sides[MUXRT][key] / sides[VLLM][key] for key in keys if sides[VLLM][key]
        }
    return found


def _overloaded(data: dict[str, Any], side: dict[str, Any]) -> Point | None:
    """muxrt's lowest rate of OVERLOAD times the sustained one or more, at the best setting."""
    far = (
        point
        for point in points_of(data, MUXRT)
        if point.setting == side["most_goodput_setting"]
        and point.rate_rps >= OVERLOAD * side["sustained_rps"]
    )
    return min(far, key=lambda point: point.rate_rps, default=None)


def _side(data: dict[str, Any], side: str, points: list[Point]) -> dict[str, Any]:
    at_90, best = sustained(points), most_goodput(points)
    servers = [row for row in data["servers"] if row["side"] == side]
    return {
        "sustained_rps": at_90.rate_rps,
        "sustained_how": at_90.how,
        "most_goodput_rps": best.goodput_rps,
        "most_goodput_at_rps": best.rate_rps,
        "most_goodput_setting": best.setting,
        "ready_s": min(row["ready_s"] for row in servers),
        "pss_bytes": min(row["at_end"]["pss_bytes"] for row in servers),
        "rest_bytes": min(row["rest_bytes"] for row in servers),
    }


def show(data: dict[str, Any]) -> None:
    """Every run, and what they add up to."""
    table = Table(
        "side", "setting", "offered/s", "in SLO", "goodput/s", "TTFT ms", "TPOT ms", "lost"
    )
    for row in data["points"]:
        table.add_row(
            row["side"],
            row["setting"],
            f"{row['offered_rps']:.2f}",
            f"{row['attainment']:.0%}",
            f"{row['goodput_rps']:.2f}",
            _pair_ms(row["ttft_p50_s"], row["ttft_p99_s"]),
            _pair_ms(row["tpot_p50_s"], row["tpot_p99_s"]),
            str(row["failed"] + row["refused"]),
        )
    console = Console()
    console.print(table)
    console.print_json(data=data["summary"])


def _pair_ms(low_s: float | None, high_s: float | None) -> str:
    """p50 / p99."""
    return "" if low_s is None or high_s is None else f"{1e3 * low_s:.0f} / {1e3 * high_s:.0f}"
