"""Profiles as new users write them: one clear error for each mistake."""

from pathlib import Path

import pytest

from muxrt.cost.profile import load_profile
from muxrt.errors import ConfigError

HEAD = "model,tp,sm_percent,batch,seq_len,prefill_ms,decode_ms\n"
PROFILE = """\
title: t
source: s
licence: l
gpu: a100-80g
table: t.csv
models: [{name: llama-7b, preset: llama-7b}]
"""

BAD_TABLES = {
    "a row with too few values": (
        "llama-7b,1,30,1,32\n",
        ":2: found llama-7b,1,30,1,32,None,None,",
    ),
    "a row with too many": ("llama-7b,1,30,1,32,1,1,9\n", ":2: found llama-7b,1,30,1,32,1,1,"),
    "words for numbers": ("llama-7b,one,30,1,32,1,1\n", ":2: found llama-7b,one,"),
    "a negative time": ("llama-7b,1,30,1,32,-1,1\n", ":2: found llama-7b,1,30,1,32,-1,1,"),
    "no rows": ("", ": the profile has no cells"),
}


def write(folder: Path, table: str | bytes) -> Path:
    (folder / "t.csv").write_bytes(table if isinstance(table, bytes) else (HEAD + table).encode())
    path = folder / "p.yaml"
    path.write_text(PROFILE)
    return path


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_wrong_table_gets_one_error(case: str, tmp_path: Path) -> None:
    rows, expected = BAD_TABLES[case]
    with pytest.raises(ConfigError) as caught:
        load_profile(write(tmp_path, rows))
    assert caught.value.message.startswith(f"{tmp_path}/t.csv{expected}")
    assert "\n" not in caught.value.message


def test_a_table_of_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"t.csv: cannot be read as text: "):
        load_profile(write(tmp_path, b"\xdc\xff\x00" * 50))


def test_a_table_without_its_yaml_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "llama-7b,1,30,1,32,1,1\n")
    with pytest.raises(ConfigError) as caught:
        load_profile(tmp_path / "t.csv")
    assert caught.value.message == (
        f"{tmp_path}/t.csv: found a table, expected the YAML file that names it with its GPU, its"
        " source and the shapes of its models"
    )


@pytest.mark.parametrize("name", ["nowhere.yaml", "nowhere.json", "", "folder.json"])
def test_a_profile_that_is_not_there_is_one_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"no such file$|cannot be read"):
        load_profile(tmp_path / name)
