"""What work costs on lanes: batches of every phase, shares, neighbours that come and go."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from sim_world import GB, burst, config, setting, steps, unit

from muxrt.config.cluster import GpuKind
from muxrt.config.placement import Lanes, Mesh, UnitModel, UnitSpec
from muxrt.config.plan import EngineFacts
from muxrt.core import Batch, BatchEntry, Copy, CopyKind, Layers, Phase, Result, Work
from muxrt.cost.batch import BatchWork, batch_s
from muxrt.errors import ConfigError
from muxrt.sim.copies import HOST_LINK_BYTES_PER_S, CopyLane
from muxrt.sim.executor import MeshExecutor
from muxrt.sim.links import Links
from muxrt.sim.loop import EventLoop
from muxrt.sim.mesh import MeshCost, Runner
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import simulate

PREFILL, DECODE = Runner("a", Phase.PREFILL), Runner("a", Phase.DECODE)
OTHER = Runner("b", Phase.DECODE)
OWN = (UnitModel(name="a", sm_pct=(80, 30)), UnitModel(name="b", sm_pct=(90, 40)))


def batch(phase: Phase, *entries: tuple[int, int], lane: int = 0, number: int = 0) -> Batch:
    """Entries are (start, tokens); none of them samples."""
    made = tuple(BatchEntry(slot, *entry, False) for slot, entry in enumerate(entries))
    return Batch(number, lane, "a", phase, made)


def mesh_cost(spec: UnitSpec, facts: EngineFacts | None = None) -> MeshCost:
    return MeshCost(spec, setting("a", "b", facts=facts))


def test_a_prefill_in_chunks_attends_to_as_much_as_whole() -> None:
    whole = BatchWork.of(batch(Phase.PREFILL, (0, 1000)))
    first, second = (BatchWork.of(batch(Phase.PREFILL, part)) for part in [(0, 600), (600, 400)])
    assert whole == BatchWork(prefill_tokens=1000, squares=1000**2)
    assert first.squares + second.squares == whole.squares


def test_a_part_of_a_pass_takes_its_share_of_the_layers() -> None:
    whole = batch(Phase.PREFILL, (0, 1000))
    parts = [
        msgspec.structs.replace(whole, layers=Layers(begin, end, 8))
        for begin, end in ((0, 5), (5, 8))
    ]
    cost = mesh_cost(unit("a"), EngineFacts(control_step_s=0.002))
    seconds = [cost.batch_s("a", BatchWork.of(part), 1.0, is_alone=True) for part in parts]
    whole_s = cost.batch_s("a", BatchWork.of(whole), 1.0, is_alone=True)
    assert seconds == pytest.approx([whole_s * 5 / 8, whole_s * 3 / 8])


def test_a_decode_step_attends_to_all_before_it_and_itself() -> None:
    assert BatchWork.of(batch(Phase.DECODE, (10, 1), (20, 1))) == BatchWork(decodes=2, context=32)


def test_a_mixed_batch_reads_the_weights_once() -> None:
    chunk, decodes = (0, 500), [(300, 1)] * 8
    mixed = batch_s(steps(), BatchWork.of(batch(Phase.MIXED, chunk, *decodes)))
    prefill = batch_s(steps(), BatchWork.of(batch(Phase.PREFILL, chunk)))
    decode = batch_s(steps(), BatchWork.of(batch(Phase.DECODE, *decodes)))
    assert max(prefill, decode) < mixed < prefill + decode


@pytest.mark.parametrize(
    ("lanes", "parts", "runners", "shares"),
    [
        (Lanes(kind="stream"), (), [PREFILL], [1.0]),
        (Lanes(kind="stream"), (), [PREFILL, OTHER], [0.5, 0.5]),
        (Lanes(kind="green", sm_pct=(30, 70)), (), [PREFILL], [1.0]),
        (Lanes(kind="green", sm_pct=(30, 70)), (), [DECODE], [1.0]),
        (Lanes(kind="green", sm_pct=(30, 70)), (), [DECODE, PREFILL], [0.7, 0.3]),
        (Lanes(kind="green", sm_pct=(30, 70)), (), [PREFILL, DECODE, OTHER], [0.3, 0.35, 0.35]),
        (Lanes(kind="green", sm_pct=(30, 70)), (), [DECODE, OTHER], [0.5, 0.5]),
        (Lanes(kind="green", sm_pct=(60, 40)), OWN, [DECODE, OTHER], [0.3, 0.4]),
        (Lanes(kind="green", sm_pct=(60, 40)), OWN, [DECODE], [1.0]),
        (Lanes(kind="mps", sm_pct=(100, 40)), (), [DECODE], [0.4]),
        (Lanes(kind="mps", sm_pct=(100, 40)), OWN, [PREFILL], [0.8]),
        (Lanes(kind="mps", sm_pct=(100, 40)), OWN, [PREFILL, OTHER], [0.8 / 1.2, 0.4 / 1.2]),
    ],
)
def test_shares(
    lanes: Lanes, parts: Sequence[UnitModel], runners: list[Runner], shares: list[float]
) -> None:
    cost = mesh_cost(unit("a", "b", lanes=lanes, parts=parts))
    assert cost.shares(runners) == pytest.approx(shares)


def test_what_runs_beside_others_pays_for_it_and_control_is_never_shared() -> None:
    cost = mesh_cost(unit("a"), EngineFacts(control_s=0.001, interference=0.2))
    work = BatchWork(decodes=4, context=400)
    step_s = steps(0.5).decode_s(4, 400)
    assert cost.batch_s("a", work, 0.5, is_alone=True) == pytest.approx(step_s + 0.004)
    assert cost.batch_s("a", work, 0.5, is_alone=False) == pytest.approx(1.2 * step_s + 0.004)
    own = replace(setting("a", "b"), control_s={"a": 0.002})
    cost = MeshCost(unit("a", "b"), own)
    assert cost.batch_s("a", work, 0.5, is_alone=True) == pytest.approx(step_s + 0.008)
    assert cost.batch_s("b", work, 0.5, is_alone=True) == pytest.approx(step_s)


def test_each_phase_pays_its_own_interference_where_that_is_known() -> None:
    facts = EngineFacts(interference=0.2, prefill_interference=0.5, decode_interference=0.0)
    cost = mesh_cost(unit("a"), facts)
    prefill, decode = BatchWork(100, 100**2), BatchWork(decodes=4, context=400)
    alone, beside = (
        [cost.batch_s("a", work, 0.5, is_alone) for work in (prefill, decode)]
        for is_alone in (True, False)
    )
    assert beside == pytest.approx([1.5 * alone[0], alone[1]])
    assert cost.decode_price("a", 0.5, is_alone=False).slower == 1.0


CPU = GpuKind(
    name="cpu-2c",
    device="cpu",
    memory_bytes=16 * GB,
    bandwidth_bytes_per_s=30 * GB,
    flops=300 * GB,
    sms=2,
    link_bytes_per_s=GB,
)


def cpu_cost(split: tuple[int, ...], world: Setting) -> MeshCost:
    spec = UnitSpec(
        name="u",
        models=unit(*world.shapes).models,
        memory=unit("a").memory,
        mesh=Mesh(kind="cpu-2c", gpus=(0,)),
        lanes=Lanes(split=split),
    )
    return MeshCost(spec, world)


def test_a_lane_of_a_cpu_has_its_own_cores_whatever_runs_beside_it() -> None:
    eight = replace(setting("a", "b"), gpus={"cpu-2c": msgspec.structs.replace(CPU, sms=8)})
    spec = UnitSpec(
        name="u",
        models=unit("a", "b").models,
        memory=unit("a").memory,
        mesh=Mesh(kind="cpu-2c", gpus=(0,)),
        lanes=Lanes(split=(6, 2)),
    )
    cost = MeshCost(spec, eight)
    batches = [
        Batch(0, lane, model, Phase.DECODE, (BatchEntry(0, 0, 1, True),))
        for lane, model in ((1, "a"), (0, "b"))
    ]
    assert cost.shares([cost.runner(batch) for batch in batches]) == [0.25, 0.75]
    assert cost.shares([cost.runner(batches[0])]) == [0.25]
    # Folding knows no lanes: such units are simulated step by step.
    asked = [*burst("a", 3, output=50), *burst("b", 2, at_s=1.0, output=50)]
    folded, plain = (
        simulate(config(spec), replace(eight, fold=fold), asked).served for fold in (True, False)
    )
    assert folded == plain


@pytest.mark.parametrize(
    ("split", "sequences", "charged"),
    [
        ((2,), (4,), [0.014]),  # the only lane has every core
        ((1,), (4,), [0.0]),  # a core is free
        ((1, 1), (4,), [0.0]),  # the other lane's
        ((1, 1), (4, 4), [0.014, 0.014]),  # each takes half of its own and half of the other's
    ],
)
def test_a_free_core_hides_the_control_path_of_a_cpu(
    split: tuple[int, ...], sequences: tuple[int, ...], charged: list[float]
) -> None:
    facts = EngineFacts(control_s=0.001, control_step_s=0.01, interference=0.0)
    cost, plain = (
        cpu_cost(split, replace(setting("a", facts=some), gpus={"cpu-2c": CPU}))
        for some in (facts, EngineFacts(interference=0.0))
    )
    runners = [DECODE] * len(sequences)
    works = [BatchWork(decodes=n, context=100 * n) for n in sequences]
    taken = [
        seconds - bare
        for seconds, bare in zip(
            cost.together_s(runners, works), plain.together_s(runners, works), strict=True
        )
    ]
    assert taken == pytest.approx(charged)
    assert plain.can_fold and cost.can_fold == (sum(split) < 2)


def test_the_control_path_of_a_cpu_slows_all_lanes_whoever_caused_it() -> None:
    facts = EngineFacts(control_step_s=0.01, interference=0.0)
    world = replace(setting("a", "b", facts=facts), gpus={"cpu-2c": CPU})
    cost = cpu_cost((1, 1), world)
    works = [BatchWork(1000, 1000**2), BatchWork(decodes=2, context=200)]
    prefill_s, step_s = (
        cost.batch_s("a", works[0], 0.5, False),
        cost.batch_s("b", works[1], 0.5, False),
    )
    slower = 1 + (0.01 / prefill_s + 0.01 / step_s) / 2
    assert prefill_s > 5 * step_s
    assert cost.together_s([PREFILL, OTHER], works) == pytest.approx(
        [slower * prefill_s, slower * step_s]
    )


@pytest.mark.parametrize(
    ("mesh", "lanes", "says"),
    [
        (Mesh(), Lanes(kind="stream"), "u: found a mesh of cpu, expected a list of"),
        (Mesh(device="gpu", kind="b7", gpus=(0,)), Lanes(kind="stream"), "found a mesh of b7"),
        (Mesh(device="gpu", kind="a100-80g"), Lanes(kind="stream"), "a list of gpus"),
        (Mesh(device="gpu", kind="a100-80g", gpus=(0,)), Lanes(), "found lanes of kind cores"),
    ],
)
def test_what_cannot_be_costed_is_refused(mesh: Mesh, lanes: Lanes, says: str) -> None:
    spec = UnitSpec(name="u", models=unit("a").models, memory=unit("a").memory, mesh=mesh)
    with pytest.raises(ConfigError, match=says):
        mesh_cost(
            UnitSpec(**{f: getattr(spec, f) for f in spec.__struct_fields__} | {"lanes": lanes})
        )


class Halves(MeshCost):
    """A batch takes a second per token alone, and half as much again with each neighbour."""

    def shares(self, runners: Sequence[Runner]) -> list[float]:
        return [1 / len(runners)] * len(runners)

    def batch_s(self, model: str, work: BatchWork, share: float, is_alone: bool) -> float:
        return work.prefill_tokens * (0.5 + 0.5 / share)


@dataclass
class Bench:
    """A mesh whose works note when they end."""

    ends: dict[int, float] = field(default_factory=dict)
    elapsed: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loop = EventLoop()
        copies = CopyLane(self.loop, Links(self.loop), unit("a"), 1 << 20)
        self.mesh = MeshExecutor(self.loop, Halves(unit("a"), setting("a")), copies)

    def launch(self, number: int, lane: int, seconds: int, at_s: float = 0.0) -> None:
        work = batch(Phase.PREFILL, (0, seconds), lane=lane, number=number)
        self.loop.at(at_s, lambda: self.mesh.launch(work, self.done))

    def done(self, work: Work, result: Result) -> None:
        self.ends[work.id] = self.loop.now_s
        self.elapsed[work.id] = result.elapsed_s

    def run(self) -> dict[int, float]:
        while self.loop.step():
            pass
        return self.ends


def test_works_of_a_lane_run_one_after_the_other() -> None:
    bench = Bench()
    bench.launch(1, 0, 2)
    bench.launch(2, 0, 3)
    assert bench.run() == pytest.approx({1: 2.0, 2: 5.0})
    assert bench.elapsed == pytest.approx({1: 2.0, 2: 3.0})  # waiting is not counted


def test_what_is_left_goes_slower_beside_a_neighbour_and_faster_after_it() -> None:
    bench = Bench()
    bench.launch(1, 0, 10)
    bench.launch(2, 1, 2, at_s=4.0)
    # 4 s of 10 done; then 1.5 times slower while the other does its 2 s in 3; 4 s are left.
    assert bench.run() == pytest.approx({2: 7.0, 1: 11.0})
    assert bench.elapsed == pytest.approx({1: 11.0, 2: 3.0})


def test_a_copy_slows_nobody_down() -> None:
    bench = Bench()
    bench.launch(1, 0, 2)
    copy = Copy(7, 1, "a", CopyKind.SWAP_OUT, 0, b"\0" * 40, b"\0" * 40)
    bench.mesh.launch(copy, bench.done)
    bench.mesh.launch(copy, bench.done)
    assert bench.run() == pytest.approx({1: 2.0, 7: 2 * 10 * (1 << 20) / HOST_LINK_BYTES_PER_S})
