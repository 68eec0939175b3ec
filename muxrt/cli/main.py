"""`muxrt`: finds the file of a verb when the verb is used, so that help never waits for torch."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import typer

from muxrt import __version__
from muxrt.errors import ConfigError, MuxrtError

ABOUT = "Serve many LLMs of different sizes on shared accelerators, behind one endpoint."
FAILED, MISUSED = 1, 2


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb is written, as `module:function`, and the first line of its docstring."""

    target: str
    help: str


# In the order of `muxrt --help`.
VERBS = {
    "serve": Verb(
        "muxrt.cli.serve:serve",
        "Serve the models of a YAML file behind one OpenAI-compatible endpoint.",
    ),
    "plan": Verb(
        "muxrt.cli.plan:plan",
        "Choose which models live together, on how many GPUs, and say why.",
    ),
    "profile": Verb(
        "muxrt.cli.profile:profile",
        "Measure prefills and decode steps of each model on the cores that this process may use.",
    ),
    "simulate": Verb(
        "muxrt.cli.simulate:simulate",
        "Serve requests with a placement on a virtual clock: no GPU, the same scheduler.",
    ),
    "replan": Verb(
        "muxrt.cli.replan:replan",
        "Plan anew by the traffic that came: what would change, what it brings, what it costs.",
    ),
    "traffic": Verb(
        "muxrt.cli.traffic:traffic",
        "Show who was asked how much when: per model and hour, from a server's traffic log.",
    ),
    "models": Verb(
        "muxrt.cli.models:models",
        "List the models of a configuration or of a live endpoint.",
    ),
    "bench": Verb(
        "muxrt.cli.bench:bench",
        "Load an OpenAI-compatible endpoint and measure TTFT, TPOT and SLO attainment.",
    ),
    "demo": Verb(
        "muxrt.cli.demo:demo",
        "Start an endpoint, chat with every model, replay real traffic, print a table.",
    ),
}


def main() -> None:
    """Exit 0: done; 1: it failed; 2: it was asked for the wrong way."""
    try:
        build_app(sys.argv[1:])()
    except MuxrtError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise SystemExit(MISUSED if isinstance(error, ConfigError) else FAILED) from None


def build_app(argv: Sequence[str]) -> typer.Typer:
    """The program, with the verb that `argv` names; of the others only their help lines."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # it would print local variables, API keys among them
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=ABOUT)(_options)
    used = next((word for word in argv if not word.startswith("-")), None)
    for name, verb in VERBS.items():
        if name == used:
            app.command(name)(load(verb))
        else:
            app.command(name, help=verb.help)(_not_loaded)
    return app


def load(verb: Verb) -> Callable[..., None]:
    """Import the file of a verb."""
    module, _, function = verb.target.partition(":")
    loaded: Callable[..., None] = getattr(import_module(module), function)
    return loaded


def _not_loaded() -> None:
    raise AssertionError("a verb ran without its file: `build_app` saw another command line")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"muxrt {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """What may stand before the verb."""
