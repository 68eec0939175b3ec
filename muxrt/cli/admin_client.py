"""Asks a running server's /admin what it serves, and to serve something else."""

import json
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import msgspec

from muxrt.bench.client import EndpointError
from muxrt.config.placement import UnitSpec
from muxrt.errors import ConfigError, MuxrtError

ANSWER_S = 10.0
CHANGE_S = 3600.0  # until all new units are loaded


class AdminError(MuxrtError):
    """The server refused, or undid the change."""


@dataclass(frozen=True, slots=True)
class AdminClient:
    """The administrator of the server at `url`."""

    url: str
    key: str

    def units(self) -> tuple[UnitSpec, ...]:
        """The placement that is served now. Raises EndpointError and AdminError."""
        found = self._ask("/admin/placement", None, ANSWER_S)
        return msgspec.convert(found["units"], tuple[UnitSpec, ...])

    def apply(self, units: tuple[UnitSpec, ...]) -> tuple[UnitSpec, ...]:
        """Serve these units instead; by the names that they got, once new requests go to them.

        Raises EndpointError where the server cannot be asked, AdminError with why it serves what it
        served before.
        """
        body = msgspec.json.encode({"units": units})
        self._ask("/admin/placement", body, CHANGE_S)
        return self.units()

    def _ask(self, path: str, body: bytes | None, timeout_s: float) -> Any:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = Request(self.url.rstrip("/") + path, body, headers)
        try:
            with urlopen(request, timeout=timeout_s) as response:
                return json.load(response)
        except HTTPError as error:
            raise AdminError(f"{self.url}: {error.code}: {_why(error)}") from None
        except URLError as error:
            why = getattr(error.reason, "strerror", None) or error.reason
            raise EndpointError(f"{self.url} does not answer: {why}") from None
        except (OSError, HTTPException, ValueError) as error:
            raise EndpointError(f"{self.url} does not answer: {error}") from None


def administrator(url: str | None, key: str | None) -> AdminClient | None:
    """The one of the server at `url`, if there is to be one.

    Raises ConfigError without a key, and for what is no address.
    """
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--apply: found {url}, expected an address: http://127.0.0.1:8000")
    if not key:
        raise ConfigError("--apply: found no key, expected --admin-key or MUXRT_ADMIN_KEY")
    return AdminClient(url, key)


def _why(error: HTTPError) -> str:
    """What the server said; of another server, or one without `admin`, that it is not there."""
    if error.code == 404:
        return "found no /admin/placement, expected a muxrt server whose file has `admin`"
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return error.reason
