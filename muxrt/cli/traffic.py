"""`muxrt traffic`: who was asked how much when, from the log that a server keeps."""

from pathlib import Path
from typing import Annotated

import typer

Since = Annotated[
    float | None, typer.Option(min=0, help="Hours before the newest request; left out, all.")
]
Config = Annotated[
    Path | None, typer.Option(help="The served file: with its targets, attainment is shown.")
]
Export = Annotated[Path | None, typer.Option(help="Write the requests to this .csv or .parquet.")]
Import = Annotated[
    Path | None,
    typer.Option(
        "--import", help="Add a trace as `muxrt simulate` reads them: time, model, prompt, output."
    ),
]
ImportModel = Annotated[
    str | None, typer.Option("--model", help="With --import: for a trace without models.")
]
Ends = Annotated[
    str | None,
    typer.Option(
        help="With --import: when its last request came, such as 2026-01-31T12:00 (UTC);"
        " left out, now."
    ),
]


def traffic(
    log: Annotated[
        Path,
        typer.Argument(
            help="The folder of traffic.path, one file of it, or the served file that names it."
        ),
    ],
    hours: Since = None,
    config: Config = None,
    export: Export = None,
    trace: Import = None,
    model: ImportModel = None,
    ends: Ends = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show who was asked how much when: per model and hour, from a server's traffic log.

    Example: muxrt traffic /var/lib/muxrt/traffic --config configs/replan/serve.yaml --hours 24
    """
    if trace is None and (model is not None or ends is not None):
        raise typer.BadParameter("they go with --import", param_hint="--model and --ends")
    if sum(one is not None for one in (trace, export)) + as_json > 1:
        raise typer.BadParameter("one at a time", param_hint="--import, --export, --json")
    from muxrt.cli import traffic_files

    if log.suffix in (".yaml", ".yml"):
        config, log = config or log, traffic_files.log_of(log)
    if trace is not None:
        traffic_files.take_in(log, trace, model, ends)
        return
    entries = traffic_files.read(log, hours)
    if export is not None:
        traffic_files.export(export, entries)
        return
    from muxrt.cli.traffic_table import as_data, print_summary, summarise

    summary = summarise(entries, traffic_files.targets(config))
    if as_json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(as_data(summary))).decode())
    else:
        from muxrt.cli.show import console

        print_summary(console(), log, summary)
