"""`muxrt simulate`: what a placement would give, without its GPUs."""

from pathlib import Path
from typing import Annotated

import typer

Profiles = Annotated[
    list[Path] | None,
    typer.Option(help="Measured step times, configs/profiles/*.yaml; without, a roofline."),
]
Plan = Annotated[
    Path | None,
    typer.Option(help="Take profiles, GPU kinds and engine facts from configs/plans/*.yaml."),
]
Control = Annotated[
    float | None, typer.Option(min=0, help="Seconds of control per sequence and decode step.")
]
Interference = Annotated[
    float | None, typer.Option(min=0, help="0.1: a step beside another one is 10 % slower.")
]
Duration = Annotated[
    float | None, typer.Option(min=0.001, help="Seconds of load, instead of the file's.")
]
Warmup = Annotated[
    float, typer.Option(min=0, help="Seconds of load at the start that are not counted.")
]
Speeds = Annotated[
    list[float] | None,
    typer.Option(min=0.001, help="Multiplies every rate; a line of the table for each."),
]
RefuseLate = Annotated[
    bool, typer.Option("--refuse-late", help="Whose first token would miss its target: 429.")
]
Seeds = Annotated[
    int, typer.Option(min=1, help="So many seeds from that one on: means, 95 % intervals.")
]
Failures = Annotated[
    list[str] | None,
    typer.Option(help="UNIT@T[+S]: dies T seconds after the start, is back after S."),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        help="Under the same requests: another placement's file, policy=A,B or strategy=A,B"
        " (with --plan)."
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        help="Attainment by rate and by SLO scale, use over time: .svg or .png. Without"
        " --speed, at 0.5 to 2 times the rates."
    ),
]
FindGoodput = Annotated[
    float | None,
    typer.Option(min=0.01, max=1, help="Find the largest rate with this attainment: 0.9."),
]
Processes = Annotated[
    int, typer.Option(min=1, help="Simulations and units are spread over so many.")
]


def simulate(
    config: Annotated[
        Path, typer.Argument(help="Models and units: what `muxrt plan --out` wrote.")
    ],
    workload: Annotated[Path, typer.Argument(help="Who asks what when: configs/workloads/*.yaml.")],
    profile: Profiles = None,
    plan: Plan = None,
    control: Control = None,
    interference: Interference = None,
    duration: Duration = None,
    warmup: Warmup = 0.0,
    speed: Speeds = None,
    refuse_late: RefuseLate = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the file's.")] = None,
    seeds: Seeds = 1,
    fail: Failures = None,
    compare: Compare = None,
    plot: Plot = None,
    find_goodput: FindGoodput = None,
    processes: Processes = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Serve requests with a placement on a virtual clock: no GPU, the same scheduler.

    Requests come for the given time and all are served to their end. Goodput counts those within
    their targets per second of load, throughput all of them until the last token.

    Policies: adbs, fcfs, round_robin. Strategies, as `muxrt plan` has them: auto, muxserve,
    spatial, temporal; they plan for the rates given.

    Example: muxrt simulate placement.yaml configs/workloads/muxserve.yaml
    --plan configs/plans/muxserve.yaml --duration 60 --seeds 5 --compare policy=adbs,fcfs
    """
    from muxrt.cli.simulate_compare import parse
    from muxrt.cli.simulate_input import Facts, Load, parse_failure
    from muxrt.cli.simulate_run import PLOT_SPEEDS, Asked, run

    speeds = tuple(speed or (PLOT_SPEEDS if plot is not None else (1.0,)))
    facts = Facts(tuple(profile or ()), plan, control, interference)
    failures = tuple(parse_failure(text) for text in fail or ())
    load = Load(workload, duration, speeds, seed, seeds, warmup, refuse_late, failures)
    comparison = parse(compare or ())
    run(Asked(config, comparison, facts, load, find_goodput, plot, processes, as_json))
