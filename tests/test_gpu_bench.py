"""The benchmark of a GPU where there is none: its cases interpreted, and its records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench_record import read  # noqa: E402
from gpu_mux import Alone  # noqa: E402
from gpu_timing import Case, Figure, median_ms, relative_error, run_cases  # noqa: E402

from muxrt.workload.arrivals import Arrival  # noqa: E402

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def bench(part: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench_gpu.py"), "--part", part, *options]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@NO_GPU
@pytest.mark.parametrize("part", ["kernels", "engine", "mux"])
def test_without_a_gpu_it_says_so(part: str) -> None:
    done = bench(part)
    assert done.returncode == 1
    assert done.stderr.startswith("error: found no CUDA device, expected one (--dry-run")


@NO_GPU
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_case_runs_in_the_interpreter_and_is_right(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    done = bench("kernels", "--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = read(out)["kernels"]
    kernels = ("decode", "prefill", "norm", "silu", "rope", "embedding", "copy of", "sample")
    for kernel in kernels:
        errors = [row["error"] for name, row in figures.items() if name.startswith(kernel)]
        assert errors and all(error is not None and error < 2e-2 for error in errors), kernel
    assert done.stdout.splitlines()[-1] == f"{len(figures)} figures in {out}"
    assert "%" not in done.stdout, "times of an interpreter are no fractions of a GPU"


@NO_GPU
def test_the_engine_s_steps_run_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = bench("engine", "--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = read(out)["engine"]
    assert list(figures) == [
        "tiny, decode 1 x 20",
        "tiny, decode 3 x 20",
        "tiny, prefill 1 x 33",
        "tiny, prefill 2 x 20",
    ]
    assert all(figure["host_ms"] > 0 and figure["ms"] > 0 for figure in figures.values())
    assert figures["tiny, decode 3 x 20"]["amount"] > figures["tiny, decode 1 x 20"]["amount"]
    assert " x\n" not in done.stdout, "times without a GPU are no multiples of its floor"


@NO_GPU
def test_three_ways_to_share_serve_everything_and_go_on_where_they_ended(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = bench("mux", "--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = read(out)["mux"]
    points = {title: figure for title, figure in figures.items() if title.endswith(", point")}
    systems = {title.split(", ")[1].split()[0] for title in points}
    assert systems == {"temporal", "spatial", "adbs"}
    for figure in points.values():
        assert 0 <= figure["attainment"] <= 1 and figure["requests"] > 0
        assert figure["ttft_p99_s"] is None, "too few requests for a 99th percentile"
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{len(figures)} figures in {out}"
    # Without the last of them it measures that one, and nothing else.
    last = list(figures)[-1]
    record = read(out)
    del record["mux"][last]
    out.write_text(json.dumps(record))
    again = bench("mux", "--dry-run", "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stdout.splitlines() if "tokens/s" in line and ":" in line] == [
        line for line in again.stdout.splitlines() if line.startswith(f"{last}:")
    ]
    kept = {title: figure for title, figure in figures.items() if title != last}
    assert {t: f for t, f in read(out)["mux"].items() if t != last} == kept


def test_a_request_alone_takes_what_was_measured_of_its_model() -> None:
    alone = Alone((100, 300), {"a": (0.1, 0.2)}, {"a": 0.01})
    found = [alone.latency_s(Arrival(0.0, "a", n, 11)) for n in (50, 100, 200, 300)]
    assert found == pytest.approx([0.2, 0.2, 0.25, 0.3])


def case(name: str, ran: list[str]) -> Case:
    def measure() -> Figure:
        ran.append(name)
        return Figure(2.0, "bytes", 8e6, 1e-3)

    return Case(name, measure)


def test_a_part_goes_on_where_it_ended(tmp_path: Path) -> None:
    path, ran = tmp_path / "gpu.json", []
    run_cases(path, "kernels", [case("a", ran)], CPU, 60)
    figures = run_cases(path, "kernels", [case("a", ran), case("b", ran)], CPU, 60)
    assert ran == ["a", "b"]
    run_cases(path, "engine", [case("a", ran)], CPU, 60)
    assert read(path)["kernels"] == figures and set(figures) == {"a", "b"}
    assert ran == ["a", "b", "a"]


def test_no_case_begins_after_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    run_cases(tmp_path / "gpu.json", "kernels", [case("a", ran)], CPU, -1)
    assert not ran
    assert "are over before a: run again to go on" in capsys.readouterr().out


def test_figures_of_two_devices_do_not_mix(tmp_path: Path) -> None:
    path, ran = tmp_path / "gpu.json", []
    run_cases(path, "kernels", [case("a", ran)], CPU, 60)
    path.write_text(path.read_text().replace("Triton's interpreter", "some GPU"))
    with pytest.raises(ValueError, match="found figures of some GPU"):
        run_cases(path, "kernels", [case("b", ran)], CPU, 60)
    assert ran == ["a"]


def test_an_error_is_relative_and_nan_is_no_small_one() -> None:
    want = torch.tensor([3.0, 4.0])
    assert relative_error(want + torch.tensor([0.0, 0.5]), want) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([3.0, torch.nan]), want) <= 1e9


def test_a_run_is_timed_where_there_is_no_gpu() -> None:
    ran: list[int] = []
    assert median_ms(lambda: ran.append(1), CPU) >= 0 and ran == [1]
