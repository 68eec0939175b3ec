"""A CPU machine is planned by its cores, from a profile, and what comes out is served."""

import json
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command_line import CommandLine
from real_server import real_server
from tiny_folder import write_model

from muxrt.config.cluster import GpuKind
from muxrt.config.load import load
from muxrt.config.model import load_shape
from muxrt.config.placement import UnitSpec
from muxrt.config.profile import ProfiledEngine, ProfiledModel, ProfileFile, dump_profile, sizes_of
from muxrt.config.serve import Endpoint
from muxrt.core import Phase
from muxrt.cost.grid import levels
from muxrt.cost.profile import Cell, table_of
from muxrt.planner.workload import Pool

MACHINE = sorted(os.sched_getaffinity(0))
CONFIGS = Path(__file__).parent.parent / "configs"
PLAN = """\
cluster: {nodes: [{gpu: cpu-test, gpus: 1}]}
profiles: [profile.yaml]
models:
  - {name: hot, path: hot}
  - {name: cold, path: cold, max_model_len: 128}
workload: traffic.yaml
"""
TRAFFIC = """\
power_law: {alpha: 1.0, rate_rps: 4}
prompt: {mean_tokens: 40, cv: 0.5, max_tokens: 100}
output: {mean_tokens: 20, cv: 0.5, max_tokens: 60}
slo: {ttft_s: 1, tpot_s: 0.1}
"""


def kind(cores: int, memory_bytes: int = 1 << 31) -> GpuKind:
    return GpuKind(
        name="cpu-test",
        device="cpu",
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=1e10,
        flops=1e11,
        sms=cores,
        link_bytes_per_s=1e10,
    )


def write(
    folder: Path, cores: int, plan: str = PLAN, tps: Mapping[int, float] | None = None
) -> Path:
    """Models, a made-up profile of lanes of half and all of the cores, and a plan of both.

    `tps`: what steps over so many ranks take of those on one.
    """
    for seed, name in enumerate(("hot", "cold")):
        if not (folder / name).exists():
            write_model(folder / name, seed)
    shape = load_shape(folder / "hot")
    passes = [one for level in levels(256, 10**5)[:2] for one in level]
    # A lane of half the cores takes 1.5 times as long.
    slow = {50: 1.5, 100: 1.0} if cores > 1 else {100: 1.0}
    times = [
        (one, tp, pct, part * factor * (1e-3 + 1e-5 * one.tokens + 1e-4 * one.batch))
        for one in passes
        for tp, part in (tps or {1: 1.0}).items()
        for pct, factor in slow.items()
    ]
    cells = [
        Cell("tiny", tp, pct, one.batch, one.seq_len, *_times(one.phase, time_s))
        for one, tp, pct, time_s in times
    ]
    # A prefill and a decode of the same sizes are one row.
    rows: dict[tuple[int, int, int, int], Cell] = {}
    for cell in cells:
        key = (cell.tp, cell.sm_pct, cell.batch, cell.seq_len)
        other = rows.get(key)
        rows[key] = cell if other is None else _joined(cell, other)
    file = ProfileFile(
        title="made up",
        source="a test",
        licence="none",
        gpu="cpu-test",
        table="profile.csv",
        models=(
            ProfiledModel(
                name="tiny",
                sizes=sizes_of(shape),
                weights="float32",
                dtype="float32",
                kv_dtype="float32",
            ),
        ),
        kind=kind(cores),
        engine=ProfiledEngine(interference=0.25, control_s=1e-5),
    )
    (folder / "profile.csv").write_text(table_of(rows.values()))
    (folder / "profile.yaml").write_text(dump_profile(file))
    (folder / "traffic.yaml").write_text(TRAFFIC)
    (folder / "plan.yaml").write_text(plan)
    return folder / "plan.yaml"


def _times(phase: Phase, time_s: float) -> tuple[float | None, float | None]:
    return (time_s, None) if phase is Phase.PREFILL else (None, time_s)


