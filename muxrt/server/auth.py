"""API keys: who may ask."""

import hmac
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from muxrt.config.serve import ApiKeys
from muxrt.errors import ConfigError, Unauthorized

BEARER = "bearer "


class KeyRing:
    """The accepted keys, as hashes under a secret of this process: memory holds no key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._secret = os.urandom(32)
        self._hashes = [self._hash(key) for key in keys]
        self._numbers = {known: number for number, known in enumerate(self._hashes, 1)}

    def check(self, header: str | None) -> bytes:
        """What the `Authorization` header's key is known by here (32 bytes).

        Raises Unauthorized without saying how close a wrong key came.
        """
        if header is None or not header[: len(BEARER)].lower() == BEARER:
            raise Unauthorized("an API key is required: send 'Authorization: Bearer KEY'")
        given = self._hash(header[len(BEARER) :].strip())
        # Every key is compared, in constant time each: neither time nor order tells anything.
        if not sum(hmac.compare_digest(given, known) for known in self._hashes):
            raise Unauthorized("the API key is not one of this server's")
        return given

    def number(self, known: bytes) -> int:
        """Which of the keys it is, counted from 1 in the order of their source: says nothing of it.

        `known` is what `check` returned.
        """
        return self._numbers[known]

    def _hash(self, key: str) -> bytes:
        # Header bytes that are no UTF-8 arrive as surrogates; they hash like any wrong key.
        data = key.encode(errors="surrogateescape")
        return blake2b(data, key=self._secret, digest_size=32).digest()


def load_keys(
    source: ApiKeys | None, environ: Mapping[str, str], at: str = "endpoint.api_keys"
) -> KeyRing | None:
    """The key ring of `source`; None where anyone may ask. Raises ConfigError for no keys.

    `at` is where the configuration has it.
    """
    if source is None:
        return None
    if source.file is not None:
        keys, where = _read(Path(source.file), at), f"the file {source.file}"
    else:
        text = environ.get(source.env or "", "")
        keys, where = _split(text.split(",")), f"the variable {source.env}"
    if not keys:
        raise ConfigError(f"{at}: {where} holds no key, expected at least one")
    return KeyRing(keys)


def _read(path: Path, at: str) -> list[str]:
    try:
        return _split(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{at}.file: {path} cannot be read: {error}") from None


def _split(lines: Iterable[str]) -> list[str]:
    """Keys without the blanks around them; empty lines and `#` comments hold none."""
    stripped = (line.strip() for line in lines)
    return [key for key in stripped if key and not key.startswith("#")]
