"""The traffic log: what ended is on disk, within bounds, and survives the process."""

import asyncio
import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.request import Request, urlopen

import aiohttp
import msgspec
import pytest
from command_line import CommandLine
from scripted_unit import make_config, on_loop, serving, write_words
from tiny_folder import byte_level, write_model

from muxrt.config.load import load
from muxrt.config.serve import ApiKeys, Endpoint, TrafficFolder
from muxrt.core import FinishReason
from muxrt.errors import ConfigError, MuxrtError
from muxrt.server.traffic import FLUSH_S, TrafficLog
from muxrt.server.traffic_files import Entry, Writer, add_history, log_files, read_entries
from muxrt.workload.trace import read_trace

DAY_S = 86400.0
NOON_S = datetime(2026, 3, 10, 12, tzinfo=UTC).timestamp()
WAIT_S = 60.0


def entry(at_s: float = NOON_S, model: str = "a", status: int = 200) -> Entry:
    return Entry(at_s, model, 10, 5, 0.2, 0.01, status, "main", None, 1)


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


# -- files -----------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep_days=3, max_bytes=1 << 20)
    strange = Entry(NOON_S + 1, 'a "quoted" naïve/модель', None, 0, None, None, 429, None, 7, 1)
    writer.write([entry(), strange], NOON_S)
    writer.write([entry(NOON_S + 2)], NOON_S)
    assert list(read_entries(tmp_path)) == [entry(), strange, entry(NOON_S + 2)]
    assert list(read_entries(tmp_path, NOON_S + 1, NOON_S + 2)) == [strange]
    assert list(read_entries(tmp_path, every=2)) == [strange]
    writer.close()


def test_each_day_has_a_file_and_old_ones_go(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep_days=2, max_bytes=1 << 20)
    for day in range(4):
        writer.write([entry(NOON_S + day * DAY_S)], NOON_S + day * DAY_S)
    writer.close()
    assert [str(file.day) for file in log_files(tmp_path)] == ["2026-03-12", "2026-03-13"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "2026-03-12.0.db",
        "2026-03-13.0.db",
    ]


def test_the_oldest_go_where_bytes_run_out(tmp_path: Path) -> None:
    bound = 400_000
    writer = Writer(tmp_path, keep_days=30, max_bytes=bound)
    for number in range(80):
        writer.write([entry(NOON_S + number)] * 200, NOON_S)
        assert sum(file.num_bytes for file in log_files(tmp_path)) <= 1.1 * bound
    writer.close()
    kept = list(read_entries(tmp_path))
    assert kept[-1].at_s == NOON_S + 79 and kept[0].at_s > NOON_S
    assert len(kept) > 2000, "most of the room is used"


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "2026-99-99.0.db").write_text("no day")
    writer = Writer(tmp_path, keep_days=1, max_bytes=1 << 20)
    writer.write([entry()], NOON_S)
    writer.close()
    assert {path.name for path in tmp_path.iterdir()} >= {"notes.txt", "2026-99-99.0.db"}


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep_days=1, max_bytes=1 << 20)
    writer.write([entry()], NOON_S)
    with pytest.raises(sqlite3.Error):
        writer.write([entry(), Entry(NOON_S, None, 1, 1, None, None, 200, None, None, 1)], NOON_S)  # type: ignore[arg-type]
    writer.close()
    assert len(list(read_entries(tmp_path))) == 1


def test_a_log_is_told_from_other_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such traffic log"):
        list(read_entries(tmp_path / "none"))
    with pytest.raises(ConfigError, match="found no traffic log in it"):
        list(read_entries(tmp_path))
    (tmp_path / "text.db").write_text("hello, hello, hello, hello, hello, hello, hello, hello")
    with pytest.raises(ConfigError, match=r"text.db: cannot be read as a traffic log"):
        list(read_entries(tmp_path / "text.db"))
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(ConfigError, match="another program's"):
        list(read_entries(tmp_path / "other.db"))


# -- the thread ------------------------------------------------------------------------------


def settle(folder: Path, count: int) -> list[Entry]:
    """All that is there once so many are."""
    end_s = time.monotonic() + WAIT_S
    while True:
        found: list[Entry] = []
        with suppress(ConfigError):  # there is no file yet
            found = list(read_entries(folder))
        if len(found) >= count:
            return found
        assert time.monotonic() < end_s, f"found {len(found)} of {count}"
        time.sleep(0.02)


def test_a_log_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MuxrtError, match="traffic.path: cannot write to"):
        TrafficLog(TrafficFolder(path=str(tmp_path / "file"))).start()


def test_what_could_not_be_written_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = TrafficLog(TrafficFolder(path=str(tmp_path)))
    log.start()
    (file,) = log_files(tmp_path)
    holder = sqlite3.connect(file.path)
    holder.execute("DROP TABLE requests")
    log.add(entry(NOON_S))
    end_s = time.monotonic() + WAIT_S
    while "event=traffic_stuck" not in caplog.text:
        assert time.monotonic() < end_s
        time.sleep(0.02)
    log.add(entry(NOON_S + 1))
    file.delete()  # what it opens next is new
    holder.close()
    assert [one.at_s for one in settle(tmp_path, 2)] == [NOON_S, NOON_S + 1]
    log.stop()
    assert "event=traffic_written" in caplog.text


