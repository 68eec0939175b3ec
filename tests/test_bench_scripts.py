"""The comparison benchmarks: their arithmetic, and short runs of everything that is muxrt."""

import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from muxrt.bench.job import Outcome, Status
from muxrt.bench.run import Run, plan_arrivals
from muxrt.bench.watch import Blocks
from muxrt.config.placement import Slo
from muxrt.workload.spec import Lengths, Traffic, Workload

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs" / "demo_models"
sys.path.append(str(ROOT / "scripts"))

import bench_offline  # noqa: E402
import bench_sharing  # noqa: E402
import bench_trio  # noqa: E402
import vllm_servers  # noqa: E402
from bench_rates import (  # noqa: E402
    Load,
    Point,
    best_per_rate,
    make_point,
    measure,
    rising,
    sustained,
)
from bench_record import Record, draw, read  # noqa: E402
from engine_process import EngineDied, EngineProcess  # noqa: E402
from offline_case import Case, Timing, TokenClock  # noqa: E402
from process_memory import tree_memory  # noqa: E402

MIB = 1 << 20


def point(rate_rps: float, attainment: float, setting: str = "x") -> Point:
    return Point(
        setting=setting,
        rate_rps=rate_rps,
        offered_rps=rate_rps,
        served_rps=rate_rps,
        attainment=attainment,
        goodput_rps=rate_rps * attainment,
        requests=10,
        failed=0,
        refused=0,
        ttft_p50_s=0.1,
        ttft_p99_s=0.2,
        tpot_p50_s=0.01,
        tpot_p99_s=0.02,
        output_tokens=100,
        blocks_used=None,
        preempted=None,
        client_lag_p99_s=0.0,
        errors={},
    )


@pytest.mark.parametrize(
    ("curve", "rate_rps", "how"),
    [
        ([(1, 1.0), (2, 0.8)], 1.5, "between two"),
        ([(2, 0.8), (1, 1.0)], 1.5, "between two"),
        ([(1, 0.8), (2, 0.95), (3, 0.45)], 2.1, "between two"),
        ([(2, 0.8)], 1.0, "between 0"),
        ([(1, 1.0), (4, 0.9)], 4.0, "at least"),
    ],
)
def test_the_sustained_rate_is_interpolated(
    curve: list[tuple[float, float]], rate_rps: float, how: str
) -> None:
    found = sustained([point(rate, attained) for rate, attained in curve])
    assert found.rate_rps == pytest.approx(rate_rps)
    assert found.how.startswith(how)


def test_rates_rise_beyond_the_list_until_goodput_falls() -> None:
    points: list[Point] = []
    asked = []
    for rate_rps in rising([1.0, 2.0], points):
        asked.append(rate_rps)
        points.append(point(rate_rps, 1.0 if rate_rps < 3 else 0.4))
    assert asked == [1.0, 2.0, 2.5, 3.125, 3.90625]


def test_one_bad_run_does_not_end_the_rise() -> None:
    points: list[Point] = []
    for rate_rps in rising([1.0, 2.0, 3.0, 4.0, 5.0], points):
        points.append(point(rate_rps, 1.0 if rate_rps == 2.0 else 0.0))
    assert [p.rate_rps for p in points] == [1.0, 2.0, 3.0, 4.0]


def test_each_rate_counts_at_its_best_setting() -> None:
    points = [point(1, 0.5, "a"), point(2, 0.9, "a"), point(1, 0.7, "b"), point(2, 0.2, "b")]
    assert [p.setting for p in best_per_rate(points)] == ["b", "a"]


def test_goodput_counts_over_the_time_of_arrivals() -> None:
    """Not until the last answer: a long tail would make the same requests count for less."""
    slo = Slo(ttft_s=1.0, tpot_s=0.1)
    quick = Outcome("a", 0.0, Status.OK, 0.0, 0.5, 1.0, 1.0, output_tokens=11)
    late = replace(quick, ttft_s=1.5, last_s=30.0, e2e_s=30.0)
    failed = replace(quick, status=Status.FAILED)
    workload = Workload(duration_s=2.0, models=(Traffic(name="a"),), slo=slo)
    run = Run(workload, [quick, quick, late, failed], Blocks(), 4)
    found = make_point("s", 3.0, run)
    assert (found.attainment, found.goodput_rps, found.offered_rps) == (0.5, 1.0, 2.0)
    assert (found.failed, found.served_rps) == (1, pytest.approx(3 / 30))


