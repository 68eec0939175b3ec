"""Profiles as new users write them: one clear error for each mistake."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxrt.config.cluster import GpuKind
from muxrt.config.presets import PRESETS
from muxrt.config.profile import (
    Measured,
    ProfiledEngine,
    ProfiledModel,
    ProfileFile,
    SideBySide,
    dump_profile,
    sizes_of,
)
from muxrt.core import Phase
from muxrt.cost.model import arithmetic
from muxrt.cost.profile import Cell, load_profile, table_of
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


WRITTEN = ProfileFile(
    title="two lanes",
    source="a test",
    licence="none",
    gpu="cpu-2c",
    table="t.csv",
    models=(
        ProfiledModel(name="a", sizes=sizes_of(PRESETS["llama3-8b"]), weights="int8"),
        ProfiledModel(name="b", preset="llama-7b"),
    ),
    kind=GpuKind(
        name="cpu-2c",
        device="cpu",
        memory_bytes=10**9,
        bandwidth_bytes_per_s=2e10,
        flops=3e11,
        sms=2,
        link_bytes_per_s=2e10,
    ),
    engine=ProfiledEngine(interference=0.07, control_s=7.1e-7),
    side_by_side=(
        SideBySide(
            prefill="a",
            prefill_tokens=512,
            decode="b",
            batch=8,
            context=256,
            lanes=(1, 1),
            prefill_slowdown=1.1,
            decode_slowdown=0.98,
        ),
    ),
    measured=Measured(
        device="a processor",
        cores=2,
        lanes=(1, 2),
        date="2026-11-21",
        muxrt="0.1.0",
        versions="python 3.11",
        seconds=12.5,
        bursts=9,
        statistic="percentile 25",
        spread=0.01,
        spread_p90=0.1,
        is_whole=False,
    ),
)

times = st.none() | st.floats(1e-6, 1e3)
cells = st.builds(
    Cell,
    st.sampled_from("ab"),
    st.just(1),
    st.integers(1, 100),
    st.integers(1, 256),
    st.integers(1, 10**5),
    times,
    times,
)


@given(st.lists(cells, min_size=1, unique_by=lambda c: (c.model, c.sm_pct, c.batch, c.seq_len)))
def test_a_written_profile_is_read_back(found: list[Cell]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "p.yaml").write_text(dump_profile(WRITTEN))
        (folder / "t.csv").write_text(table_of(found))
        profile = load_profile(folder / "p.yaml")
    assert profile.file == WRITTEN
    assert arithmetic(profile.shapes["a"]) == arithmetic(PRESETS["llama3-8b"])
    expected = {(c.model, c.sm_pct, c.batch, c.seq_len): c for c in found}
    assert len(profile.cells) == len(expected)
    for cell in profile.cells:
        same = expected[cell.model, cell.sm_pct, cell.batch, cell.seq_len]
        for phase in (Phase.PREFILL, Phase.DECODE):
            time_s = same.time_s(phase)
            assert cell.time_s(phase) == (time_s and pytest.approx(time_s, rel=1e-5))


BAD_FILES = {
    "a kind of another name": (
        "gpu: cpu-2c\n",
        "gpu: a100-80g\n",
        "kind.name: found 'cpu-2c', expected the profile's gpu, 'a100-80g'",
    ),
    "two shapes": ("preset: llama-7b", "preset: llama-7b\n  sizes: {hidden_size: 8, num_layers: 1,"
        " num_heads: 1, intermediate_size: 8}", "models[1]: found both of preset and sizes"),
    "no shape": ("  preset: llama-7b\n", "", "models[1]: found neither of preset and sizes"),
    "an unknown preset": ("llama-7b", "llama-8b", "models[1].preset: found 'llama-8b', expected"),
    "an unknown key": ("bursts: 9", "brusts: 9", "measured.brusts: unknown key; did you mean"),
    "an impossible figure": (
        "interference: 0.07",
        "interference: -1",
        "engine.interference: found -1, expected a number of at least 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_wrong_file_gets_one_error(case: str, tmp_path: Path) -> None:
    old, new, expected = BAD_FILES[case]
    text = dump_profile(WRITTEN)
    assert text.count(old) == 1
    path = tmp_path / "p.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert caught.value.message.startswith(f"{path}:") and expected in caught.value.message
    assert "\n" not in caught.value.message
