"""muxrt against vLLM on the same cores: one model offline, three models over HTTP.

bash scripts/setup_vllm_cpu.sh        # once
python scripts/bench_vs_vllm.py offline
python scripts/bench_vs_vllm.py trio
python scripts/bench_vs_vllm.py plot   # again, from the JSON
"""

from pathlib import Path
from typing import Annotated

import bench_offline
import bench_trio
import typer
from bench_record import FOLDER, draw, stop_on_sigterm

app = typer.Typer(add_completion=False, help=__doc__)
Out = Annotated[Path, typer.Option(help="Folder of the JSON and the plots.")]


@app.command()
def offline(
    models: Annotated[str, typer.Option(help="Presets of train_demo_models.py.")] = "27m,88m",
    batches: Annotated[str, typer.Option(help="Prompts at a time.")] = "1,8,32,64",
    prompt: Annotated[int, typer.Option(help="Prompt tokens of the decode cases.")] = 100,
    output: Annotated[int, typer.Option(help="Output tokens of the decode cases.")] = 128,
    rounds: Annotated[
        int, typer.Option(help="Runs of each case; the median counts. Columns run once.")
    ] = 2,
    columns: Annotated[str, typer.Option(help="What only muxrt is measured with.")] = ",".join(
        bench_offline.COLUMNS
    ),
    kv_gib: Annotated[int, typer.Option(help="KV memory of each engine.")] = 2,
    vllm: Annotated[bool, typer.Option(help="Without it, muxrt alone.")] = True,
    out: Out = FOLDER,
) -> None:
    """Decode and prefill of one model, both engines alternating.

    Example: bench_vs_vllm.py offline --models 27m --batches 1,8 --rounds 1
    """
    wanted = [name for name in columns.split(",") if name]
    plan = bench_offline.Plan(
        models=tuple(models.split(",")),
        kinds=tuple(bench_offline.kinds([int(b) for b in batches.split(",")], prompt, output)),
        columns=tuple(bench_offline.usable_columns(wanted)),
        rounds=rounds,
        kv_bytes=kv_gib << 30,
        with_vllm=vllm,
    )
    bench_offline.offline(plan, out / "offline_vs_vllm.json")
    if vllm:
        draw("offline_vs_vllm", out)


@app.command()
def trio(
    vllm_rates: Annotated[str, typer.Option(help="Requests/s offered to vLLM.")] = "0.5,1,2,3",
    muxrt_rates: Annotated[str, typer.Option(help="Requests/s offered to muxrt.")] = "2,4,6,8",
    vllm_settings: Annotated[
        str, typer.Option(help="bound: all cores to each server; unbound: a free thread each.")
    ] = "bound,unbound",
    lanes: Annotated[
        str, typer.Option(help="Cores per lane of muxrt, and a queue_timeout_s, by setting.")
    ] = "1+1,2,1+1/1",
    kv_mib: Annotated[int, typer.Option(help="KV memory of all models, either side.")] = 768,
    seconds: Annotated[float, typer.Option(help="Of load at each rate, at least.")] = 20.0,
    requests: Annotated[int, typer.Option(help="At each rate, at least.")] = 40,
    most_seconds: Annotated[float, typer.Option(help="Of load at each rate, at most.")] = 40.0,
    trace: Annotated[
        Path | None, typer.Option(help="Arrivals and lengths from this CSV; without it, Poisson.")
    ] = None,
    out: Out = FOLDER,
) -> None:
    """Three models, one muxrt endpoint against three vLLM servers, at rising rates.

    Beyond the listed rates it goes on by quarters until goodput falls.

    Example: bench_vs_vllm.py trio --vllm-settings bound --lanes 1+1
    """
    plan = bench_trio.Plan(
        models=bench_trio.MODELS,
        weights=(0.6, 0.3, 0.1),
        rates={bench_trio.VLLM: _numbers(vllm_rates), bench_trio.MUXRT: _numbers(muxrt_rates)},
        settings={
            bench_trio.VLLM: tuple(name for name in vllm_settings.split(",") if name),
            bench_trio.MUXRT: tuple(name for name in lanes.split(",") if name),
        },
        kv_bytes=kv_mib << 20,
        seconds=seconds,
        requests=requests,
        most_seconds=most_seconds,
        trace=str(trace) if trace else None,
    )
    bench_trio.trio(plan, out / "trio_vs_vllm.json")
    draw("trio_vs_vllm", out)


@app.command()
def plot(
    names: Annotated[
        str, typer.Option(help="JSON files, without their ending.")
    ] = "offline_vs_vllm,trio_vs_vllm,sharing",
    out: Out = FOLDER,
) -> None:
    """Draw the plots from the JSON, again."""
    for name in names.split(","):
        draw(name, out)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    stop_on_sigterm()
    app()