def test_a_run_that_was_cut_short_is_no_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C makes the client return what it has; a benchmark must not go on with the next rate."""

    async def cut_short(targets: object, workload: Workload, changed: object) -> Run:
        return Run(workload, [], Blocks(), 5)

    monkeypatch.setattr("bench_rates.run_all", cut_short)
    lengths = Lengths(mean_tokens=10)
    load = Load(("a",), (1.0,), lengths, lengths, Slo(1.0, 0.1))
    with pytest.raises(KeyboardInterrupt):
        measure("s", ["http://nowhere"], load, 1.0, 1.0, 0)


def test_the_load_is_dealt_by_weight() -> None:
    lengths = Lengths(mean_tokens=10)
    load = Load(("a", "b"), (3.0, 1.0), lengths, lengths, Slo(1.0, 0.1))
    assert [model.rate_rps for model in load.workload(8.0, 5.0, 0).models] == [6.0, 2.0]


def test_a_trace_is_replayed_at_the_asked_rate_and_means() -> None:
    lengths = Lengths(mean_tokens=100, max_tokens=300)
    trace = ROOT / "configs" / "traces" / "azure_conv_excerpt.csv"
    load = Load(("a", "b"), (3.0, 1.0), lengths, lengths, Slo(1.0, 0.1), trace)
    plan = plan_arrivals(load.workload(8.0, 60.0, 0))
    assert len(plan) / 60 == pytest.approx(8, rel=0.25)
    assert sum(a.model == "a" for a in plan) / len(plan) == pytest.approx(0.75, abs=0.1)
    assert max(a.prompt_tokens for a in plan) <= 300


def test_decode_is_timed_while_all_sequences_decode() -> None:
    clock = TokenClock()
    begun_s = clock._begun_s
    for at_s, request in [(1, "a"), (2, "b"), (2, "a"), (3, "a"), (3, "b"), (4, "a"), (5, "b")]:
        clock.note(request, 1, begun_s + at_s)
    timing = clock.timing()
    assert timing.prefill_s == pytest.approx(2)  # b's first token
    assert timing.decode_s == pytest.approx(2)  # until a is complete
    assert timing.decode_tokens == 3  # two at 3 s and one at 4 s


def test_both_engines_get_the_same_prompts() -> None:
    case = Case(2, 5, 1, seed=7)
    assert case.prompts() == Case(2, 5, 9, seed=7).prompts() != Case(2, 5, 1, seed=8).prompts()


ENGINE = """
import sys
sys.path.append(sys.argv[1])
from offline_case import Channel, Timing
channel = Channel()
print("chatter of a library", flush=True)
channel.answer(lambda case: Timing(case.num_prompts, 2.0, 3), {"version": "1"})
"""


def engine(tmp_path: Path, code: str = ENGINE) -> EngineProcess:
    command = [sys.executable, "-c", code, str(ROOT / "scripts")]
    return EngineProcess(command, tmp_path / "log", os.environ)


def state(process: EngineProcess) -> str:
    """One letter, as ps shows it: T is stopped."""
    stat = Path(f"/proc/{process._process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]


def test_an_engine_stands_still_between_its_cases(tmp_path: Path) -> None:
    with engine(tmp_path) as process:
        process.wait_ready()
        assert process.facts == {"version": "1"}
        assert process.run(Case(4, 1, 1, 0)) == Timing(4, 2.0, 3)
        until_s = time.monotonic() + 10
        while state(process) != "T" and time.monotonic() < until_s:  # signals take their time
            time.sleep(0.01)
        assert state(process) == "T"
    assert "chatter" in (tmp_path / "log").read_text()
    assert process._process.returncode is not None


OWNER = """
import os, sys, time
from pathlib import Path
sys.path.append(sys.argv[1])
from bench_record import stop_on_sigterm
from engine_process import EngineProcess
stop_on_sigterm()
command = ["sh", "-c", "sleep 1000 & echo $!; wait"]
with EngineProcess(command, Path(sys.argv[2]), os.environ) as engine:
    print(engine._process.stdout.readline(), flush=True)
    time.sleep(1000)
"""


def test_what_an_engine_started_ends_with_the_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(ROOT / "scripts"), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        child = Path("/proc", owner.stdout.readline().decode().strip())
        assert child.exists()
        owner.terminate()
        owner.wait(10)
    until_s = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(process: Path) -> bool:
    """There and no zombie: nobody may have asked for its exit code yet."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_engine_that_ends_says_why(tmp_path: Path) -> None:
    process = engine(tmp_path, "raise SystemExit('no weights')")
    with process, pytest.raises(EngineDied, match="no weights"):
        process.wait_ready()


