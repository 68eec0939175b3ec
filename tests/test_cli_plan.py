"""`muxrt plan` as people run it."""

import json
import os
import signal
from pathlib import Path

import pytest
from command_line import CommandLine

from muxrt.config.load import load
from muxrt.config.placement import ModelSpec
from muxrt.config.presets import model_shape
from muxrt.planner.draft import Draft, Group, Part
from muxrt.planner.search import Search
from muxrt.planner.strategies import STRATEGIES
from muxrt.planner.strategies.auto import auto
from muxrt.planner.workload import Problem

PLAN = """\
cluster: {nodes: [{gpu: a100-80g, gpus: 2}]}
models:
  - {name: hot, preset: llama-7b}
  - {name: cold, preset: llama-13b, max_model_len: 1024}
workload: traffic.yaml
"""
TRAFFIC = """\
power_law: {alpha: 2.0, top_rate_rps: 8}
prompt: {mean_tokens: 100, cv: 0.5}
output: {mean_tokens: 50, cv: 0.5}
slo: {ttft_s: 1, tpot_s: 0.1}
"""

# (what is replaced, by what, what the error says after "error: ")
BROKEN = {
    "a model that fits nowhere": (
        "a100-80g, gpus: 2",
        "l4-24g, gpus: 1",
        "cold fits nowhere: on 1 x l4-24g, its largest mesh, each GPU needs 26.0 GB of weights",
    ),
    "a rate nobody can meet": ("top_rate_rps: 8", "top_rate_rps: 9000", "hot: found 9000 requ"),
    "targets nobody can meet": ("tpot_s: 0.1", "tpot_s: 0.0001", "hot: found ttft_s 1 and tpot_s"),
    "no targets": ("slo: {ttft_s: 1, tpot_s: 0.1}", "", "hot has no slo, expected ttft_s"),
    "too long a sequence": ("max_model_len: 1024", "max_model_len: 9999", "cold: found max_model"),
    "an unknown GPU": ("a100-80g", "b100", "cluster.nodes[0].gpu: found 'b100', expected one of"),
    "too many GPUs": ("gpus: 2", "gpus: 800000", "cluster.nodes[0].gpus"),
    "a workload for others": (
        "power_law: {alpha: 2.0, top_rate_rps: 8}",
        "models: [{name: warm, rate_rps: 1}]",
        "asks for 'warm'",
    ),
    "a model without a rate": (
        "power_law: {alpha: 2.0, top_rate_rps: 8}",
        "models: [{name: hot, rate_rps: 1}]",
        "gives 'cold' of",
    ),
}


