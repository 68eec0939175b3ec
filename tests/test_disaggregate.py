"""DistServe's algorithms on its own coefficients, beside what the paper chose."""

import sys
from functools import cache
from pathlib import Path

import pytest

from muxrt.config.placement import Slo
from muxrt.planner.disaggregate import (
    Phases,
    Rated,
    Space,
    Split,
    better,
    for_rate,
    high_affinity,
    low_affinity,
    phases,
    published,
    simulated,
)
from muxrt.planner.phases import COMPAT, Instance, Judge, Rules, draw
from muxrt.planner.workload import Lengths

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from opt_world import LAYERS_HIDDEN, all_alike, instance  # a script, so its folder comes first

# Many turns joined, at most 2,048 tokens with the answer: DistServe's ShareGPT is like this.
CHAT = draw(Lengths(755, 1.7 * 755**2), Lengths(200, 2 * 200**2), 2048, 8000)
SLOS = {"opt-13b": Slo(ttft_s=0.25, tpot_s=0.1), "opt-66b": Slo(ttft_s=2.5, tpot_s=0.15)}
# placements.csv of the paper: prefill and decode tp and pp.
PUBLISHED = {"opt-13b": ((2, 1), (1, 1)), "opt-66b": ((4, 1), (2, 2))}
TPS = {"opt-13b": (1, 2, 4), "opt-66b": (2, 4, 8)}


def judge(model: str, *, compat: bool) -> Judge:
    return Judge(CHAT, SLOS[model], rules=COMPAT if compat else Rules())


def one(model: str, tp: int, pp: int = 1, *, compat: bool = True) -> Instance:
    found = instance(model, tp, pp, compat=compat)
    assert found is not None
    return found


@cache
def one_node(model: str) -> Split:
    """Algorithm 2 as published, on one node of 8, by the paper's own simulator."""
    space = Space(TPS[model], LAYERS_HIDDEN[model][0], 8, 1)
    found = low_affinity(
        lambda tp, pp: instance(model, tp, pp, compat=True), space, judge(model, compat=True)
    )
    assert found is not None
    return found


@pytest.mark.parametrize("model", ["opt-13b", "opt-66b"])
def test_the_published_placement_or_a_better_one(model: str) -> None:
    prefill, decode = PUBLISHED[model]
    theirs = Split(one(model, *prefill), 1, one(model, *decode), 1, 0.0)
    published_rps = simulated(theirs, judge(model, compat=True)).per_gpu
    assert one_node(model).per_gpu >= published_rps
    assert (one_node(model).num_prefill, one_node(model).num_decode) == (1, 1)
    assert one_node(model).gpus <= 8


def test_the_example_of_the_paper_wants_two_prefills_to_a_decode() -> None:
    # Section 2.3: 13B, 512 in / 64 out, TTFT 0.4 s, TPOT 40 ms.
    seen = Judge(all_alike(512, 64, 4000), Slo(ttft_s=0.4, tpot_s=0.04))
    gpu = one("opt-13b", 1, compat=False)
    per_gpu = {
        (n, m): seen.split_rps(gpu, n, gpu, m) / (n + m)
        for n, m in ((1, 1), (2, 1), (3, 1), (1, 2))
    }
    assert max(per_gpu, key=lambda pair: per_gpu[pair]) == (2, 1)
    assert 1.5 < per_gpu[2, 1] / seen.colocated_rps(gpu) < 2.1


@cache
def apart() -> Phases:
    space = Space((1, 2), 40, 4, 1)
    return phases(
        lambda tp, pp: instance("opt-13b", tp, pp) if pp == 1 else None,
        space,
        judge("opt-13b", compat=False),
    )


def test_phases_are_ranked_by_goodput_per_gpu() -> None:
    for rated in (apart().prefill, apart().decode):
        assert [one.per_gpu for one in rated] == sorted((r.per_gpu for r in rated), reverse=True)
    # 0.25 s for prompts of 755 tokens: tensor parallelism pays, as in the paper's placement.
    assert apart().prefill[0].instance.tp == 2
    assert apart().prefill[0].per_gpu > 1.2 * apart().prefill[1].per_gpu


def test_what_cannot_keep_its_target_is_no_candidate() -> None:
    impatient = Judge(CHAT, Slo(ttft_s=0.01, tpot_s=0.001))
    found = phases(lambda tp, pp: instance("opt-13b", tp, pp), Space((1,), 1, 1, 1), impatient)
    assert found.is_empty and high_affinity(found, impatient, 8) is None


def test_algorithm_1_rounds_each_phase_up() -> None:
    gpu = one("opt-13b", 1)
    found = Phases((Rated(gpu, 3.0),), (Rated(gpu, 5.0),))
    split = published(found, 10.0)
    assert (split.num_prefill, split.num_decode, split.goodput_rps) == (4, 2, 10.0)


def test_a_ratio_is_better_than_one_to_one() -> None:
    seen = Judge(all_alike(512, 64, 4000), Slo(ttft_s=0.4, tpot_s=0.04))
    gpu = one("opt-13b", 1, compat=False)
    found = Phases((Rated(gpu, seen.prefill_rps(gpu)),), (Rated(gpu, seen.decode_rps(gpu)),))
    best = high_affinity(found, seen, 3)
    equal = simulated(Split(gpu, 1, gpu, 1, 0.0), seen)
    assert best is not None and (best.num_prefill, best.num_decode) == (2, 1)
    assert best.per_gpu > 1.1 * equal.per_gpu
    assert better(equal, best) is best is better(best, equal) and better(None, None) is None


def test_a_node_may_hold_several_segments() -> None:
    seen = judge("opt-13b", compat=False)
    space = Space((1, 2), 40, 4, 1)
    found = low_affinity(
        lambda tp, pp: instance("opt-13b", tp, pp) if pp == 1 else None, space, seen
    )
    assert found is not None and found.gpus <= 4 and found.nodes == 1
    assert found.num_decode > 1


@pytest.mark.parametrize("rate_rps", [2.0, 9.0])
def test_as_few_instances_as_keep_the_goal(rate_rps: float) -> None:
    seen = judge("opt-13b", compat=False)
    best = high_affinity(apart(), seen, 8)
    assert best is not None
    found = for_rate(best, seen, rate_rps)
    assert found is not None
    n, m = found.num_prefill, found.num_decode
    assert seen.keeps_split(found.prefill, n, found.decode, m, rate_rps)
    for fewer in ((n - 1, m), (n, m - 1)):
        kept = min(fewer) > 0 and seen.keeps_split(
            found.prefill, fewer[0], found.decode, fewer[1], rate_rps
        )
        assert not kept
