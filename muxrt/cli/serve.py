"""`muxrt serve`: many models behind one endpoint; `--check` says what would be served."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class LogLevel(Enum):
    """Python's levels, as people type them."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve(
    file: Annotated[Path, typer.Argument(help="Endpoint, models and units: configs/*.yaml.")],
    host: Annotated[str | None, typer.Option(help="Instead of the file's.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Instead of the file's; 0 = any free one.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what would be served, start nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: for machines.")] = False,
    null_executor: Annotated[
        float | None,
        typer.Option(
            metavar="STEP_S",
            min=0,
            help="Load no model and make tokens up, a batch every STEP_S: to measure the rest.",
        ),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(case_sensitive=False)] = LogLevel.INFO,
) -> None:
    """Serve the models of a YAML file behind one OpenAI-compatible endpoint.

    SIGTERM or Ctrl-C lets running requests finish (endpoint.drain_s), a second one does not.

    Example: muxrt serve configs/demo.yaml --port 8000
    """
    if as_json and not check:
        raise typer.BadParameter("--json goes with --check", param_hint="--json")
    if check and null_executor is not None:
        raise typer.BadParameter("--check starts nothing", param_hint="--null-executor")
    from muxrt.cli.check import check_file, summary

    checked = check_file(file)
    if check and as_json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(summary(checked))).decode())
    elif check:
        from muxrt.cli.show import console
        from muxrt.cli.tables import print_checked

        print_checked(console(), file, checked)
    else:
        from muxrt.config.serve import listening_on
        from muxrt.server.app import run
        from muxrt.server.unit_process import spawn, spawn_null

        unit = spawn if null_executor is None else spawn_null(null_executor)
        config = listening_on(checked.config, host, port)
        run(config, log_level=log_level.value, spawn=unit)
