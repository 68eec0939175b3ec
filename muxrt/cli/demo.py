"""`muxrt demo`: an endpoint of one's own, a chat with every model, real traffic, a table."""

import asyncio
import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from muxrt.bench.client import chat, session
from muxrt.bench.job import Target
from muxrt.bench.report import Report, make_report
from muxrt.bench.run import run
from muxrt.bench.table import print_report
from muxrt.cli import show
from muxrt.cli.check import check_file
from muxrt.cli.endpoint import OwnEndpoint, start_endpoint
from muxrt.cli.progress import replaying
from muxrt.cli.tables import models_table
from muxrt.config.serve import ServeConfig
from muxrt.workload.spec import Workload, adjusted, load_workload

QUESTION = "What does the for statement do?"
ANSWER_TOKENS = 60
FAILED = 1


def demo(
    file: Annotated[Path, typer.Argument(help="What to serve.")] = Path("configs/demo.yaml"),
    workload: Annotated[
        Path | None,
        typer.Option(help="The traffic; by default workloads/azure_conv.yaml beside FILE."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=1, help="Seconds of traffic, instead of the workload's.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint up.")] = False,
) -> None:
    """Start an endpoint, chat with every model, replay real traffic, print a table.

    Exit code 0 only if every request was answered.

    Example: muxrt demo configs/demo.yaml --keep
    """
    checked = check_file(file)
    traffic = load_workload(workload or file.parent / "workloads" / "azure_conv.yaml")
    traffic = adjusted(traffic, duration_s=duration, speed=1.0, seed=None)
    console = show.console()
    console.print(models_table(checked))
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _leave)
    endpoint = _start(file, checked.config)
    stays = False
    try:
        _wait_ready(console, endpoint)
        asyncio.run(_chat_with_all(console, endpoint.url, checked.config))
        report = _replay(console, endpoint.url, checked.config, traffic)
        stays = keep
    finally:
        if not stays:
            with console.status("letting the endpoint finish"):
                endpoint.stop()
    if stays:
        _say_how_to_go_on(console, endpoint, checked.config)
    else:
        shutil.rmtree(endpoint.log.parent)  # after an error it stays, to be read
    raise typer.Exit(FAILED if _is_incomplete(report) else 0)


def _leave(*_: object) -> NoReturn:
    """A signal as an exception, so that the endpoint is stopped on the way out."""
    sys.exit(FAILED)


def _start(file: Path, config: ServeConfig) -> OwnEndpoint:
    log = Path(tempfile.mkdtemp(prefix="muxrt-demo-")) / "serve.log"
    return start_endpoint(file, config, log)


def _wait_ready(console: Console, endpoint: OwnEndpoint) -> None:
    began_s = time.monotonic()
    with console.status("starting the endpoint") as status:
        endpoint.wait_ready(lambda said: status.update(f"starting the endpoint: {said}"))
    console.print(
        f"[bold]{endpoint.url}/v1[/bold] is ready after {time.monotonic() - began_s:.1f} s",
        highlight=False,
    )


async def _chat_with_all(console: Console, url: str, config: ServeConfig) -> None:
    target = Target(url)
    console.print(f"\nEach model is asked: [bold]{QUESTION}[/bold]", highlight=False)
    async with session(target) as http:
        for model in config.models:
            with console.status(f"{model.name} answers"):
                said = await chat(http, target, model.name, QUESTION, ANSWER_TOKENS)
            title = Text(model.name, style="bold")
            console.print(Panel(Text(said.strip()), title=title, title_align="left"))


def _replay(console: Console, url: str, config: ServeConfig, traffic: Workload) -> Report:
    title = traffic.title or "traffic"
    console.print(f"\nNow {traffic.duration_s:g} s of {title}:", highlight=False)
    with replaying(console) as changed:
        done = asyncio.run(run(Target(url), traffic, changed))
    report = make_report(done, {model.name: model.slo or traffic.slo for model in config.models})
    print_report(console, report)
    return report


def _is_incomplete(report: Report) -> bool:
    return bool(report.total.failed or report.total.refused or report.num_not_sent)


def _say_how_to_go_on(console: Console, endpoint: OwnEndpoint, config: ServeConfig) -> None:
    asked = [{"role": "user", "content": QUESTION}]
    body = json.dumps({"model": config.models[0].name, "messages": asked, "max_tokens": 60})
    console.print(
        f"\nThe endpoint stays up (log: {endpoint.log}). Try:\n\n"
        f"  curl {endpoint.url}/v1/chat/completions -H 'Content-Type: application/json'"
        f" -d {shlex.quote(body)}\n\nand stop it with: kill {endpoint.process.pid}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