def _joined(one: Cell, other: Cell) -> Cell:
    key = (one.model, one.tp, one.sm_pct, one.batch, one.seq_len)
    return Cell(*key, one.prefill_s or other.prefill_s, one.decode_s or other.decode_s)


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def units(answer_json: str) -> list[UnitSpec]:
    return [msgspec.convert(u["unit"], UnitSpec) for u in json.loads(answer_json)["units"]]


def test_a_plan_for_this_machine_is_served(muxrt: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "placement.yaml"
    planned = muxrt("plan", write(tmp_path, len(MACHINE)), "--out", out)
    assert planned.code == 0, planned.err
    assert "4.0 of 4.0 requests/s within SLO" in planned.out
    assert muxrt("serve", out, "--check").code == 0
    config = msgspec.structs.replace(load(out), endpoint=Endpoint(port=0))
    with real_server(config) as server:
        for model in ("hot", "cold"):
            assert len(complete(server.url, model)["choices"]) == 1
    (unit,) = config.units
    assert (unit.mesh.device, unit.lanes.kind) == ("cpu", "cores")
    assert sum(unit.lanes.split or ()) == len(MACHINE)


def test_a_placement_on_a_cpu_is_simulated(muxrt: CommandLine, tmp_path: Path) -> None:
    """Step times by hand: one lane of all cores, a request at a time."""
    plan = write(tmp_path, 1)
    (tmp_path / "traffic.yaml").write_text(
        "models: [{name: hot, rate_rps: 0.5}, {name: cold, rate_rps: 0.001}]\n"
        "prompt: {mean_tokens: 40}\noutput: {mean_tokens: 20}\nslo: {ttft_s: 1, tpot_s: 0.1}\n"
    )
    out, traffic = tmp_path / "placement.yaml", tmp_path / "traffic.yaml"
    assert muxrt("plan", plan, "--out", out).code == 0
    answer = muxrt(
        "simulate", out, traffic, "--profile", tmp_path / "profile.yaml", "--duration", 60,
        "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    (row,) = [row for row in json.loads(answer.out)["rows"] if row["model"] == "hot"]
    # A decode: 1 ms + 0.1 ms a sequence + 10 us a token of about 50, and 10 us of control.
    assert row["tpot_s"]["p50"] == pytest.approx(1.6e-3, rel=0.05)
    assert row["ttft_s"]["p50"] == pytest.approx(1.5e-3, rel=0.05)


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        ("{split: [4, 4]}", "found lanes.split [4, 4], expected cores of one lane or more, 4 to"),
        ("{kind: green}", "found lanes of kind green, expected cores or processes"),
    ],
)
def test_lanes_that_cannot_be_simulated_are_refused(
    lanes: str, expected: str, muxrt: CommandLine, tmp_path: Path
) -> None:
    write(tmp_path, 4)
    placement = tmp_path / "placement.yaml"
    placement.write_text(
        "models: [{name: hot, path: hot}]\nunits:\n- name: u\n  models: [{name: hot}]\n"
        "  memory: {kv_bytes: 8MiB}\n  mesh: {device: cpu, kind: cpu-test, node: 0, gpus: [0]}\n"
        f"  lanes: {lanes}\n"
    )
    (tmp_path / "traffic.yaml").write_text(
        "models: [{name: hot, rate_rps: 1}]\nprompt: {mean_tokens: 40}\noutput: {mean_tokens: 20}\n"
    )
    profile = tmp_path / "profile.yaml"
    answer = muxrt("simulate", placement, tmp_path / "traffic.yaml", "--profile", profile)
    assert answer.code == 2 and expected in answer.err and answer.err.count("\n") == 1


def complete(url: str, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": "the quick", "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_sets_of_cores_are_units_of_their_own(muxrt: CommandLine, tmp_path: Path) -> None:
    plan = write(tmp_path, 4, PLAN.replace("gpus: 1", "gpus: 2"))
    answer = muxrt("plan", plan, "--strategy", "spatial", "--json")
    assert answer.code == 0, answer.err
    assert sorted(unit.mesh.cores or () for unit in units(answer.out)) == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    ]
    assert {data["times_from"] for data in json.loads(answer.out)["units"]} == {"made up"}


