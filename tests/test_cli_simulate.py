"""`muxrt simulate` as people run it."""

import json
import multiprocessing
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from statistics import stdev

import pytest
from command_line import CommandLine
from rich.console import Console

from muxrt.cli import simulate_pool
from muxrt.cli.simulate_input import Facts, Load, load_known, load_variant
from muxrt.cli.simulate_plot import error_bar
from muxrt.cli.simulate_pool import Cell, find_rates, run_cells
from muxrt.cli.simulate_run import PLOT_SPEEDS
from muxrt.sim.interval import Interval

CONFIG = """\
models:
  - {name: hot, preset: llama-7b, slo: {ttft_s: 1, tpot_s: 0.1}}
  - {name: cold, preset: llama-13b}
units:
  - name: both
    models: [{name: hot}, {name: cold}]
    memory: {kv_bytes: 30GiB}
    mesh: {device: gpu, kind: a100-80g, node: 0, gpus: [0]}
    lanes: {kind: green, sm_pct: [40, 60]}
"""
TRAFFIC = """\
models: [{name: hot, rate_rps: 4}, {name: cold, rate_rps: 1}]
duration_s: 10
prompt: {mean_tokens: 100, cv: 0.5}
output: {mean_tokens: 30, cv: 0.5}
slo: {ttft_s: 2, tpot_s: 0.2}
"""
PLAN = """\
cluster:
  nodes: [{gpu: tiny, gpus: 1}]
  kinds: [{name: tiny, memory_bytes: 80GB, bandwidth_bytes_per_s: 1.0e+12, flops: 1.0e+14, sms: 100,
           link_bytes_per_s: 1.0e+11, power_w: 100}]
models: [{name: hot, preset: llama-7b}]
engine: {control_s: 0.01}
"""


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "traffic.yaml").write_text(TRAFFIC)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "config.yaml", tmp_path / "traffic.yaml"


