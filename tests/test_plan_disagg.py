"""`muxrt plan --strategy distserve|splitwise`: from files to units with roles."""

import json
from collections import Counter
from pathlib import Path

import pytest
from command_line import CommandLine
from planner_world import demand, problem

from muxrt.config.cluster import KINDS, Cluster, NodeGroup
from muxrt.config.load import load
from muxrt.config.placement import ModelSpec, Placement
from muxrt.config.serve import ServeConfig
from muxrt.core import Batch, Phase, Work
from muxrt.cost.model import CostModel
from muxrt.cost.roofline import Efficiency
from muxrt.engine.executor import Done
from muxrt.engine.unit import Unit
from muxrt.errors import ConfigError
from muxrt.planner.phase_catalog import catalog_of, kv_tokens
from muxrt.planner.phase_plan import Objective, PhasePlan, to_placement
from muxrt.planner.phases import saturating_tokens
from muxrt.planner.strategies.distserve import Affinity, Options, distserve
from muxrt.planner.strategies.splitwise import splitwise
from muxrt.planner.workload import Demand, Engine, Problem
from muxrt.sim.group import Simulation, groups
from muxrt.sim.setting import Setting
from muxrt.workload.arrivals import Arrival

PLANS = Path(__file__).parent.parent / "configs" / "plans"


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def chat(rate_rps: float = 20, *, ttft_s: float = 0.4) -> Demand:
    return demand(
        "chat", rate_rps, "llama2-13b", prompt=700, output=200, ttft_s=ttft_s, max_tokens=4096
    )


def two_kinds() -> Problem:
    """Machines of A100 and of H100."""
    nodes = (
        NodeGroup(gpu="a100-80g", gpus=8, count=4),
        NodeGroup(gpu="h100-80g", gpus=8, count=4),
    )
    return Problem(Cluster(nodes=nodes), [chat()], CostModel(), Engine())


