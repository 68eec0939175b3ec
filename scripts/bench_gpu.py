"""Figures of a CUDA device, a part at a time: resumable, at most 8 minutes each.

    python scripts/bench_gpu.py --part kernels                # needs a GPU; run again to go on
    python scripts/bench_gpu.py --part engine                 # one model: prompts, decode steps
    python scripts/bench_gpu.py --part mux                    # three models, shared in three ways
    python scripts/bench_gpu.py --part kernels --dry-run --out /tmp/dry.json    # needs none

A part measures what its file does not have yet. `--dry-run` runs the same code at tiny sizes where
there is no GPU (kernels in Triton's interpreter): its errors are real, its times mean nothing.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from bench_record import FOLDER

if TYPE_CHECKING:
    import torch

BUDGET_S = 450.0  # a case takes seconds: the part then ends within 8 minutes


class Part(StrEnum):
    """What is measured."""

    KERNELS = "kernels"
    ENGINE = "engine"
    MUX = "mux"


def main(
    part: Annotated[Part, typer.Option(help="what is measured")],
    out: Annotated[Path, typer.Option(help="JSON that figures are merged into")] = (
        FOLDER / "gpu.json"
    ),
    dry_run: Annotated[bool, typer.Option(help="tiny sizes, no GPU needed")] = False,
    only: Annotated[str, typer.Option(help="kernels, engine: cases whose name has this")] = "",
    budget_s: Annotated[float, typer.Option(help="no case begins later")] = BUDGET_S,
) -> None:
    """Measure a part.   Example: python scripts/bench_gpu.py --part kernels"""
    if dry_run and part is Part.KERNELS:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not dry_run and not torch.cuda.is_available():
        typer.echo(
            "error: found no CUDA device, expected one (--dry-run runs the same code at tiny sizes "
            "without)",
            err=True,
        )
        raise typer.Exit(1)
    torch.manual_seed(0)
    run = {Part.KERNELS: _kernels, Part.ENGINE: _engine, Part.MUX: _mux}[part]
    try:
        run(out, torch.device("cpu" if dry_run else "cuda"), only, budget_s)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _kernels(out: Path, device: "torch.device", only: str, budget_s: float) -> None:
    import gpu_kernels
    from gpu_timing import run_cases

    size = gpu_kernels.Sizes() if device.type == "cuda" else gpu_kernels.TINY
    cases = [case for case in gpu_kernels.cases(size, device) if only in case.name]
    figures = run_cases(out, Part.KERNELS, cases, device, budget_s)
    print_table(figures, has_ceilings=device.type == "cuda")
    print(f"{len(figures)} figures in {out}")
    if wrong := [name for name, figure in figures.items() if figure["note"].startswith("wrong")]:
        raise ValueError(f"wrong results: {', '.join(wrong)}")


def _engine(out: Path, device: "torch.device", only: str, budget_s: float) -> None:
    import gpu_engine
    import gpu_kernels
    from gpu_timing import run_cases

    is_gpu = device.type == "cuda"
    ceilings = {}
    if is_gpu:  # what the steps are compared with
        sizes = gpu_kernels.Sizes()
        first = [c for c in gpu_kernels.cases(sizes, device) if c.name in gpu_kernels.CEILINGS]
        kernels = run_cases(out, Part.KERNELS, first, device, budget_s)
        ceilings = {kernels[name]["bound"]: _rate(kernels[name]) for name in gpu_kernels.CEILINGS}
    size = gpu_engine.SIZES if is_gpu else gpu_engine.TINY
    cases = (case for case in gpu_engine.cases(size, device) if only in case.name)
    figures = run_cases(out, Part.ENGINE, cases, device, budget_s)
    print(f"\n{'case':<36}{'ms':>10}{'wall ms':>10}{'host ms':>10}{'of floor':>10}")
    for name, figure in figures.items():
        times = "".join(f"{figure[key]:>10.3f}" for key in ("ms", "wall_ms", "host_ms"))
        floor_ms = 1e3 * figure["amount"] / ceilings[figure["bound"]] if ceilings else None
        times_floor = "" if floor_ms is None else f"{figure['wall_ms'] / floor_ms:.2f} x"
        print(f"{name:<36}{times}{times_floor:>10}")
    print(f"{len(figures)} figures in {out}")


def _mux(out: Path, device: "torch.device", only: str, budget_s: float) -> None:
    import gpu_mux
    from gpu_timing import run_cases

    if only:
        raise ValueError(
            "found --only, expected none: what --part mux measures next depends on what it found"
        )
    bench = gpu_mux.Bench(gpu_mux.SIZES if device.type == "cuda" else gpu_mux.TINY, device)
    try:
        figures = run_cases(out, Part.MUX, gpu_mux.Experiment(bench, out).cases(), device, budget_s)
    finally:
        bench.close()
    print(f"\n{'traffic':<12}{'setting':<28}{'tokens/s':>10}{'requests/s at 99 %':>20}")
    for row in gpu_mux.summary(figures):
        in_time = f"{row['rate_in_time']:g}" if row["rate_in_time"] else "none"
        print(f"{row['alpha']:<12}{row['setting']:<28}{row['tokens_per_s']:>10.0f}{in_time:>20}")
    print(f"{len(figures)} figures in {out}")


def print_table(figures: dict[str, Any], has_ceilings: bool) -> None:
    """Fractions are of the measured copy bandwidth and matmul rate."""
    ceilings = {"bytes": figures.get("copy"), "flops": figures.get("matmul")}
    print(f"\n{'case':<44}{'ms':>10}{'rate':>15}{'of ceiling':>12}{'error':>10}")
    for name, figure in figures.items():
        if figure["ms"] is None:
            print(f"{name:<44}{figure['note']}")
            continue
        rate, ceiling = _rate(figure), ceilings[figure["bound"]]
        share = f"{rate / _rate(ceiling):.1%}" if has_ceilings and ceiling is not None else ""
        unit, scale = ("GB/s", 1e9) if figure["bound"] == "bytes" else ("TFLOP/s", 1e12)
        error = "" if figure["error"] is None else f"{figure['error']:.1e}"
        speed = f"{rate / scale:.0f} {unit}"
        print(f"{name:<44}{figure['ms']:>10.4f}{speed:>15}{share:>12}{error:>10}")


def _rate(figure: dict[str, Any]) -> float:
    """Bytes or operations per second."""
    return float(figure["amount"] / figure["ms"] * 1e3)


if __name__ == "__main__":
    typer.run(main)