def test_a_table_for_people(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    answer = command_line("simulate", *files)
    assert answer.code == 0
    assert "requests/s within SLO" in answer.out
    for word in ("hot", "cold", "all", "both", "TTFT", "KV mean / peak"):
        assert word in answer.out


def test_figures_for_machines_repeat(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    first, again, other = (
        command_line("simulate", *files, "--json", "--seed", seed) for seed in (1, 1, 2)
    )
    assert first.out == again.out != other.out
    data = json.loads(first.out)
    assert data["total"]["requests"] == sum(row["requests"] for row in data["rows"])
    assert 0 < data["total"]["ttft_s"]["p50"] <= data["total"]["ttft_s"]["p99"]
    assert data["units"][0]["kv_peak"] > 0


def test_a_warm_up_is_not_counted(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    whole, late = (
        json.loads(command_line("simulate", *files, "--json", *more).out)
        for more in ([], ["--warmup", 6])
    )
    assert 0 < late["total"]["requests"] < 0.7 * whole["total"]["requests"]
    assert late["duration_s"] == 4


def test_the_plan_tells_gpus_and_engine(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    files[0].write_text(CONFIG.replace("a100-80g", "tiny"))
    answer = command_line("simulate", *files)
    assert (answer.code, "found a mesh of tiny" in answer.err) == (2, True)
    known = ("simulate", *files, "--json", "--plan", tmp_path / "plan.yaml")
    slow, quick = (json.loads(command_line(*known, *more).out) for more in ([], ["--control", 0]))
    assert slow["total"]["tpot_s"]["p50"] > quick["total"]["tpot_s"]["p50"] + 0.009


@pytest.mark.parametrize(
    ("find", "put", "says"),
    [
        ("preset: llama-13b", "preset: llama-13", "did you mean llama-13b"),
        ("kv_bytes: 30GiB", "kv_bytes: 1GiB", "one sequence of maximum length per model"),
        ("device: gpu", "device: cpu", "both: found a mesh of"),
        (
            "gpus: [0]",
            "gpus: [0, 1, 2]",
            "both: found hot on a mesh of 3 GPUs, which do not divide",
        ),
        (
            "gpus: [0]",
            "gpus: [0, 1], pp: 2",
            "units[0].mesh.pp: found 2, expected 1: `muxrt simulate` has no pipeline stages",
        ),
    ],
)
def test_a_wrong_file_is_one_line(
    command_line: CommandLine, files: tuple[Path, Path], find: str, put: str, says: str
) -> None:
    files[0].write_text(CONFIG.replace(find, put))
    answer = command_line("simulate", *files)
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert says in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_too_long_a_warm_up_is_misuse(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    answer = command_line("simulate", *files, "--warmup", 10)
    assert answer.code == 2
    assert "less than the 10 s of load" in answer.err


def test_processes_change_nothing(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    units = files[0].read_text()
    apart = units.replace(", {name: cold}]", "]") + "  - name: second\n" + "".join(
        line.replace("name: hot", "name: cold") + "\n"
        for line in units.replace(", {name: cold}]", "]").splitlines()[5:]
    )  # fmt: skip
    files[0].write_text(apart)
    one, two = (command_line("simulate", *files, "--json", "--processes", n) for n in (1, 2))
    assert one.code == two.code == 0
    assert one.out == two.out
    assert len(json.loads(one.out)["units"]) == 2


def test_placements_are_compared_and_drawn(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(CONFIG.replace("gpus: [0]", "gpus: [0, 1]"))
    more = ("--compare", other, "--speed", 1, "--speed", 9, "--plot", tmp_path / "curves.svg")
    answer = command_line("simulate", *files, *more)
    assert answer.code == 0
    assert answer.out.count("other.yaml") == 2
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    data = json.loads(command_line("simulate", *files, "--json", *more).out)
    slow, fast = (data[str(path)]["9"]["total"]["tpot_s"]["p50"] for path in (files[0], other))
    assert fast < slow


def test_the_largest_rate_is_found(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    answer = command_line("simulate", *files, "--find-goodput", 0.9, "--json", "--duration", 5)
    (found,) = json.loads(answer.out).values()
    assert 1 < found["speed"] < found["too_fast"] <= 1.02 * found["speed"]
    assert found["rate_rps"] > 5


def test_who_would_be_late_is_refused(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    files[1].write_text(TRAFFIC.replace("rate_rps: 4", "rate_rps: 60"))
    patient, strict = (
        json.loads(command_line("simulate", *files, "--json", *more).out)["rows"][0]
        for more in ([], ["--refuse-late"])
    )
    assert strict["refused"] > patient["refused"]
    assert strict["ttft_s"]["p99"] < 1.2 < patient["ttft_s"]["p99"]
    assert strict["goodput_rps"] > patient["goodput_rps"]


def test_a_search_has_speeds_of_its_own(
    command_line: CommandLine, files: tuple[Path, Path]
) -> None:
    answer = command_line("simulate", *files, "--find-goodput", 0.9, "--speed", 2)
    assert (answer.code, "speeds of its own" in " ".join(answer.err.split())) == (2, True)


# -- seeds ---------------------------------------------------------------------------------------


def test_seeds_give_means_and_intervals(
    command_line: CommandLine, files: tuple[Path, Path]
) -> None:
    many = json.loads(command_line("simulate", *files, "--json", "--seeds", 3, "--seed", 5).out)
    alone = [
        json.loads(command_line("simulate", *files, "--json", "--seed", seed).out)["total"]
        for seed in (5, 6, 7)
    ]
    found = many["total"]["output_tokens_per_s"]
    rates = [row["output_tokens_per_s"] for row in alone]
    assert found["mean"] == pytest.approx(sum(rates) / 3)
    assert found["half"] == pytest.approx(4.3027 * stdev(rates) / 3**0.5, rel=1e-4)
    table = command_line("simulate", *files, "--seeds", 3, "--seed", 5).out
    assert f"{found['mean']:.0f} ± {found['half']:.0f} tokens/s" in table
    assert "3 seeds: mean ± half of its 95 % confidence interval" in table


def test_seeds_in_processes_change_nothing(
    command_line: CommandLine, files: tuple[Path, Path]
) -> None:
    asked = ("simulate", *files, "--json", "--seeds", 3, "--speed", 1, "--speed", 2)
    one, two = (command_line(*asked, "--processes", n) for n in (1, 2))
    assert one.code == two.code == 0
    assert one.out == two.out


def test_a_trace_with_models_has_one_seed(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "trace.csv").write_text("time,model,prompt,output\n0,hot,10,5\n1,cold,10,5\n")
    files[1].write_text("trace: {file: trace.csv}\nmodels: [{name: hot}, {name: cold}]\n")
    answer = command_line("simulate", *files, "--seeds", 2)
    assert (answer.code, "names its models" in answer.err) == (2, True)
    assert command_line("simulate", *files).code == 0


def test_the_rate_that_is_found_has_an_interval(
    command_line: CommandLine, files: tuple[Path, Path]
) -> None:
    asked = ("simulate", *files, "--find-goodput", 0.9, "--seeds", 2, "--duration", 3)
    (found,) = json.loads(command_line(*asked, "--json", "--processes", 2).out).values()
    assert found["rate_rps"]["num"] == len(found["speeds"]) == 2
    assert f"{found['rate_rps']['mean']:.1f} ± " in command_line(*asked).out


# -- comparisons ---------------------------------------------------------------------------------


def test_policies_are_compared(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    asked = ("simulate", *files, "--compare", "policy=adbs,fcfs,round_robin")
    data = json.loads(command_line(*asked, "--json").out)
    assert list(data) == ["adbs", "fcfs", "round-robin"]
    given = json.loads(command_line("simulate", *files, "--json").out)
    assert data["adbs"]["1"] == given  # the policy of the file
    assert data["fcfs"]["1"] != given
    table = command_line(*asked, "--seeds", 2).out
    assert "round-robin" in table and "vs first" in table


def test_strategies_are_compared(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = PLAN.replace("gpu: tiny, gpus: 1", "gpu: tiny, gpus: 2").replace(
        "{name: hot, preset: llama-7b}]", "{name: hot, preset: llama-7b}, {name: cold, preset:"
        " llama-7b}]"
    )  # fmt: skip
    (tmp_path / "plan.yaml").write_text(plan)
    files[0].write_text(CONFIG.replace("a100-80g", "tiny"))
    asked = ("simulate", *files, "--compare", "strategy=spatial,muxserve", "--json")
    answer = command_line(*asked)
    assert (answer.code, "expected --plan" in answer.err) == (2, True)
    data = json.loads(command_line(*asked, "--plan", tmp_path / "plan.yaml").out)
    assert list(data) == [str(files[0]), "spatial", "muxserve"]
    spatial = data["spatial"]["1"]
    assert spatial["total"]["requests"] == data[str(files[0])]["1"]["total"]["requests"]
    assert [len(unit["models"]) for unit in spatial["units"]] == [1, 1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--compare", "policy=lifo"], "found policy=lifo, expected policy= and of fcfs, round-"),
        (["--compare", "strategy=best"], "found strategy=best, expected strategy= and of"),
        (["--compare", "nowhere.yaml"], "nowhere.yaml"),
        (["--fail", "both@x"], "found --fail both@x, expected UNIT@T or UNIT@T+S"),
        (["--fail", "both@5+0"], "both: found a failure at 5 s for 0.0 s"),
        (["--fail", "other@5"], "found a failure of 'other', expected one of: both"),
        (["--fail", "both@5+2", "--fail", "both@6"], "both: found a failure at 6 s, expected one"),
        (["--plot", "x.pdf"], "found x.pdf, expected a picture named *.svg or *.png"),
        (["--plot", "no/x.png"], "found no folder no, expected it to exist"),
    ],
)
def test_wrong_words_are_one_line(
    command_line: CommandLine, files: tuple[Path, Path], words: list[str], says: str
) -> None:
    answer = command_line("simulate", *files, *words)
    assert answer.code == 2
    assert says in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_a_placement_twice_is_misuse(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    answer = command_line("simulate", *files, "--compare", files[0])
    assert (answer.code, "is there twice" in " ".join(answer.err.split())) == (2, True)


# -- pictures ------------------------------------------------------------------------------------


def words_of(picture: Path) -> set[str]:
    """The texts of an SVG whose letters are drawn as paths: matplotlib notes them beside those."""
    return {line.strip(" <>!-") for line in picture.read_text().splitlines() if "<!--" in line}


def test_a_picture_of_one_placement(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    picture = tmp_path / "one.svg"
    answer = command_line("simulate", *files, "--plot", picture)
    assert answer.code == 0
    lines = [line for line in answer.out.splitlines() if str(files[0])[:8] in line]
    assert len(lines) == len(PLOT_SPEEDS)
    assert {"requests/s", "SLO scale, at the rates given", "both", "KV in use, %", "hot", "cold",
            "lane busy, %", "lane 0", "lane 1"} <= words_of(picture)  # fmt: skip


def test_a_picture_of_several(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    picture = tmp_path / "several.svg"
    asked = ("simulate", *files, "--compare", "policy=adbs,fcfs", "--seeds", 2)
    assert command_line(*asked, "--plot", picture, "--speed", 1, "--speed", 3).code == 0
    assert {"adbs", "fcfs", "mean of units, %", "mean of all, %"} <= words_of(picture)


def test_error_bars_stay_within_what_a_share_can_be() -> None:
    assert error_bar(Interval(0.5, 0.25, 3)) == (25.0, 25.0)
    assert error_bar(Interval(0.75, 0.5, 3)) == (50.0, 25.0)
    assert error_bar(Interval(0.125, 0.5, 3)) == (12.5, 50.0)
    assert error_bar(Interval(1.0, None, 1)) == (0.0, 0.0)


def test_a_picture_without_targets_has_use_only(
    command_line: CommandLine, files: tuple[Path, Path], tmp_path: Path
) -> None:
    files[0].write_text(CONFIG.replace(", slo: {ttft_s: 1, tpot_s: 0.1}", ""))
    files[1].write_text(TRAFFIC.replace("slo: {ttft_s: 2, tpot_s: 0.2}\n", ""))
    picture = tmp_path / "one.svg"
    assert command_line("simulate", *files, "--plot", picture, "--speed", 1).code == 0
    assert {"KV in use, %", "lane busy, %"} <= words_of(picture)


# -- progress ------------------------------------------------------------------------------------


class Terminal(StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bar_reaches_its_end(processes: int, files: tuple[Path, Path], start_method: str) -> None:
    variant, known = load_variant(files[0]), load_known(Facts())
    load = Load(files[1], num_seeds=2)
    stream = Terminal()
    screen = Console(file=stream, force_terminal=True, width=80)
    cells = [Cell(variant, known, load, 1.0, number) for number in range(2)]
    reports = run_cells(cells, processes, screen)
    assert "simulating" in stream.getvalue() and "100%" in stream.getvalue()
    assert simulate_pool._done.value == pytest.approx(2.0)
    silent = Console(file=StringIO(), force_terminal=False)
    assert run_cells(cells, processes, silent) == reports
    assert silent.file.getvalue() == ""  # type: ignore[attr-defined]
    assert simulate_pool._done.value == pytest.approx(2.0)  # not four


def test_a_bar_follows_a_search(files: tuple[Path, Path]) -> None:
    stream = Terminal()
    screen = Console(file=stream, force_terminal=True, width=80)
    load = Load(files[1], duration_s=2.0)
    cell = Cell(load_variant(files[0]), load_known(Facts()), load, 1.0, 0)
    (rate,) = find_rates([cell], 0.9, 1, screen)
    assert rate.found.speed > 1 and "100%" in stream.getvalue()


def test_a_single_simulation_tells_how_far_it_is(files: tuple[Path, Path]) -> None:
    stream = Terminal()
    screen = Console(file=stream, force_terminal=True, width=80)
    cell = Cell(load_variant(files[0]), load_known(Facts()), Load(files[1]), 1.0, 0)
    run_cells([cell], 2, screen)
    assert "100%" in stream.getvalue()


# -- failures ------------------------------------------------------------------------------------


def test_a_dead_unit_shows(command_line: CommandLine, files: tuple[Path, Path]) -> None:
    asked = ("simulate", *files, "--fail", "both@4+3")
    data = json.loads(command_line(*asked, "--json").out)
    assert data["total"]["failed"] > 5
    assert data["total"]["answered"] + data["total"]["failed"] == data["total"]["requests"]
    assert (data["units"][0]["deaths"], data["units"][0]["down_s"]) == (1, 3.0)
    assert data["units"][0]["over_time"]["kv"]["hot"][5] == 0.0
    table = command_line(*asked).out
    assert "failed" in table and "down s" in table
    assert "down s" not in command_line("simulate", *files).out
