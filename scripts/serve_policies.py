"""Policies served for real: the demo models on this machine's cores, the same requests for each.

    python scripts/serve_policies.py --out docs/benchmarks/policies_served.json
    python scripts/serve_policies.py --rates 20 --seconds 5 --rounds 1      # does it run?
    python scripts/serve_policies.py --presets 27m,88m --rates 8,16 --ttft 1 --tpot 0.1

With larger models (`--presets`) computing is the limit, not the client: overload can be served.

One endpoint per policy is up all the time; they are measured one after the other, in turns, so
whatever else the machine does meets all of them. Wants a quiet machine.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import msgspec
import typer
from bench_models import preset_folders
from bench_rates import Load, Point, measure, warm_up
from bench_record import Record, stop_on_sigterm
from bench_serving import Serving, muxrt_serving, one_unit
from rich.console import Console
from rich.progress import track
from rich.table import Table

from muxrt.config.placement import MIB, Lanes, Memory, Scheduling, Slo
from muxrt.config.serve import ServeConfig
from muxrt.workload.spec import Lengths

MODELS = Path(__file__).parent.parent / "configs" / "demo_models"
RATES = {"pydoc-s": 3.0, "pydoc-m": 1.7, "pydoc-l": 1.2}  # as configs/demo.yaml has them
PROMPT = Lengths(mean_tokens=100, cv=0.8, max_tokens=400)
OUTPUT = Lengths(mean_tokens=60, cv=0.8, max_tokens=200)
MAX_MODEL_LEN = 640


@dataclass(frozen=True, slots=True)
class Served:
    """Models, and the weights of their traffic."""

    folders: tuple[Path, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, presets: str) -> "Served":
        """Random ones of these shapes, each half as popular as the last; of none the demo's."""
        if not presets:
            return cls(tuple(MODELS / name for name in RATES), tuple(RATES.values()))
        folders = preset_folders(presets.split(","))
        return cls(tuple(folders), tuple(2.0**-rank for rank in range(len(folders))))


def placed(policy: str, served: Served, slo: Slo, kv_bytes: int) -> ServeConfig:
    """The models in one unit under `policy`; requests wait, nobody is refused."""
    return one_unit(
        served.folders,
        served.weights,
        Memory(kv_bytes=kv_bytes, swap_bytes=kv_bytes),
        Lanes(),
        Scheduling(policy=policy),  # type: ignore[arg-type]
        slo=msgspec.to_builtins(slo),
        max_queue=100_000,
        max_model_len=MAX_MODEL_LEN,
    )


def show(rows: Sequence[Mapping[str, Any]], policies: Sequence[str]) -> None:
    """Goodput by offered rate, and how the others compare with the first policy."""
    table = Table("requests/s", "policy", "goodput", "in time", "served/s", "TTFT p99", "TPOT p99",
                  "failed")  # fmt: skip
    for rate in dict.fromkeys(row["rate_rps"] for row in rows):
        for policy in policies:
            mine = [r for r in rows if r["rate_rps"] == rate and r["setting"] == policy]
            keys = ("goodput_rps", "attainment", "served_rps", "ttft_p99_s", "tpot_p99_s", "failed")
            figures = [mean(row[key] or 0.0 for row in mine) for key in keys]
            texts = ("{:.1f}", "{:.1%}", "{:.1f}", "{:.3f}", "{:.4f}", "{:.0f}")
            cells = [text.format(f) for text, f in zip(texts, figures, strict=True)]
            table.add_row(f"{rate:g}", policy, *cells)
    Console(width=120).print(table)


def main(
    policies: Annotated[str, typer.Option(help="Separated by commas.")] = "adbs,slo",
    rates: Annotated[str, typer.Option(help="Requests/s, all models together.")] = "10,20,40,60,80",
    seconds: Annotated[float, typer.Option(help="Of load, per run.")] = 30.0,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each; other requests each.")] = 3,
    ttft: Annotated[float, typer.Option(help="Target, seconds.")] = 0.5,
    tpot: Annotated[float, typer.Option(help="Target, seconds.")] = 0.05,
    kv_mib: Annotated[int, typer.Option(help="KV memory of the unit.")] = 64,
    presets: Annotated[str, typer.Option(help="Shapes with random weights, not the demo's.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON.")] = None,
) -> None:
    """Measure each policy at each rate."""
    stop_on_sigterm()
    slo, names = Slo(ttft_s=ttft, tpot_s=tpot), policies.split(",")
    models = Served.of(presets)
    load = Load(tuple(f.name for f in models.folders), models.weights, PROMPT, OUTPUT, slo)
    asked = [float(rate) for rate in rates.split(",")]
    said = {
        "slo": {"ttft_s": ttft, "tpot_s": tpot},
        "seconds": seconds,
        "rounds": rounds,
        "models": load.models,
        "weights": load.weights,
        "kv_mib": kv_mib,
    }
    record = Record(out, said) if out is not None else None
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        served: dict[str, Serving] = {
            name: stack.enter_context(muxrt_serving(placed(name, models, slo, kv_mib * MIB)))
            for name in names
        }
        for serving in served.values():
            warm_up(serving.urls, load, asked[0])
        # First one and then the other goes first: neither has the warmer machine.
        turns = [(r, n, p) for r in asked for n in range(rounds) for p in names[:: (-1) ** n]]
        for rate, number, name in track(turns, "measuring"):
            point: Point = measure(name, served[name].urls, load, rate, seconds, number)
            rows.append(asdict(point))
            if record is not None:
                record.add("points", rows[-1])
    show(rows, names)


if __name__ == "__main__":
    typer.run(main)
