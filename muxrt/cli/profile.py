"""`muxrt profile`: how long steps take on this machine, for planner and simulator."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="The profile; its table is written beside it, as .csv.")]
Lanes = Annotated[
    str | None,
    typer.Option(
        help="Cores, or SMs, of the lanes to measure: 1,2. Left out: a quarter, half, all."
    ),
]
Gpu = Annotated[
    int | None, typer.Option(min=0, metavar="NUMBER", help="Measure this GPU, not the cores.")
]
Tp = Annotated[
    int, typer.Option(min=1, help="Ranks that models are cut over: equal parts of the cores.")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Fewer cells, fewer repeats: a rough picture.")
]
Budget = Annotated[float, typer.Option(min=1, help="Seconds of measuring at most.")]
Kv = Annotated[
    str, typer.Option(help="KV memory for all models together; larger cells are left out.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="What plans may give to weights and KV; left out, half of the machine, or 90 % of"
        " the GPU."
    ),
]


def profile(
    source: Annotated[
        Path, typer.Argument(help="A file of `muxrt serve`, or a Hugging Face model folder.")
    ],
    out: Out = Path("profile.yaml"),
    lanes: Lanes = None,
    gpu: Gpu = None,
    tp: Tp = 1,
    quick: Quick = False,
    budget: Budget = 180.0,
    kv: Kv = "1GiB",
    memory: Memory = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Measure prefills and decode steps of each model on the cores that this process may use.

    Or on a GPU, at several shares of its SMs.

    Every cell is measured several times, far apart, the most telling cells first. Ctrl-C ends the
    measuring and writes what there is.

    Example: muxrt profile configs/demo.yaml --out demo-profile.yaml
    """
    import os

    from muxrt.cli.profile_file import write
    from muxrt.cli.profile_run import Effort, in_service, measure
    from muxrt.cli.profile_source import load_source, parse_size
    from muxrt.cli.profile_tables import as_data, print_found
    from muxrt.cli.profile_target import cpu_target, gpu_target, parse_lanes
    from muxrt.cli.show import console
    from muxrt.errors import ConfigError

    if out.suffix not in (".yaml", ".yml") or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out: found {out}, expected *.yaml in a folder that exists")
    if gpu is not None and tp > 1:
        raise ConfigError(f"--tp: found {tp} and --gpu, expected one of them: ranks are of cores")
    target = cpu_target(sorted(os.sched_getaffinity(0)), tp) if gpu is None else gpu_target(gpu)
    effort = Effort(
        lanes=parse_lanes(lanes, target),
        budget_s=budget,
        kv_bytes=parse_size("--kv", kv),
        is_quick=quick,
    )
    memory_bytes = None if memory is None else parse_size("--memory", memory)
    subject = load_source(source, target.device)
    found = measure(subject, target, effort, console(stderr=True))
    written = write(out, subject, found, memory_bytes)
    if found.control is not None and found.is_whole and target.device == "cpu":
        found.service = in_service(subject, written, tp, effort, console(stderr=True))
        written = write(out, subject, found, memory_bytes)
    if as_json:
        import msgspec

        data = as_data(out, subject, found, written)
        print(msgspec.json.format(msgspec.json.encode(data)).decode())
    else:
        print_found(console(), out, subject, found, written)