# -- the server ------------------------------------------------------------------------------


def test_the_keys_number_is_logged_not_the_key(tmp_path: Path) -> None:
    keys = ApiKeys(env="KEYS")
    os.environ["KEYS"] = "one, sesame"
    folder, words = tmp_path / "log", write_words(tmp_path / "words")
    tokens = byte_level().encode(" brown fox", add_special_tokens=False).ids

    @on_loop
    async def ask() -> None:
        config = make_config(words, endpoint=Endpoint(port=0, api_keys=keys))
        config = type(config)(
            models=config.models,
            units=config.units,
            endpoint=config.endpoint,
            traffic=TrafficFolder(path=str(folder)),
        )
        async with serving(config) as played, aiohttp.ClientSession(played.server.url) as http:
            body = {"model": "tiny", "prompt": "the quick", "max_tokens": 9}
            head = {"Authorization": "Bearer sesame"}

            async def post(**fields: object) -> int:
                asked = {**body, **fields}
                async with http.post("/v1/completions", json=asked, headers=head) as response:
                    await response.read()
                    return response.status

            answered = asyncio.create_task(post())
            request = await played.unit.request()
            await played.unit.step(request, tokens[:1])
            await played.unit.step(request, tokens[1:], FinishReason.LENGTH)
            assert await answered == 200
            assert await post(n=0) == 400
            assert await post(model="unknown") == 404
            async with http.post("/v1/completions", json=body) as response:
                assert response.status == 401
            leaving = asyncio.create_task(post(n=2))
            first = await played.unit.request()
            await played.unit.step(first, tokens[:1])
            await played.unit.request()
            leaving.cancel()
            for _ in range(2):
                await played.unit.abort()

    try:
        before_s = time.time()
        ask()
    finally:
        del os.environ["KEYS"]
    answered, left = read_entries(folder)
    assert (answered.model, answered.status, answered.unit, answered.key) == (
        "tiny",
        200,
        "main",
        2,
    )
    assert answered.prompt_tokens == len(byte_level().encode("the quick").ids)
    assert answered.output_tokens == len(tokens) and answered.sequences == 1
    assert before_s <= answered.at_s <= time.time()
    assert answered.ttft_s is not None and answered.tpot_s is not None
    assert (left.status, left.unit, left.sequences, left.output_tokens) == (499, "main", 2, 1)
    held = b"".join(path.read_bytes() for path in folder.iterdir())
    for secret in (b"sesame", b"quick", b"brown", b"unknown"):
        assert secret not in held


YAML = """\
endpoint: {port: 0}
models: [{name: tiny, path: tiny}]
kv_bytes: 1MiB
traffic: {path: log}
"""


def test_a_kill_loses_a_second_at_most(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    (tmp_path / "serve.yaml").write_text(YAML)
    command = [sys.executable, "-m", "muxrt", "serve", str(tmp_path / "serve.yaml")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [*command, "--null-executor", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            assert process.stderr is not None
            ready = next(line for line in process.stderr if "event=ready url=" in line)
            url = ready.partition("url=")[2].split()[0]
            ended = [ask(url) for _ in range(40)]
            time.sleep(1.0)
            safe = time.time()
            ended += [ask(url) for _ in range(5)]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    found = list(read_entries(tmp_path / "log"))
    must = [at_s for at_s in ended if at_s <= safe - 1.0]
    assert len(must) == 40 <= len(found) <= 45
    assert {one.model for one in found} == {"tiny"} and {one.status for one in found} == {200}


def ask(url: str) -> float:
    """When it was answered."""
    body = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 2}).encode()
    request = Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=WAIT_S) as response:
        response.read()
    return time.time()


def test_a_batch_waits_less_than_a_second() -> None:
    assert FLUSH_S <= 0.5, "and the rest is for the write"


