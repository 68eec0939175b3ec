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
    speed: Annotated[float, typer.Option(min=0.001, help="Multiplies every rate.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the file's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Serve requests with a placement on a virtual clock: no GPU, the same scheduler.

    Requests come for the given time and all are served to their end. Goodput counts those within
    their targets per second of load, throughput all of them until the last token.

    Example: muxrt simulate placement.yaml configs/workloads/muxserve.yaml
    --plan configs/plans/muxserve.yaml --duration 60
    """
    import msgspec

    from muxrt.cli.show import console
    from muxrt.cli.simulate_input import Facts, load_case
    from muxrt.cli.simulate_table import print_report
    from muxrt.sim.report import as_json as as_data
    from muxrt.sim.report import make_report
    from muxrt.sim.simulate import simulate as run

    facts = Facts(tuple(profile or ()), plan, control, interference)
    case = load_case(config, workload, facts, duration_s=duration, speed=speed, seed=seed)
    done = run(case.config, case.setting, case.arrivals)
    if warmup >= case.duration_s:
        raise typer.BadParameter(
            f"found {warmup:g}, expected less than the {case.duration_s:g} s of load",
            param_hint="--warmup",
        )
    report = make_report(done.served, done.units, case.slos, case.duration_s, warmup)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(as_data(report))).decode())
    else:
        print_report(console(), report)
