"""Figures of a CUDA device, a part at a time: resumable, at most 8 minutes each.

    python scripts/bench_gpu.py --part kernels                # needs a GPU; run again to go on
    python scripts/bench_gpu.py --part kernels --dry-run --out /tmp/dry.json    # needs none

A part measures what its file does not have yet. `--dry-run` runs the same code at tiny sizes in
Triton's interpreter: its errors are real, its times mean nothing.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_record import FOLDER

BUDGET_S = 450.0  # a case takes seconds: the part then ends within 8 minutes


class Part(StrEnum):
    """What is measured."""

    KERNELS = "kernels"


def main(
    part: Annotated[Part, typer.Option(help="what is measured")],
    out: Annotated[Path, typer.Option(help="JSON that figures are merged into")] = (
        FOLDER / "gpu.json"
    ),
    dry_run: Annotated[
        bool, typer.Option(help="tiny sizes in Triton's interpreter, no GPU needed")
    ] = False,
    only: Annotated[str, typer.Option(help="cases whose name has this in it")] = "",
    budget_s: Annotated[float, typer.Option(help="no case begins later")] = BUDGET_S,
) -> None:
    """Measure a part.   Example: python scripts/bench_gpu.py --part kernels"""
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch
    from gpu_timing import run_cases

    if not dry_run and not torch.cuda.is_available():
        typer.echo(
            "error: found no CUDA device, expected one (--dry-run runs the same code at tiny sizes "
            "in Triton's interpreter)",
            err=True,
        )
        raise typer.Exit(1)
    import gpu_kernels

    device = torch.device("cpu" if dry_run else "cuda")
    size = gpu_kernels.TINY if dry_run else gpu_kernels.Sizes()
    torch.manual_seed(0)
    cases = [case for case in gpu_kernels.cases(size, device) if only in case.name]
    try:
        figures = run_cases(out, part, cases, device, budget_s)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    print_table(figures, has_ceilings=not dry_run)
    print(f"{len(figures)} figures in {out}")
    if wrong := [name for name, figure in figures.items() if figure["note"].startswith("wrong")]:
        typer.echo(f"error: wrong results: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


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