def test_the_folder_is_relative_to_the_file(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    (tmp_path / "serve.yaml").write_text(YAML)
    traffic = load(tmp_path / "serve.yaml").traffic
    assert traffic is not None and traffic.path == str(tmp_path / "log")


# -- the command -----------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three hours of two models: 3, 0 and 1 requests of `a`, one of `b` that was refused."""
    times = [NOON_S, NOON_S + 60, NOON_S + 120, NOON_S + 7200]
    entries = [entry(at_s) for at_s in times] + [entry(NOON_S + 5, "b", 429)]
    add_history(tmp_path / "log", entries)
    return tmp_path / "log"


def test_the_summary_has_models_and_hours(muxrt: CommandLine, log: Path) -> None:
    answer = muxrt("traffic", log)
    assert answer.code == 0, answer.err
    (a,) = (line for line in answer.out.splitlines() if line.startswith(" a "))
    assert a.split()[:5] == ["a", "4", "0.000556", "40", "20"] and a.rstrip().endswith("█ ▃")
    assert "2026-03-10 12:00 to 2026-03-10 14:00 UTC" in answer.out
    data = json.loads(muxrt("traffic", log, "--json").out)
    assert [hour["requests"] for hour in data["total"]["hours"]] == [4, 0, 1]
    assert data["total"]["errors"] == 1 and data["total"]["attainment"] is None


def test_targets_come_from_the_served_file(muxrt: CommandLine, log: Path, tmp_path: Path) -> None:
    text = "models: [{name: a, preset: llama-7b, slo: {ttft_s: 0.3, tpot_s: 0.1}},"
    text += " {name: b, preset: llama-7b, slo: {ttft_s: 0.3, tpot_s: 0.1}}]\nkv_bytes: 1MiB\n"
    (tmp_path / "serve.yaml").write_text(text)
    data = json.loads(muxrt("traffic", log, "--config", tmp_path / "serve.yaml", "--json").out)
    assert data["total"]["attainment"] == 0.8, "a refused request is late"


def test_the_served_file_names_log_and_targets(
    muxrt: CommandLine, log: Path, tmp_path: Path
) -> None:
    text = (
        "models: [{name: a, preset: llama-7b, slo: {ttft_s: 0.3, tpot_s: 0.1}}]\nkv_bytes: 1MiB\n"
    )
    served, silent = tmp_path / "serve.yaml", tmp_path / "silent.yaml"
    served.write_text(text + f"traffic: {{path: {log}}}\n")
    data = json.loads(muxrt("traffic", served, "--json").out)
    assert data["total"]["requests"] == 5 and data["total"]["attainment"] is not None
    silent.write_text(text)
    answer = muxrt("traffic", silent)
    assert (
        answer.code == 2 and "keeps no traffic log, expected traffic: {path: FOLDER}" in answer.err
    )


def test_the_newest_hours_only(muxrt: CommandLine, log: Path) -> None:
    assert json.loads(muxrt("traffic", log, "--hours", 1, "--json").out)["total"]["requests"] == 1


def test_what_is_exported_is_a_trace(muxrt: CommandLine, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert muxrt("traffic", log, "--export", out).code == 0
    rows = read_trace(out)
    assert [row.model for row in rows] == ["a", "b", "a", "a", "a"]
    assert rows[-1].at_s == 7200 and rows[0].prompt_tokens == 10
    with out.open() as file:
        assert next(csv.DictReader(file))["status"] == "200"


def test_parquet_has_the_same_rows(muxrt: CommandLine, log: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out.parquet"
    answer = muxrt("traffic", log, "--export", out)
    assert answer.code == 0 and answer.out.startswith("5 requests are in"), answer.err
    rows = parquet.read_table(out).to_pylist()
    found = [
        (
            row["time"].timestamp(),
            row["model"],
            row["prompt"],
            row["output"],
            *list(row.values())[4:],
        )
        for row in rows
    ]
    assert found == [msgspec.structs.astuple(one) for one in read_entries(log)]


def test_parquet_asks_for_its_library(
    muxrt: CommandLine, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "muxrt.cli.traffic_parquet", raising=False)
    out = tmp_path / "out.parquet"
    answer = muxrt("traffic", log, "--export", out)
    assert answer.code == 2 and "pip install 'muxrt[parquet]'" in answer.err
    assert not out.exists()


def test_a_trace_is_taken_in(muxrt: CommandLine, tmp_path: Path) -> None:
    trace, log = tmp_path / "trace.csv", tmp_path / "log"
    trace.write_text("time,prompt,output\n0,5,6\n90000,7,8\n")
    answer = muxrt("traffic", log, "--import", trace)
    assert answer.code == 2 and "names no models" in answer.err
    words = ("--model", "a", "--ends", "2026-03-10T12:00")
    assert muxrt("traffic", log, "--import", trace, *words).code == 0
    assert [(one.at_s, one.output_tokens) for one in read_entries(log)] == [
        (NOON_S - 90000, 6),
        (NOON_S, 8),
    ]
    assert [str(file.day) for file in log_files(log)] == ["2026-03-09", "2026-03-10"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none",), "no such traffic log"),
        (("LOG", "--model", "a"), "they go with --import"),
        (("LOG", "--import", "none.csv"), "no such trace"),
        (("LOG", "--export", "none/x.csv"), "cannot be written"),
        (("LOG", "--export", "x.txt"), "expected a name that ends in .csv or .parquet"),
        (("LOG", "--config", "none.yaml"), "no such file"),
    ],
)
def test_mistakes_are_one_clear_line(
    muxrt: CommandLine, log: Path, words: tuple[str, ...], said: str
) -> None:
    answer = muxrt("traffic", *(str(log) if word == "LOG" else word for word in words))
    assert answer.code == 2 and said in answer.err
