"""`muxrt simulate`: what a placement would give, without its GPUs."""

from pathlib import Path
from typing import Annotated

import typer


def simulate(
    config: Annotated[
        Path, typer.Argument(help="Models and units: what `muxrt plan --out` wrote.")
    ],
    workload: Annotated[Path, typer.Argument(help="Who asks what when: configs/workloads/*.yaml.")],
    profile: Annotated[
        list[Path] | None,
        typer.Option(help="Measured step times, configs/profiles/*.yaml; without, a roofline."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Take profiles, GPU kinds and engine facts from configs/plans/*.yaml."),
    ] = None,
    control: Annotated[
        float | None, typer.Option(min=0, help="Seconds of control per sequence and decode step.")
    ] = None,
    interference: Annotated[
        float | None, typer.Option(min=0, help="0.1: a step beside another one is 10 % slower.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds of load, instead of the file's.")
    ] = None,
    warmup: Annotated[
        float, typer.Option(min=0, help="Seconds of load at the start that are not counted.")
    ] = 0.0,
    speed: Annotated[
        list[float] | None,
        typer.Option(min=0.001, help="Multiplies every rate; several for --plot."),
    ] = None,
    refuse_late: Annotated[
        bool, typer.Option("--refuse-late", help="Whose first token would miss its target: 429.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the file's.")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Other placements, under the same requests.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Attainment by rate and by SLO scale: .svg or .png.")
    ] = None,
    find_goodput: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Find the largest rate with this attainment: 0.9."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Units are spread over so many.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Serve requests with a placement on a virtual clock: no GPU, the same scheduler.

    Requests come for the given time and all are served to their end. Goodput counts those within
    their targets per second of load, throughput all of them until the last token.

    Example: muxrt simulate placement.yaml configs/workloads/muxserve.yaml
    --plan configs/plans/muxserve.yaml --duration 60
    """
    from muxrt.cli.simulate_input import Facts, Load
    from muxrt.cli.simulate_run import Asked, run

    facts = Facts(tuple(profile or ()), plan, control, interference)
    load = Load(workload, duration, tuple(speed or (1.0,)), seed, warmup, refuse_late)
    run(Asked((config, *(compare or ())), facts, load, find_goodput, plot, processes, as_json))