def test_no_mesh_is_wider_than_a_set_of_cores(tmp_path: Path) -> None:
    from muxrt.cli.plan_input import load_problem
    from muxrt.planner.meshes import mesh_groups

    plan = write(tmp_path, 2, PLAN.replace("gpus: 1", "gpus: 2"))
    problem = load_problem(plan, None, None, None).problem
    assert problem.tps("hot", 0) == (1,)
    assert mesh_groups(problem, 100) == [{(0, 1): 2}]


QUICK = TRAFFIC.replace("tpot_s: 0.1", "tpot_s: 0.0013")  # a step takes 1.6 ms on one rank
TWO_SETS = PLAN.replace("gpus: 1", "gpus: 2")


@pytest.mark.parametrize(("part", "traffic", "ranks"), [(0.5, QUICK, (0, 1)), (3.0, TRAFFIC, (0,))])
def test_a_model_goes_over_two_sets_of_cores_where_that_was_measured_to_be_quicker(
    part: float, traffic: str, ranks: tuple[int, ...], muxrt: CommandLine, tmp_path: Path
) -> None:
    plan = write(tmp_path, 1, TWO_SETS, {1: 1.0, 2: part})
    (tmp_path / "traffic.yaml").write_text(traffic)
    out = tmp_path / "placement.yaml"
    answer = muxrt("plan", plan, "--out", out)
    assert answer.code == 0, answer.err
    meshes = [unit.mesh for unit in load(out).units]
    assert {len(mesh.gpus or ()) for mesh in meshes} == {len(ranks)}
    if len(ranks) > 1:
        assert [(mesh.gpus, mesh.cores) for mesh in meshes] == [(ranks, (0, 1))]
        assert [unit.lanes.split for unit in load(out).units] == [(1,)]
        if {0, 1} <= set(MACHINE):
            checked = muxrt("serve", out, "--check", "--json")
            assert checked.code == 0, checked.err
            assert [unit["ranks"] for unit in json.loads(checked.out)["units"]] == [2]


def test_a_rank_holds_its_part_of_the_weights(tmp_path: Path) -> None:
    from muxrt.cli.plan_input import load_problem

    problem = load_problem(write(tmp_path, 1, TWO_SETS, {1: 1.0, 2: 0.5}), None, None, None).problem
    assert problem.tps("hot", 0) == (1, 2)
    one, two = problem.bytes("hot", 1), problem.bytes("hot", 2)
    shape = load_shape(tmp_path / "hot")
    assert two.weights == one.weights / 2
    assert two.kv_per_token * shape.num_kv_heads == one.kv_per_token * -(-shape.num_kv_heads // 2)


def test_memory_is_counted_in_the_models_own_dtypes(muxrt: CommandLine, tmp_path: Path) -> None:
    plan = write(tmp_path, 2)
    (data,) = json.loads(muxrt("plan", plan, "--json").out)["units"]
    shape = load_shape(tmp_path / "hot")
    assert shape.dtype == "float32" and shape.tied_embeddings
    # By hand: table 320 x 32, final norm 32; per layer q, o 32 x 32, k, v 32 x 16, 3 x 32 x 48,
    # two norms of 32.
    params = 320 * 32 + 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 64)
    assert data["weights_bytes"] == pytest.approx(dict.fromkeys(("hot", "cold"), 4 * params))


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(1, (None,)), (2, (None, 50)), (3, (None, 33, 67)), (8, (None, 25, 50, 75))],
)
def test_lanes_that_are_tried_are_whole_cores(cores: int, expected: tuple[int | None, ...]) -> None:
    found = Pool(0, kind(cores), 1, 1).prefill_pcts
    assert found == expected
    assert all(0 < round(cores * pct / 100) < cores for pct in found if pct)