def write(folder: Path, plan: str = PLAN, traffic: str = TRAFFIC) -> Path:
    (folder / "traffic.yaml").write_text(traffic)
    (folder / "plan.yaml").write_text(plan)
    return folder / "plan.yaml"


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_a_plan_is_shown_written_and_can_be_read(command_line: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "placement.yaml"
    answer = command_line("plan", write(tmp_path), "--out", out, "--explain")
    assert answer.code == 0 and "10.0 of 10.0 requests/s within SLO" in answer.out
    assert "2 of 2 GPUs" in answer.out and "second-best place" in answer.out
    config = load(out)
    assert {part.name for unit in config.units for part in unit.models} == {"hot", "cold"}
    assert [round(model.rate_rps, 3) for model in config.models] == [8, 2]
    refused = command_line("serve", out, "--check")
    assert refused.code == 2 and "'hot' has no path" in refused.err


def test_a_plan_for_machines(command_line: CommandLine, tmp_path: Path) -> None:
    answer = command_line("plan", write(tmp_path), "--json", "--strategy", "spatial")
    data = json.loads(answer.out)
    assert data["offered_rps"] == pytest.approx(10) and data["gpus"] == 2
    assert [len(unit["unit"]["models"]) for unit in data["units"]] == [1, 1]
    assert {unit["times_from"] for unit in data["units"]} == {"roofline"}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_planned_gets_one_error(
    case: str, command_line: CommandLine, tmp_path: Path
) -> None:
    old, new, expected = BROKEN[case]
    assert (PLAN + TRAFFIC).count(old) == 1
    path = write(tmp_path, PLAN.replace(old, new), TRAFFIC.replace(old, new))
    answer = command_line("plan", path)
    assert answer.code == 2 and expected in answer.err and answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--out", "nowhere/placement.yaml"], "found no folder nowhere, expected it to exist"),
        (["--picture", "nowhere/gpus.svg"], "found no folder nowhere, expected it to exist"),
        (["--hour", "14"], "found hour 14, but the workload is the same all day"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_search(
    options: list[str],
    expected: str,
    command_line: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("muxrt.planner.strategies.STRATEGIES", {})  # none is asked
    answer = command_line("plan", write(tmp_path), *options)
    assert answer.code == 2 and expected in answer.err and answer.err.count("\n") == 1


def test_units_are_numbered_as_they_lie_in_the_nodes(
    command_line: CommandLine, tmp_path: Path
) -> None:
    data = json.loads(command_line("plan", write(tmp_path), "--json").out)
    places = [
        (unit["unit"]["mesh"]["node"], unit["unit"]["mesh"]["gpus"]) for unit in data["units"]
    ]
    assert places == sorted(places)
    assert [unit["unit"]["name"] for unit in data["units"]] == [
        f"unit-{number}" for number in range(len(places))
    ]


def test_the_simulator_may_choose(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked about whole drafts, and what it prefers is taken."""
    asked: list[float] = []

    def least(problem: Problem, search: Search) -> Draft:
        apart = STRATEGIES["spatial"](problem, search)
        together = (Group(0, 1, (Part("cold"), Part("hot"))),)
        asked.extend(search.judge(draft).goodput_rps for draft in (apart, together))
        return apart

    monkeypatch.setattr("muxrt.planner.strategies.mixed.auto", least)
    traffic = TRAFFIC.replace("top_rate_rps: 8", "top_rate_rps: 60")
    plan = write(tmp_path, PLAN.replace("llama-13b", "llama-7b"), traffic)
    answer = command_line("plan", plan, "--judge", "simulator", "--no-mix")
    assert answer.code == 0, answer.err
    apart, together = asked
    assert together < 0.9 * apart < 80  # 75 requests/s are offered


def test_the_simulator_judges_by_a_short_trace(command_line: CommandLine, tmp_path: Path) -> None:
    """It raised ValueError: the warm-up was longer than the trace."""
    (tmp_path / "trace.csv").write_text(
        "time,prompt,output\n" + "".join(f"{n / 10},100,20\n" for n in range(60))
    )
    traffic = (
        "trace: {file: trace.csv}\nduration_s: 6\npower_law: {alpha: 1}\n"
        "slo: {ttft_s: 1, tpot_s: 0.1}\n"
    )
    answer = command_line("plan", write(tmp_path, traffic=traffic), "--judge", "simulator")
    assert answer.code == 0 and "10.0 of 10.0 requests/s" in answer.out


def test_ctrl_c_keeps_the_best_so_far(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(problem: Problem, search: Search) -> Draft:
        assert not search.is_over()
        os.kill(os.getpid(), signal.SIGINT)
        assert search.is_over()
        return auto(problem, search)

    monkeypatch.setattr("muxrt.planner.strategies.mixed.auto", interrupted)
    before = signal.getsignal(signal.SIGINT)
    answer = command_line("plan", write(tmp_path))
    assert answer.code == 0 and "requests/s within SLO" in answer.out
    assert "interrupted: the best placement so far" in answer.err
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_overloaded_refuses_what_would_be_late(
    command_line: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "placement.yaml"
    busy = write(tmp_path, traffic=TRAFFIC.replace("top_rate_rps: 8", "top_rate_rps: 110"))
    answer = command_line("plan", busy, "--out", out)
    timeouts = {model.name: model.queue_timeout_s for model in load(out).models}
    assert answer.code == 0 and timeouts["hot"] == 1.0
    assert "more traffic than is served in time: hot (1 s)" in answer.out
    assert command_line("plan", write(tmp_path), "--out", out).code == 0
    assert {model.queue_timeout_s for model in load(out).models} == {None}


def test_a_folder_with_rope_scaling_is_planned(command_line: CommandLine, tmp_path: Path) -> None:
    """It raised TypeError: a shape with a dict in it was no key."""
    folders = Path(__file__).parent.parent / "configs" / "demo_models"
    plan = PLAN.replace("preset: llama-7b", f"path: {folders / 'pydoc-m'}")
    plan = plan.replace("preset: llama-13b, max_model_len: 1024", f"path: {folders / 'pydoc-s'}")
    assert model_shape(ModelSpec(name="m", path=str(folders / "pydoc-m")), ()).rope_scaling
    answer = command_line("plan", write(tmp_path, plan))
    assert answer.code == 0 and "10.0 of 10.0 requests/s" in answer.out


def test_muxserves_own_input(command_line: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        "cluster: {nnodes: 1, ngpus_per_node: 2}\n"
        "models: [{name: llm-0, model: /path/to/llama-7b, rate: 2.5}]\n"
    )
    answer = command_line("plan", path, "--ttft", 1, "--tpot", 0.1, "--strategy", "muxserve")
    assert answer.code == 0 and "2.5 of 2.5 requests/s within SLO" in answer.out
    assert "has no slo" in command_line("plan", path).err


def test_a_picture_is_drawn(command_line: CommandLine, tmp_path: Path) -> None:
    picture = tmp_path / "gpus.svg"
    assert command_line("plan", write(tmp_path), "--picture", picture).code == 0
    assert "<svg" in picture.read_text()[:2000]
    wrong = command_line("plan", write(tmp_path), "--picture", tmp_path / "gpus.jpg")
    assert wrong.code == 2 and "expected a picture named *.svg or *.png" in wrong.err
