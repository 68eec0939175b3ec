"""Telling a server which units to serve instead of those that it has."""

import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import msgspec

from muxrt.config.placement import UnitSpec
from muxrt.errors import MuxrtError

# New units load before the server answers.
TIMEOUT_S = 1800.0


def apply(url: str, key: str | None, units: tuple[UnitSpec, ...]) -> tuple[UnitSpec, ...]:
    """Serve `units` at `url`; what is served then, by the names that the server gave.

    Returns when new requests go there. Raises MuxrtError with what the server says of it.
    """
    _ask(url, key, msgspec.json.encode({"units": units}))
    found = _ask(url, key, None)
    return msgspec.convert(found["units"], tuple[UnitSpec, ...])


def _ask(url: str, key: str | None, body: bytes | None) -> Any:
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = Request(f"{url.rstrip('/')}/admin/placement", body, headers)
    try:
        with urlopen(request, timeout=TIMEOUT_S) as response:
            return json.load(response)
    except HTTPError as error:
        raise MuxrtError(f"{url} does not change: {_said(error)}") from None
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MuxrtError(f"{url} cannot be asked to change: {reason}") from None


def _said(error: HTTPError) -> str:
    """The server's message; a server without `admin` knows no such route."""
    if error.code == 404:
        return "it has no /admin/placement: expected `admin` in its file"
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}"
