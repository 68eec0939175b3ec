"""API keys, and the hash keys of prompts."""

import struct
from pathlib import Path

import pytest

from muxrt.config.serve import ApiKeys
from muxrt.errors import ConfigError, Unauthorized
from muxrt.server.auth import KeyRing, load_keys
from muxrt.server.prefix_keys import KEY_BYTES, prefix_keys


def pack(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)


@pytest.mark.parametrize("header", ["Bearer one", "bearer two", "BEARER  two "])
def test_a_known_key_opens(header: str) -> None:
    assert KeyRing(["one", "two"]).check(header)


@pytest.mark.parametrize(
    "header", [None, "", "one", "Basic one", "Bearer", "Bearer on", "Bearer ones", "Bearer \udcff"]
)
def test_anything_else_does_not(header: str | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        KeyRing(["one", "two"]).check(header)
    assert caught.value.status == 401


def test_memory_holds_no_key() -> None:
    ring = KeyRing(["sesame"])
    assert b"sesame" not in b"".join(ring._hashes) and ring._hashes != KeyRing(["sesame"])._hashes


def test_each_key_is_known_by_something_else() -> None:
    ring = KeyRing(["one", "two"])
    assert ring.check("Bearer one") == ring.check("Bearer one") != ring.check("Bearer two")


def test_a_file_has_a_key_per_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n  two  \n")
    ring = load_keys(ApiKeys(file=str(path)), {})
    assert ring is not None and ring.check("Bearer two")


def test_a_variable_has_keys_between_commas() -> None:
    ring = load_keys(ApiKeys(env="KEYS"), {"KEYS": "one, two"})
    assert ring is not None and ring.check("Bearer two")


def test_without_a_source_everyone_may_ask() -> None:
    assert load_keys(None, {}) is None


def test_no_key_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no key"):
        load_keys(ApiKeys(env="KEYS"), {"KEYS": " ,"})
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(ApiKeys(file=str(tmp_path / "none")), {})


@pytest.mark.parametrize(("tokens", "groups"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_one_token_is_always_computed(tokens: int, groups: int) -> None:
    keys = prefix_keys("m", pack(*range(tokens)), 4)
    assert len(keys) == groups and all(len(key) == KEY_BYTES for key in keys)


def test_keys_are_equal_as_far_as_prompts_are() -> None:
    one = prefix_keys("m", pack(1, 2, 3, 4, 5), 2)
    two = prefix_keys("m", pack(1, 2, 9, 4, 5), 2)
    assert one[0] == two[0] and one[1] != two[1]


def test_a_change_early_changes_every_later_key() -> None:
    one = prefix_keys("m", pack(1, 2, 3, 4, 5), 2)
    two = prefix_keys("m", pack(9, 2, 3, 4, 5), 2)
    assert not set(one) & set(two)


def test_models_and_salts_never_meet() -> None:
    tokens = pack(1, 2, 3)
    keys = [
        prefix_keys("m", tokens, 2),
        prefix_keys("n", tokens, 2),
        prefix_keys("m", tokens, 2, b"ann"),
        prefix_keys("m", tokens, 2, b"bob"),
        prefix_keys("m:", tokens, 2),
    ]
    assert len(set(keys)) == len(keys)