@pytest.mark.slow
def test_offline_measures_muxrt_for_real(tmp_path: Path) -> None:
    plan = bench_offline.Plan(
        models=("pydoc-s",),
        kinds=tuple(bench_offline.kinds([1, 2], prompt_tokens=8, output_tokens=6)),
        columns=("muxrt kv bf16",),
        rounds=2,
        kv_bytes=64 * MIB,
        with_vllm=False,
    )
    bench_offline.offline(plan, tmp_path / "offline.json", [DEMO / "pydoc-s"])
    data = read(tmp_path / "offline.json")
    decoding = [run for run in data["runs"] if run["case"] == "decode, batch 2"]
    assert [run["column"] for run in decoding] == ["muxrt", "muxrt kv bf16", "muxrt"]
    assert all(2 < run["decode_tokens"] <= 2 * 5 for run in decoding)  # not the first of either
    assert {row["case"] for row in data["summary"]} == {kind.name for kind in plan.kinds}
    assert all(min(row["tokens_per_s"].values()) > 0 for row in data["summary"])
    shares = data["summary"][0]["bandwidth"]
    # Half the KV bytes per token, and all the weights: little less per step.
    ratio = [
        shares[name]["bytes_per_s"] / data["summary"][0]["tokens_per_s"][name]
        for name in ("muxrt kv bf16", "muxrt")
    ]
    assert 0.5 < ratio[0] / ratio[1] < 1


def test_offline_ratios_are_of_medians() -> None:
    rates = {"muxrt": (3.0, 100.0, 4.0), "vLLM": (2.0, 1.0, 2.0)}
    runs = [
        {"model": "m", "case": "decode, batch 8", "column": column, "tokens_per_s": rate}
        for column, values in rates.items()
        for rate in values
    ]
    (row,) = bench_offline.summary({"models": [], "runs": runs})
    assert row["ratio"] == 2.0


@pytest.mark.slow
def test_trio_measures_muxrt_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [DEMO / "pydoc-s", DEMO / "pydoc-m"]
    plan = bench_trio.Plan(
        models=("pydoc-s", "pydoc-m"),
        weights=(2.0, 1.0),
        rates={"muxrt": (6.0,)},
        settings={"vllm": (), "muxrt": ("1/30",)},
        kv_bytes=64 * MIB,
        seconds=1.0,
        requests=6,
        most_seconds=2.0,
    )
    monkeypatch.setattr("bench_rates.MOST_STEPS", 0)  # no rates beyond the list
    monkeypatch.setattr("bench_rates.WARM_UP_S", 1.0)
    data = bench_trio.trio(plan, tmp_path / "trio.json", folders)
    assert [row["failed"] for row in data["points"]] == [0]
    assert data["points"][0]["requests"] > 0
    server = data["servers"][0]
    assert server["at_end"]["processes"] >= 2  # the API and its unit
    assert 0 < server["rest_bytes"] < server["at_ready"]["pss_bytes"]
    assert read(tmp_path / "trio.json")["summary"]["muxrt"]["ready_s"] > 0


@pytest.mark.slow
def test_sharing_gives_every_mode_the_same_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = bench_sharing.Cell("demo", (DEMO / "pydoc-s", DEMO / "pydoc-m"), alpha=0.9)
    plan = bench_sharing.Plan(
        sets=(),
        alphas=(0.9,),
        loads=(1.0,),
        first_rps=8.0,
        seconds=1.0,
        rounds=1,
        most_steps=1,
        prompt=Lengths(mean_tokens=10, max_tokens=20),
        output=Lengths(mean_tokens=4, max_tokens=20),
        max_model_len=256,  # the client's own first request needs some 150
        slo=Slo(60.0, 60.0),
        big_bytes=64 * MIB,
    )
    monkeypatch.setattr("bench_rates.WARM_UP_S", 1.0)
    data = bench_sharing.sharing(plan, [cell], tmp_path / "sharing.json")
    assert [row["setting"] for row in data["points"]] == list(bench_sharing.MODES)
    assert len({row["requests"] for row in data["points"]}) == 1
    assert data["points"][0]["requests"] > 0
    assert data["demand"][0]["arena_bytes"] >= data["demand"][0]["floor_bytes"]
    within = dict.fromkeys(("spatial", "moved", "temporal"), 1.0)  # all within SLO
    assert data["summary"][0]["adbs_over"] == within


