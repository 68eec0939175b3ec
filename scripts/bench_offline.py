"""One model, no server: decode and prefill of both engines, alternating."""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import vllm_servers
from bench_models import preset_folders
from bench_record import CORES, Record
from engine_process import EngineProcess
from offline_case import Case, Timing
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from muxrt.config.placement import ModelSpec

HERE = Path(__file__).parent
VLLM, MUXRT = "vLLM", "muxrt"
FP32 = {"dtype": "float32"}
# What only muxrt is measured with; both engines get FP32.
COLUMNS: dict[str, dict[str, str]] = {
    "muxrt kv bf16": {"dtype": "float32", "kv_dtype": "bfloat16"},
    "muxrt bf16": {"dtype": "bfloat16"},
    "muxrt int8": {"dtype": "float32", "weights": "int8"},
}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
MAX_MODEL_LEN = 1_024


@dataclass(frozen=True, slots=True)
class Kind:
    """A case but for its prompts."""

    phase: str
    num_prompts: int
    prompt_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        if self.phase == "decode":
            return f"decode, batch {self.num_prompts}"
        return f"prefill {self.num_prompts} x {self.prompt_tokens}"

    def tokens_per_s(self, timing: Timing) -> float:
        """Of the phase that this is about."""
        if self.phase == "decode":
            return timing.decode_tokens / timing.decode_s
        return self.num_prompts * self.prompt_tokens / timing.prefill_s


def kinds(batches: Sequence[int], prompt_tokens: int, output_tokens: int) -> list[Kind]:
    """Decode at each batch size; prefill of one prompt and of eight."""
    decode = [Kind("decode", batch, prompt_tokens, output_tokens) for batch in batches]
    prefill_tokens = min(512, MAX_MODEL_LEN - 1)
    return [*decode, *(Kind("prefill", number, prefill_tokens, 1) for number in (1, 8))]


def usable_columns(names: Sequence[str]) -> Iterator[str]:
    """Those of `names` that this muxrt can load; says which it cannot."""
    for name in names:
        missing = COLUMNS[name].keys() - set(ModelSpec.__struct_fields__)
        if missing:
            print(f"no column {name!r}: models have no {', '.join(missing)} here")
        else:
            yield name


class Engines:
    """The processes of one model, by column."""

    def __init__(self, folder: Path, kv_bytes: int, logs: Path) -> None:
        self._folder, self._kv_bytes, self._logs = folder, kv_bytes, logs

    def start(self, column: str) -> EngineProcess:
        """The engine of that column, which loads now."""
        return self._vllm() if column == VLLM else self._muxrt(column, COLUMNS.get(column, FP32))

    def _muxrt(self, column: str, options: dict[str, str]) -> EngineProcess:
        told = {
            "folder": str(self._folder),
            "kv_bytes": self._kv_bytes,
            "options": {**options, "max_model_len": MAX_MODEL_LEN},
        }
        command = [sys.executable, str(HERE / "offline_muxrt.py"), json.dumps(told)]
        return EngineProcess(command, self._log(column), os.environ)

    def _vllm(self) -> EngineProcess:
        options = {
            "model": str(self._folder),
            **FP32,
            "max_model_len": MAX_MODEL_LEN,
            "kv_cache_memory_bytes": self._kv_bytes,
            # muxrt's side has no prefix keys, which the endpoint makes.
            "enable_prefix_caching": False,
        }
        python = str(vllm_servers.VENV / "bin" / "python")
        command = [python, str(HERE / "offline_vllm.py"), json.dumps(options)]
        env = vllm_servers.environment(CORES, bound=True)
        return EngineProcess(command, self._log(VLLM), env)

    def _log(self, column: str) -> Path:
        return self._logs / f"{self._folder.name}-{column.replace(' ', '-')}.log"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    models: tuple[str, ...]
    kinds: tuple[Kind, ...]
    columns: tuple[str, ...]
    rounds: int
    kv_bytes: int
    with_vllm: bool = True


def measure(plan: Plan, folders: Sequence[Path], record: Record) -> None:
    """Every case of every model, and after each model its summary."""
    logs = Path(tempfile.mkdtemp(prefix="muxrt-offline-"))
    for folder in folders:
        with ExitStack() as stack, Progress() as progress:
            engines = _start(plan, Engines(folder, plan.kv_bytes, logs), progress, stack)
            facts = engines[MUXRT].facts
            record.add("models", {"model": folder.name, **facts})
            _run_rounds(plan, folder.name, engines, progress, record)
    record.put("summary", summary(record.data))


def _start(
    plan: Plan, engines: Engines, progress: Progress, stack: ExitStack
) -> dict[str, EngineProcess]:
    """One after the other: each has the cores to itself while it compiles and warms up."""
    names = [MUXRT, *([VLLM] if plan.with_vllm else []), *plan.columns]
    task = progress.add_task("starting", total=len(names))
    found = {}
    for name in names:
        progress.update(task, description=f"starting {name}")
        found[name] = stack.enter_context(engines.start(name))
        found[name].wait_ready()
        progress.advance(task)
    progress.remove_task(task)
    return found


