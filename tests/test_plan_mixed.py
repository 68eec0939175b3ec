"""`muxrt plan` where some models have their phases apart and others are colocated."""

import json
from pathlib import Path

import pytest
from command_line import CommandLine

from muxrt.cli.plan_input import load_problem
from muxrt.cli.plan_judge import Simulator, _steady
from muxrt.config.load import load
from muxrt.planner.phase_plan import to_placement
from muxrt.planner.strategies.distserve import distserve
from muxrt.workload.arrivals import arrivals

PROFILE = Path(__file__).parent.parent / "configs" / "profiles" / "opt_a100.yaml"
OPT = (
    "{hidden_size: 5120, num_layers: 40, num_heads: 40, intermediate_size: 13656,"
    " vocab_size: 50272, max_positions: 2048, tied_embeddings: true}"
)
PLAN = f"""\
cluster: {{nodes: [{{gpu: a100-80g, gpus: 8}}]}}
profiles: [{PROFILE}]
models:
  - {{name: chat, sizes: {OPT}}}
  - {{name: code, sizes: {OPT}}}
workload: traffic.yaml
"""
TRAFFIC = """\
duration_s: 30
models:
  - {name: chat, rate_rps: 16, prompt: {mean_tokens: 700, cv: 0.8, max_tokens: 1500},
     output: {mean_tokens: 200, cv: 0.8, max_tokens: 500}, slo: {ttft_s: 0.5, tpot_s: 0.05}}
  - {name: code, rate_rps: 12.8, prompt: {mean_tokens: 1100, cv: 0.5, max_tokens: 1900},
     output: {mean_tokens: 30, cv: 0.7, max_tokens: 120}, slo: {ttft_s: 0.5, tpot_s: 0.05}}
"""


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "traffic.yaml").write_text(TRAFFIC)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


def test_both_kinds_are_shown_written_drawn_and_simulated(
    muxrt: CommandLine, plan: Path, tmp_path: Path
) -> None:
    out, picture = tmp_path / "placement.yaml", tmp_path / "gpus.svg"
    words = ("--out", out, "--picture", picture, "--explain", "--time-limit", 600)
    answer = muxrt("plan", plan, *words)
    assert answer.code == 0, answer.err
    assert "8 of 8 GPUs: prefills and decodes apart on" in answer.out
    assert "x decode on tp" in answer.out and "lanes: % of the SMs" in answer.out
    assert "the simulator, which chose among" in answer.out
    config = load(out)
    roles = {(part.name, part.role) for unit in config.units for part in unit.models}
    (apart,) = {name for name, role in roles if role == "prefill"}
    (other,) = {"chat", "code"} - {apart}
    assert roles == {(apart, "prefill"), (apart, "decode"), (other, "mixed")}
    assert f"{apart}: apart: " in answer.out and f"{other}: colocated: " in answer.out
    drawn = picture.read_text()
    assert "<svg" in drawn[:2000]
    simulated = muxrt("simulate", out, tmp_path / "traffic.yaml", "--plan", plan, "--json")
    assert simulated.code == 0, simulated.err


def test_figures_for_machines(muxrt: CommandLine, plan: Path) -> None:
    data = json.loads(muxrt("plan", plan, "--json", "--time-limit", 600).out)
    assert data["offered_rps"] == pytest.approx(28.8) and data["gpus_used"] == data["gpus"] == 8
    (apart,) = (model["model"] for model in data["apart"]["models"])
    used = [unit["mesh"]["gpus"] for unit in data["apart"]["units"]]
    used += [unit["unit"]["mesh"]["gpus"] for unit in data["units"]]
    assert sorted(gpu for gpus in used for gpu in gpus) == sorted(
        {g for gpus in used for g in gpus}
    )
    assert data["reasons"][apart].startswith("apart: ") and data["notes"] == []
    assert 0 < data["simulated_goodput_rps"] <= 1.1 * data["offered_rps"]


def test_without_mixing_everybody_is_colocated(muxrt: CommandLine, plan: Path) -> None:
    data = json.loads(muxrt("plan", plan, "--json", "--no-mix").out)
    assert data["apart"] == {"models": [], "units": []} and not data["reasons"]


def test_an_objective_leaves_gpus_idle(muxrt: CommandLine, plan: Path) -> None:
    quiet = plan.with_name("calm.yaml")
    quiet.write_text(TRAFFIC.replace("rate_rps: 16", "rate_rps: 4").replace("12.8", "3"))
    most, least = (
        json.loads(muxrt("plan", plan, quiet, "--json", *words).out)
        for words in ((), ("--objective", "gpu"))
    )
    assert least["gpus_used"] < most["gpus_used"] == 8
    assert least["goodput_rps"] >= 0.9 * least["offered_rps"]
    said = muxrt("plan", plan, quiet, "--objective", "gpu").out
    assert f"{least['gpus_used']} of 8 GPUs" in said


def test_the_simulator_knows_the_network_of_the_plan(plan: Path) -> None:
    """It took 200 Gb/s between nodes, whatever the plan said."""
    kept = []
    for network in ("25e9", "0.5e9"):
        nodes = f"gpus: 1, count: 16}}], network_bytes_per_s: {network}"
        plan.write_text(PLAN.replace("gpus: 8}]", nodes))
        asked = load_problem(plan, None, None, None)
        if not kept:
            placement = to_placement(asked.problem, distserve(asked.problem))
        kept.append(Simulator(asked).placement(placement).goodput_rps)
    assert kept[1] < 0.8 * kept[0]


def test_the_simulator_draws_a_model_s_own_joint_lengths(plan: Path) -> None:
    """It had the default lengths instead."""
    seen = "joint: {seen: [{prompt_tokens: 1900, output_tokens: 2}]}"
    begin, end = TRAFFIC.index("prompt: {mean_tokens: 1100"), TRAFFIC.rindex(", slo:")
    (plan.parent / "traffic.yaml").write_text(TRAFFIC[:begin] + seen + TRAFFIC[end:])
    traffic = _steady(load_problem(plan, None, None, None))
    found = {a.output_tokens for a in arrivals(traffic) if a.model == "code"}
    assert found == {2}


def test_a_comparison_of_strategies_has_both_kinds(
    muxrt: CommandLine, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "placement.yaml"
    assert muxrt("plan", plan, "--strategy", "spatial", "--out", out).code == 0
    answer = muxrt(
        "simulate", out, tmp_path / "traffic.yaml", "--plan", plan, "--compare", "strategy=auto",
        "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "-decode-0" in answer.out