def test_sharing_compares_the_best_and_the_equal_loads() -> None:
    rates = {"adbs": (4.0, 6.0), "spatial": (4.0, 3.0), "temporal": (2.0, 1.0)}
    points = [
        {"cell": "c", "setting": mode, "load": load, "goodput_rps": rate}
        for mode, values in rates.items()
        for load, rate in zip((1.0, 1.2), values, strict=True)
    ]
    (row,) = bench_sharing.summary({"points": points})
    assert row["adbs_over"] == {"spatial": 1.5, "temporal": 3.0}
    assert row["adbs_over_at_equal_load"]["spatial"] == {"1": 1.0, "1.2": 2.0}


def test_a_killed_run_keeps_what_it_has(tmp_path: Path) -> None:
    record = Record(tmp_path / "deep" / "x.json", {"rounds": 1})
    record.add("runs", {"a": 1})
    data = read(tmp_path / "deep" / "x.json")
    assert data["runs"] == [{"a": 1}] and data["settings"] == {"rounds": 1}
    assert {"machine", "date", "commit", "load_average"} <= data.keys()


CHILD = """
import mmap, sys
arena = mmap.mmap(-1, 64 << 20); arena[: 32 << 20] = b"x" * (32 << 20)
print("ready", flush=True); sys.stdin.read()
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_memory_is_that_of_all_processes() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdout.readline()
        found = tree_memory([parent.pid])
        parent.stdin.close()
    assert found.processes == 2
    assert 32 * MIB < found.pss_bytes <= found.rss_bytes < 64 * MIB  # written, not reserved


def test_vllm_gets_its_threads_and_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_servers, "VENV", tmp_path)
    with pytest.raises(vllm_servers.NoVllm, match="setup_vllm_cpu.sh makes it"):
        vllm_servers.environment([0, 1], bound=True)
    (tmp_path / "preload.txt").write_text("/lib/libtcmalloc.so\n/lib/libiomp5.so\n")
    bound = vllm_servers.said(vllm_servers.environment([0, 1], bound=True))
    assert bound["LD_PRELOAD"] == "libtcmalloc.so libiomp5.so"
    assert bound["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    free = vllm_servers.said(vllm_servers.environment([0, 1], bound=False))
    assert (free["VLLM_CPU_OMP_THREADS_BIND"], free["OMP_NUM_THREADS"]) == ("nobind", "1")


def test_the_set_up_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup_vllm_cpu.sh")],
        env={**os.environ, "MUXRT_VLLM_VENV": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "is no virtual environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def trio_rows() -> list[dict[str, object]]:
    vllm = [{"side": "vllm", **asdict(point(rate, 1 / rate))} for rate in (1.0, 2.0)]
    return [*vllm, *({"side": "muxrt", **asdict(point(rate, 1.0))} for rate in (2.0, 4.0))]


SERVER = {"ready_s": 10.0, "rest_bytes": 400, "at_end": {"pss_bytes": 1000}}


def test_the_trio_is_summed_up_as_ratios() -> None:
    servers = [
        {"side": "vllm", "setting": "bound", **SERVER},
        {"side": "muxrt", "setting": "2", **SERVER, "ready_s": 2.0, "rest_bytes": 100},
    ]
    far = {"side": "muxrt", **asdict(point(40.0, 0.05))}
    found = bench_trio.summary({"points": [*trio_rows(), far], "servers": servers})
    assert found["overload"] == {"rate_rps": 40.0, "goodput_over_most": 0.5}
    assert found["muxrt_over_vllm"] == {
        "sustained_rps": pytest.approx((4 + 36 * 0.1 / 0.95) / 1.2),
        "most_goodput_rps": 4.0,
        "ready_s": 0.2,
        "rest_bytes": 0.25,
    }


def test_the_plots_are_drawn(tmp_path: Path) -> None:
    slo = {"slo": {"ttft_s": 1.0, "tpot_s": 0.1}}
    Record(tmp_path / "trio_vs_vllm.json", slo).put("points", trio_rows())
    offline = [{"model": "m", "case": "decode, batch 1", "tokens_per_s": {}, "ratio": 1.5}]
    Record(tmp_path / "offline_vs_vllm.json", {}).put("summary", offline)
    best = {"cell": "3 models", "best_goodput_rps": {"adbs": 3, "spatial": 2, "temporal": 1}}
    Record(tmp_path / "sharing.json", {"arena": 0.6}).put("summary", [best])
    for name in ("trio_vs_vllm", "offline_vs_vllm", "sharing"):
        draw(name, tmp_path)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