def _run_rounds(
    plan: Plan, model: str, engines: dict[str, EngineProcess], progress: Progress, record: Record
) -> None:
    """The columns next to each other within a case, so that slow changes of the machine cancel."""
    for kind in plan.kinds:
        warm = Case(kind.num_prompts, kind.prompt_tokens, min(4, kind.output_tokens), seed=0)
        for engine in engines.values():
            engine.run(warm)
    runs = list(_order(plan, list(engines)))
    for number, kind, column in progress.track(runs, description=model):
        case = Case(kind.num_prompts, kind.prompt_tokens, kind.output_tokens, 1 + number)
        timing = engines[column].run(case)
        row = {"model": model, "column": column, "case": kind.name, "round": number}
        row |= {**asdict(kind), **asdict(timing)}
        record.add("runs", row | {"tokens_per_s": kind.tokens_per_s(timing)})


def _order(plan: Plan, columns: Sequence[str]) -> Iterator[tuple[int, Kind, str]]:
    """Round, case and column of each run."""
    for number in range(plan.rounds):
        for kind in plan.kinds:
            # What stands beside the comparison is measured once: it is not worth the minutes.
            here = columns if number == 0 else [name for name in columns if name not in COLUMNS]
            yield from ((number, kind, column) for column in here)


def summary(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per model and case: the median of each column, and muxrt's ratio to vLLM."""
    facts = {model["model"]: model for model in data.get("models", [])}
    rates: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in data.get("runs", []):
        columns = rates.setdefault((run["model"], run["case"]), {})
        columns.setdefault(run["column"], []).append(run["tokens_per_s"])
    rows = []
    for (model, case), columns in rates.items():
        medians = {column: statistics.median(values) for column, values in columns.items()}
        row: dict[str, Any] = {"model": model, "case": case, "tokens_per_s": medians}
        if VLLM in medians:
            row["ratio"] = medians[MUXRT] / medians[VLLM]
        if case == "decode, batch 1":
            row["bandwidth"] = _bandwidth(facts[model], medians, data)
        rows.append(row)
    return rows


def _bandwidth(
    facts: dict[str, Any], medians: dict[str, float], data: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Bytes a decode step of one sequence reads, over what the cores can read: by column."""
    run = next(run for run in data["runs"] if run["case"] == "decode, batch 1")
    context = run["prompt_tokens"] + run["output_tokens"] / 2  # on average over the answer
    found = {}
    for column, tokens_per_s in medians.items():
        options = COLUMNS.get(column, FP32)
        weight_bytes = BYTES[options.get("weights", options["dtype"])]
        kv_bytes = BYTES[options.get("kv_dtype", options["dtype"])]
        step_bytes = facts["params_read"] * weight_bytes
        step_bytes += context * facts["kv_elements_per_token"] * kv_bytes
        shares = {
            f"of_{int(size) >> 20}_MiB": step_bytes * tokens_per_s / bytes_per_s
            for size, bytes_per_s in facts["stream_read"].items()
        }
        found[column] = {"bytes_per_s": step_bytes * tokens_per_s, **shares}
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The summary for people."""
    columns = list(dict.fromkeys(column for row in rows for column in row["tokens_per_s"]))
    shown = Table("model", "case", *(f"{column}\ntokens/s" for column in columns), "muxrt\n/ vLLM")
    for row in rows:
        rates = [row["tokens_per_s"].get(column) for column in columns]
        cells = ["" if rate is None else f"{rate:,.0f}" for rate in rates]
        shown.add_row(row["model"], row["case"], *cells, f"{row.get('ratio', 0):.2f}")
    return shown


def bandwidth_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What share of the read bandwidth batch-1 decoding reaches."""
    for row in rows:
        for column, found in row.get("bandwidth", {}).items():
            shares = ", ".join(
                f"{found[key]:.0%} {key.replace('_', ' ')}" for key in found if key[:3] == "of_"
            )
            yield f"{row['model']}, {column}: {found['bytes_per_s'] / 1e9:.1f} GB/s read; {shares}"


def offline(plan: Plan, out: Path, folders: Sequence[Path] | None = None) -> dict[str, Any]:
    """Measure, write, print."""
    settings = {**msgspec.to_builtins(plan), "both": "fp32 weights and KV, greedy, ignore_eos"}
    if plan.with_vllm:
        settings["vllm"] = vllm_servers.said(vllm_servers.environment(CORES, bound=True))
    record = Record(out, settings)
    measure(plan, folders or preset_folders(plan.models), record)
    rows = record.data["summary"]
    console = Console()
    console.print(table(rows))
    for line in bandwidth_lines(rows):
        console.print(line)
    return record.data