def check(placement: Placement, gpus_per_node: int) -> None:
    """No GPU twice, no stage across nodes, and both roles of every model."""
    used: Counter[tuple[int | None, int]] = Counter()
    for unit in placement.units:
        gpus, mesh = unit.mesh.gpus or (), unit.mesh
        per_stage = len(gpus) // mesh.pp
        nodes = mesh.nodes or (mesh.node,)
        for index, gpu in enumerate(gpus):
            used[nodes[index // per_stage], gpu] += 1
            assert gpu < gpus_per_node
    assert set(used.values()) == {1}
    roles = {(part.name, part.role) for unit in placement.units for part in unit.models}
    for name, _ in roles:
        assert {(name, "prefill"), (name, "decode")} <= roles


def seen(found: PhasePlan) -> float:
    return min(model.seen.attainment for model in found.models)


@pytest.mark.parametrize(
    "options",
    [Options(), Options(affinity=Affinity.LOW), Options(affinity=Affinity.HIGH, most_stages=2)],
    ids=["auto", "low", "stages"],
)
def test_models_get_instances_of_both_phases(options: Options) -> None:
    given = problem([chat(), demand("code", 4, "llama-30b", prompt=1000, output=30)], 8, 4)
    found = distserve(given, options)
    placement = to_placement(given, found)
    check(placement, 8)
    assert seen(found) >= 0.9 and found.num_gpus <= 32
    assert sum(len(unit.mesh.gpus or ()) for unit in placement.units) == found.num_gpus
    pps = {unit.mesh.pp for unit in placement.units}
    assert found.is_simulated_only == (max(pps) > 1)
    assert max(pps) <= options.most_stages


def test_low_affinity_keeps_both_phases_on_one_node() -> None:
    given = problem([chat(60)], 8, 4)
    found = distserve(given, Options(affinity=Affinity.LOW))
    (model,) = found.models
    assert model.copies > 1
    placement = to_placement(given, found)
    check(placement, 8)
    for role in ("prefill", "decode"):
        nodes = Counter(u.mesh.node for u in placement.units if u.models[0].role == role)
        assert set(nodes) == {u.mesh.node for u in placement.units}, nodes


def test_stages_of_a_cell_lie_together() -> None:
    given = problem([chat(10)], 2, 4)
    found = distserve(given, Options(affinity=Affinity.LOW, most_stages=2))
    check(to_placement(given, found), 2)


def test_more_traffic_takes_more_gpus() -> None:
    low = Options(affinity=Affinity.LOW)
    few, many = (distserve(problem([chat(rate)], 4, 8), low).num_gpus for rate in (5, 40))
    assert 2 <= few < many


def test_memory_of_an_instance_with_stages() -> None:
    given = problem([chat()], 8, 1)
    whole, halves = (kv_tokens(given, "chat", 0, 1, pp) for pp in (1, 2))
    assert halves > 2 * whole > 0  # weights are halved, and so is the KV of a token
    assert catalog_of(given, "chat", 0, inside=True)(1, 2) is None
    slow = catalog_of(given, "chat", 0, inside=False)(1, 1)
    fast = catalog_of(given, "chat", 0, inside=True)(1, 1)
    assert slow is not None and fast is not None
    # 25e9 bytes/s for 8 GPUs against 300e9 for each.
    assert slow.link.token_s == pytest.approx(96 * fast.link.token_s)


def test_who_finds_no_room_is_told_what_would_do() -> None:
    with pytest.raises(ConfigError, match="chat: found no room .* the least is .* GPUs, found 8"):
        distserve(problem([chat(200)], 8, 1))
    with pytest.raises(ConfigError, match="no instances keep them"):
        distserve(problem([chat(ttft_s=0.001)], 8, 1))
    with pytest.raises(ConfigError, match="the least is .* GPUs, found 8"):
        splitwise(problem([chat(400)], 8, 1))
    with pytest.raises(ConfigError, match="no instances keep them"):
        splitwise(problem([chat(ttft_s=0.001)], 8, 4))


def test_the_papers_simulator_sees_no_network() -> None:
    slow = Cluster(nodes=(NodeGroup(gpu="a100-80g", gpus=8, count=4),), network_bytes_per_s=5e9)
    given = Problem(slow, [chat()], CostModel(), Engine())
    theirs = distserve(given, Options(affinity=Affinity.HIGH, compat=True))
    assert theirs.num_gpus <= 32
    with pytest.raises(ConfigError, match="no instances keep them|the least is"):
        distserve(given, Options(affinity=Affinity.HIGH))


def test_pools_are_whole_machines_of_one_kind_each() -> None:
    given = two_kinds()
    found = splitwise(given)
    (model,) = found.models
    assert model.split.prefill.tp == model.split.decode.tp == 8
    check(to_placement(given, found), 8)
    assert seen(found) >= 0.9


def test_the_objective_decides_the_kind() -> None:
    by_gpu, by_watt = (
        splitwise(two_kinds(), Options(objective=one)) for one in (Objective.GPU, Objective.WATT)
    )
    assert by_gpu.num_gpus <= by_watt.num_gpus
    a100, h100 = (Objective.WATT.of(KINDS[name]) for name in ("a100-80g", "h100-80g"))
    assert (a100, h100) == (400, 700)
    with pytest.raises(
        ConfigError, match="a100-80g has no price_per_hour, which goodput per dolla"
    ):
        splitwise(two_kinds(), Options(objective=Objective.DOLLAR))


@pytest.mark.parametrize(
    ("plan", "strategy"), [("opt", "distserve"), ("bloom", "splitwise")], ids=str
)
def test_shipped_plans(muxrt: CommandLine, tmp_path: Path, plan: str, strategy: str) -> None:
    out = tmp_path / "placement.yaml"
    answer = muxrt("plan", PLANS / f"{plan}.yaml", "--strategy", strategy, "--out", out)
    assert answer.code == 0, answer.err
    assert "requests/s within SLO" in answer.out and "x decode on tp" in answer.out
    config = load(out)
    check(config.placement, 8)
    assert config.routing.policy == strategy
    for unit in config.units:
        expected = unit.models[0].expected
        assert expected is not None and expected.attainment >= 0.9
    # Neither can go on with it: nobody hands sequences over yet.
    for verb in ("serve", "simulate"):
        more = ["--check"] if verb == "serve" else [PLANS.parent / "workloads" / "poisson.yaml"]
        refused = muxrt(verb, out, *more)
        assert refused.code == 2 and len(refused.err.splitlines()) == 1


def test_figures_for_machines(muxrt: CommandLine) -> None:
    answer = muxrt(
        "plan", PLANS / "opt.yaml", "--strategy", "distserve", "--json", "--max-pp", 2,
        "--affinity", "low",
    )  # fmt: skip
    data = json.loads(answer.out)
    assert data["gpus"] == 32 and data["gpus_used"] == sum(
        len(unit["mesh"]["gpus"]) for unit in data["units"]
    )
    assert data["simulated_only"] == any(unit["mesh"].get("pp", 1) > 1 for unit in data["units"])
    assert [model["model"] for model in data["models"]] == ["chat", "code"]
    assert data["goodput_rps"] <= data["offered_rps"] == 15


@pytest.mark.parametrize(
    "words",
    [
        ("--strategy", "distserve", "--explain"),
        ("--strategy", "distserve", "--judge", "simulator"),
        ("--strategy", "splitwise", "--max-pp", "2"),
        ("--strategy", "splitwise", "--compat"),
        ("--compat",),
        ("--strategy", "spatial", "--objective", "watt"),
        ("--strategy", "distserve", "--no-mix"),
    ],
    ids=" ".join,
)
def test_what_does_not_go_together_is_misuse(muxrt: CommandLine, words: tuple[str, ...]) -> None:
    assert muxrt("plan", PLANS / "opt.yaml", *words).code == 2


def profiled(strategy: str) -> tuple[Problem, PhasePlan, Placement]:
    """A model whose prefills gain up to long batches, on machines of 8."""
    plan = {"distserve": distserve, "splitwise": splitwise}[strategy]
    given = problem([chat(60)], 8, 4)
    found = plan(given)
    return given, found, to_placement(given, found)


@pytest.mark.parametrize("strategy", ["distserve", "splitwise"])
def test_batches_of_prompts_are_as_long_as_what_saturates(strategy: str) -> None:
    given, found, placement = profiled(strategy)
    (model,) = found.models
    for side, role in ((model.split.prefill, "prefill"), (model.split.decode, "decode")):
        steps = given.steps("chat", model.prefill_pool, side.tp, 1.0)
        saturating = saturating_tokens(steps.prefill_s, 4096)
        units = [unit for unit in placement.units if unit.models[0].role == role]
        assert {unit.scheduling.prefill_tokens for unit in units} == {saturating}


def test_prompts_are_prefilled_in_batches_near_what_saturates() -> None:
    given, _, placement = profiled("distserve")
    most = placement.units[0].scheduling.prefill_tokens
    config = ServeConfig(
        models=(ModelSpec(name="chat", preset="llama2-13b"),), units=placement.units
    )
    shapes = {"chat": given.demands["chat"].shape}
    (group,) = groups(config.units, config.models)
    simulation = Simulation(group, Setting(shapes, given.cost))
    sizes: list[int] = []
    for unit in simulation.units.values():
        watch(unit.unit, sizes)
    simulation.run([(index, Arrival(0.0, "chat", 90, 2)) for index in range(400)])
    assert max(sizes) <= most
    # All but the first two of a unit, which did not wait for more prompts, and its last.
    num_prefill = sum(unit.models[0].role == "prefill" for unit in placement.units)
    full = [size for size in sizes if size > most - 90]
    assert len(full) >= max(1, len(sizes) - 3 * num_prefill)


def watch(unit: Unit, sizes: list[int]) -> None:
    """Note the tokens of every prefill that `unit` launches."""
    launch = unit.executor.launch

    def noting(work: Work, done: Done) -> None:
        if isinstance(work, Batch) and work.phase is Phase.PREFILL:
            sizes.append(work.num_tokens)
        launch(work, done)

    unit.executor.launch = noting  # type: ignore[method-assign]


def test_splitwise_caps_batches_of_prompts() -> None:
    # Launches from Python: they take so long that prefills gain beyond 2,048 tokens.
    slow = CostModel(efficiency=Efficiency(layer_s=1.5e-3))
    nodes = (NodeGroup(gpu="a100-80g", gpus=8, count=4),)
    lengths = {"prompt": 700, "output": 50, "max_tokens": 4096}
    model = demand("chat", 1, "llama2-7b", ttft_s=4.0, tpot_s=0.2, **lengths)
    given = Problem(Cluster(nodes=nodes), [model], slow, Engine())
    longest = {}
    for name, plan in (("distserve", distserve), ("splitwise", splitwise)):
        placement = to_placement(given, plan(given))
        longest[name] = max(unit.scheduling.prefill_tokens for unit in placement.units)
    assert longest["distserve"] > 2048 == longest["splitwise"]
