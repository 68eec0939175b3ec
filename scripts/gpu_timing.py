"""How benchmarks of a GPU time and record: medians by device events, cases that resume."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from bench_record import Record, read

Bound = Literal["bytes", "flops"]


@dataclass(frozen=True)
class Figure:
    """A timed piece of work: `amount` bytes or floating-point operations that it must do."""

    ms: float | None  # None where `note` says why it was not timed
    bound: Bound
    amount: float
    error: float | None  # against float64, relative, by the norm; None where nothing is computed
    note: str = ""

    @property
    def said(self) -> str:
        return self.note or f"{self.ms:.4f} ms"


class Measured(Protocol):
    """A dataclass that can say itself in a line."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def said(self) -> str: ...


@dataclass(frozen=True)
class Case:
    """One line of the table; `measure` allocates, checks and times."""

    name: str
    measure: Callable[[], Measured]


def median_ms(run: Callable[[], Any], device: torch.device) -> float:
    """The median of many runs, the cache emptied before each; interpreted once on a CPU."""
    if device.type == "cuda":
        from triton.testing import do_bench  # what Triton itself times with

        return float(do_bench(run, warmup=50, rep=200, return_mode="median"))
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """By the norm of the difference; NaN anywhere is NaN."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def where(device: torch.device) -> dict[str, Any]:
    """What the figures are measured on."""
    if device.type != "cuda":
        return {"device": "Triton's interpreter", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def run_cases(
    path: Path, part: str, cases: Iterable[Case], device: torch.device, budget_s: float
) -> dict[str, Any]:
    """Measure what `path` does not have yet until `budget_s` are over; all that it has then.

    Raises ValueError where the file holds figures of another device.
    """
    record = _opened(path, where(device))
    done: dict[str, Any] = record.data.setdefault(part, {})
    started = time.monotonic()
    for case in cases:
        if case.name in done:
            continue
        if time.monotonic() - started > budget_s:
            print(f"{budget_s:.0f} s are over before {case.name}: run again to go on")
            break
        figure = case.measure()
        done[case.name] = {**asdict(figure), "commit": record.data["commit"]}
        record.write()
        print(f"{case.name}: {figure.said}", flush=True)
    return done


def _opened(path: Path, device: dict[str, Any]) -> Record:
    kept = read(path) if path.is_file() else None
    if kept is not None and kept["settings"]["device"] != device["device"]:
        raise ValueError(
            f"found figures of {kept['settings']['device']} in {path}, expected those of "
            f"{device['device']}: choose another --out"
        )
    return Record(path, device, kept)