BROKEN = {
    "two machines": (
        "gpus: 1}",
        "gpus: 1, count: 2}",
        "cluster.nodes: found a CPU among several nodes, expected one node",
    ),
    "a machine with GPUs beside it": (
        "gpus: 1}]",
        "gpus: 1}, {gpu: a100-80g}]",
        "cluster.nodes: found a CPU among several nodes",
    ),
    "other dtypes than were measured": (
        "path: hot}",
        "path: hot, weights: int8}",
        "hot: found weights, dtype and kv_dtype int8, float32, float32, but its times were measured"
        " with float32, float32, float32: profile it as it is",
    ),
    "a kind that no profile has": (
        "gpu: cpu-test",
        "gpu: cpu-toast",
        "cluster.nodes[0].gpu: found 'cpu-toast', expected one of",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_planned_gets_one_error(
    case: str, muxrt: CommandLine, tmp_path: Path
) -> None:
    old, new, expected = BROKEN[case]
    assert PLAN.count(old) == 1
    answer = muxrt("plan", write(tmp_path, 2, PLAN.replace(old, new)))
    assert answer.code == 2 and expected in answer.err and answer.err.count("\n") == 1


@pytest.mark.parametrize("strategy", ["muxserve", "temporal"])
def test_strategies_that_share_sms_by_per_cent_say_so(
    strategy: str, muxrt: CommandLine, tmp_path: Path
) -> None:
    answer = muxrt("plan", write(tmp_path, 2), "--strategy", strategy)
    assert answer.code == 2 and "expected strategy auto or spatial" in answer.err


def test_what_the_profile_measured_of_the_engine_counts_unless_the_plan_says_otherwise(
    tmp_path: Path,
) -> None:
    from muxrt.cli.plan_input import load_problem

    engine = load_problem(write(tmp_path, 2), None, None, None).problem.engine
    assert (engine.interference, engine.control_s) == (0.25, 1e-5)
    assert engine.memory.prefill_tokens == 512  # what `muxrt serve` has
    stated = PLAN + "engine: {interference: 0.0, prefill_tokens: 256}\n"
    engine = load_problem(write(tmp_path, 2, stated), None, None, None).problem.engine
    assert (engine.interference, engine.control_s) == (0.0, 1e-5)
    assert engine.memory.prefill_tokens == 256


def test_a_lane_of_a_cpu_keeps_its_cores(tmp_path: Path) -> None:
    """Alone a GPU's batch has all SMs; a CPU's has its lane, and its batch is dealt to both."""
    from muxrt.cli.plan_input import load_problem
    from muxrt.planner.station import ALONE_S, BATCHES, BESIDE_S
    from muxrt.planner.tables import Tables

    problem = load_problem(write(tmp_path, 2), None, None, None).problem
    tables = Tables(problem)
    row = tables.row("hot", (0, 1), 50)
    half, context = problem.steps("hot", 0, 1, 0.5), problem.demands["hot"].context
    by_batch = dict(zip(BATCHES.tolist(), tables.times.alone_s[row].tolist(), strict=True))
    assert by_batch[1.0] == pytest.approx(half.decode_s(1, context) + 1e-5)
    assert by_batch[8.0] == pytest.approx(1.25 * half.decode_s(4, 4 * context) + 8e-5)
    prefill = tables.times.prefill[row, 0]
    assert prefill[BESIDE_S] == pytest.approx(1.25 * prefill[ALONE_S])


def test_a_model_with_scaled_rope_can_be_planned(muxrt: CommandLine, tmp_path: Path) -> None:
    """Its shape holds a dict, and shapes are keys: the plan ended in a TypeError."""
    folder = CONFIGS / "demo_models" / "pydoc-m"
    assert load_shape(folder).rope_scaling is not None
    (tmp_path / "traffic.yaml").write_text(TRAFFIC)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "cluster: {nodes: [{gpu: l4-24g, gpus: 1}]}\nworkload: traffic.yaml\n"
        f"models: [{{name: m, path: {folder}}}]\n"
    )
    assert muxrt("plan", plan).code == 0
