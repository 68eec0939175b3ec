"""`muxrt bench`: load any OpenAI-compatible endpoint and measure what its users would see."""

from pathlib import Path
from typing import Annotated

import typer

from muxrt.bench.job import Api, Target


def bench(
    workload: Annotated[Path, typer.Argument(help="Who asks what when: configs/workloads/*.yaml.")],
    url: Annotated[
        list[str],
        typer.Option(help="The endpoint; several share the models out as they list them."),
    ] = ["http://127.0.0.1:8000"],  # noqa: B006
    api_key: Annotated[
        str | None, typer.Option(envvar="MUXRT_API_KEY", help="Sent as bearer token.")
    ] = None,
    api: Annotated[Api, typer.Option(help="The route that generates.")] = Api.COMPLETIONS,
    duration: Annotated[
        float | None, typer.Option(min=1, help="Seconds of load, instead of the file's.")
    ] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="Multiplies every rate.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the file's.")] = None,
    eos: Annotated[
        bool, typer.Option("--eos", help="Let models stop early; for servers without ignore_eos.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until a request fails.")] = 600.0,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Load an OpenAI-compatible endpoint and measure TTFT, TPOT and SLO attainment.

    Requests leave when they are due, whether or not earlier ones were answered (open loop), and
    all times count from when a request was due. Exit code 1 if any request failed.

    Example: muxrt bench configs/workloads/azure_conv.yaml --url http://127.0.0.1:8000
    """
    import asyncio

    import msgspec

    from muxrt.bench.report import as_json, make_report
    from muxrt.bench.run import run_all
    from muxrt.bench.table import print_report
    from muxrt.cli.progress import replaying
    from muxrt.cli.show import console
    from muxrt.workload.spec import adjusted, load_workload

    plan = adjusted(load_workload(workload), duration_s=duration, speed=speed, seed=seed)
    targets = [Target(one, api_key, api, ignore_eos=not eos, timeout_s=timeout) for one in url]
    with replaying(console(stderr=True)) as changed:
        report = make_report(asyncio.run(run_all(targets, plan, changed)))
    print_report(console(), report)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(as_json(report))))
    raise typer.Exit(1 if report.total.failed or report.num_not_sent else 0)
