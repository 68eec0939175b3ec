"""`muxrt models`: what a configuration would serve, or what an endpoint serves now."""

from pathlib import Path
from typing import Annotated

import typer


def models(
    source: Annotated[str, typer.Argument(help="A YAML file, or the address of an endpoint.")],
    api_key: Annotated[
        str | None, typer.Option(envvar="MUXRT_API_KEY", help="Sent as bearer token.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the models of a configuration or of a live endpoint.

    Example: muxrt models http://127.0.0.1:8000
    """
    import msgspec

    if source.startswith(("http://", "https://")):
        names = _served(source, api_key)
        print(msgspec.json.encode(names).decode() if as_json else "\n".join(names))
        return
    from muxrt.cli.check import check_file, summary
    from muxrt.cli.show import console
    from muxrt.cli.tables import models_table

    checked = check_file(Path(source))
    if as_json:
        print(msgspec.json.encode(summary(checked)["models"]).decode())
    else:
        console().print(models_table(checked))


def _served(url: str, api_key: str | None) -> list[str]:
    import asyncio

    from muxrt.bench.client import list_models, session
    from muxrt.bench.job import Target

    async def ask() -> list[str]:
        target = Target(url, api_key)
        async with session(target) as http:
            return await list_models(http, target)

    return asyncio.run(ask())
