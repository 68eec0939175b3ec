"""Simulations of one phase: against closed forms, and what each rule of theirs changes."""

import csv
import sys
from dataclasses import replace
from math import inf, log
from pathlib import Path

import numpy as np
import pytest

from muxrt.config.placement import Slo
from muxrt.planner.colocated_pool import colocated_pool
from muxrt.planner.decode_pool import Room, decode_pool
from muxrt.planner.phase_steps import Floats, Goal, Requests, prefill_s, round_s
from muxrt.planner.phase_tables import Limits, costs_of, published_costs
from muxrt.planner.phases import (
    COMPAT,
    Instance,
    Judge,
    Link,
    Rules,
    Traffic,
    draw,
    largest_rate,
    of_pairs,
    saturating_tokens,
)
from muxrt.planner.prefill_pool import Moves, prefill_pool
from muxrt.planner.workload import Lengths

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from opt_world import (
    all_alike,
    coefficients,
    instance,
    kv_capacity,
)  # a script, so its folder comes first

NO_GOAL = Goal(0, 1 << 40, inf, inf, 1 << 40)
STILL = Moves(0.0, 1.0)
SLO = Slo(ttft_s=0.4, tpot_s=0.04)


def opt(tp: int = 1, pp: int = 1, model: str = "opt-13b") -> Instance:
    found = instance(model, tp, pp)
    assert found is not None
    return found


def prefills(
    one: Instance,
    arrivals: list[float] | Floats,
    prompts: list[int] | int = 512,
    *,
    num: int = 1,
    cap: float = 1,
    kv: float = 1e9,
    moves: Moves = STILL,
) -> tuple[Floats, Floats]:
    """When each is done and ready."""
    count = len(arrivals)
    lengths = np.broadcast_to(np.asarray(prompts, np.int64), count).copy()
    requests = Requests(np.asarray(arrivals, float), lengths, np.ones(count, np.int64))
    done, ready = np.zeros(count), np.zeros(count)
    prefill_pool(one.costs, requests, num, cap, kv, moves, NO_GOAL, done, ready)
    return done, ready


def decodes(
    one: Instance, ready: list[float], outputs: list[int], *, num: int = 1, room: Room | None = None
) -> Floats:
    """When answers to prompts of 100 tokens are finished."""
    count = len(ready)
    requests = Requests(np.array(ready), np.full(count, 100), np.array(outputs))
    times, finish = np.array(ready), np.zeros(count)
    room = room or Room(1e6, 8, True, 0)
    late = np.zeros(count, np.bool_)
    order = np.argsort(times, kind="stable")
    decode_pool(one.costs, requests, order, times, times, num, room, NO_GOAL, late, finish)
    return finish


def test_tables_are_the_steps_they_were_made_of() -> None:
    steps = coefficients("own")["opt-66b", 4]
    costs = opt(4, 1, "opt-66b").costs
    for tokens, length in ((1, 1), (77, 50), (512, 512), (2048, 300), (3000, 1500)):
        exact = steps.prefill_s(tokens, tokens * length)
        assert prefill_s(costs, tokens, length) == pytest.approx(exact, rel=1e-9)
    for batch, context in ((1, 5), (60, 31_000), (130, 70_000)):
        exact = steps.decode_s(batch, context)
        assert round_s(costs, batch, context) == pytest.approx(exact, rel=1e-9)


def test_tables_of_the_published_sets_keep_their_jump() -> None:
    steps = coefficients("own")["opt-66b", 2]
    costs = published_costs(steps.published, Limits(2048, 2048, 256, 100_000))
    for batch in (94, 95, 200):
        exact = steps.published.decode_s(batch, 300 * batch)
        assert round_s(costs, batch, 300 * batch) == pytest.approx(exact, rel=1e-9)


def test_capacities_are_the_published_ones() -> None:
    path = Path(__file__).parent / "data" / "distserve_kv_capacity.csv"
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    checked = [row for row in rows if row["model"] in ("opt-13b", "opt-66b")]
    assert len(checked) > 40
    for row in checked:
        found = kv_capacity(row["model"], int(row["tp"]), int(row["pp"]))
        assert found == int(row["max_kv_tokens"]), row


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_prefills_wait_as_in_an_m_d_1_queue(load: float) -> None:
    # DistServe, equation 1: D + R D^2 / (2 (1 - R D)).
    one, count = opt(), 40_000
    service_s = prefill_s(one.costs, 512, 512)
    rate = load / service_s
    arrivals = all_alike(512, 1, count).at(rate).arrivals
    done, _ = prefills(one, arrivals)
    mean = service_s + rate * service_s**2 / (2 * (1 - load))
    assert float(np.mean(done - arrivals)) == pytest.approx(mean, rel=0.04)


def test_two_stages_wait_half_as_long() -> None:
    # DistServe, equation 2: D + R D^2 / (4 (2 - R D)), the slowest stage takes D / 2.
    one, count = opt(1, 2), 40_000
    service_s = prefill_s(one.costs, 512, 512)
    rate = 0.9 / service_s
    arrivals = all_alike(512, 1, count).at(rate).arrivals
    done, _ = prefills(one, arrivals)
    mean = service_s + rate * service_s**2 / (4 * (2 - 0.9))
    assert float(np.mean(done - arrivals)) == pytest.approx(mean, rel=0.04)


def test_short_prompts_go_together_up_to_the_cap() -> None:
    one = opt()
    done, _ = prefills(one, [0, 0.001, 0.001, 0.001], 100, cap=250)
    first_s = prefill_s(one.costs, 100, 100)
    pair_s = prefill_s(one.costs, 200, 100)
    assert done == pytest.approx(
        [first_s, first_s + pair_s, first_s + pair_s, 2 * first_s + pair_s]
    )


def test_the_shortest_queue_is_joined() -> None:
    one = opt()
    done, _ = prefills(one, [0, 0.001, 0.002, 0.003], [1000, 10, 10, 10], num=2)
    long_s, short_s = prefill_s(one.costs, 1000, 1000), prefill_s(one.costs, 10, 10)
    assert done == pytest.approx([long_s, *(0.001 + n * short_s for n in (1, 2, 3))])


def test_kv_moves_while_later_layers_compute_and_on_one_link() -> None:
    one = opt()
    done, ready = prefills(one, [0.0], moves=Moves(1e-5, 40))
    assert ready[0] == pytest.approx(done[0] + 512e-5 / 40)
    slow, slow_ready = prefills(one, [0.0, 0.0], moves=Moves(1e-3, 40))
    assert slow_ready == pytest.approx([0.512, 1.024]) and slow[1] == pytest.approx(2 * done[0])


def test_kv_that_was_not_moved_keeps_prompts_out() -> None:
    one = opt()
    done, ready = prefills(one, [0.0, 0.0], kv=1000, moves=Moves(1e-3, 1))
    assert done[1] == pytest.approx(ready[0] + done[0])


def test_a_round_gives_each_a_token() -> None:
    one = opt()
    finish = decodes(one, [0.0, 0.0], [3, 2])
    both_s = round_s(one.costs, 2, 202)
    assert finish == pytest.approx([both_s + round_s(one.costs, 1, 102), both_s])
    assert decodes(one, [5.0], [1]) == pytest.approx([5.0])


def test_who_does_not_fit_waits_until_somebody_leaves() -> None:
    one = opt()
    finish = decodes(one, [0.0, 0.0], [11, 11], room=Room(200, 8, True, 0))
    assert finish[1] == pytest.approx(2 * finish[0])
    together = decodes(one, [0.0, 0.0], [11, 11], room=Room(222, 8, True, 0))
    assert together[0] == together[1] < finish[1]


def test_slots_are_a_limit_too() -> None:
    finish = decodes(opt(), [0.0, 0.0], [11, 11], room=Room(1e6, 1, True, 0))
    assert finish[1] == pytest.approx(2 * finish[0])


def test_decodes_join_the_instance_that_holds_least() -> None:
    one = opt()
    finish = decodes(one, [0.0, 0.001, 0.002], [500, 2, 2], num=2)
    alone_s = round_s(one.costs, 1, 101)
    assert finish[1] == pytest.approx(0.001 + alone_s)
    assert finish[2] == pytest.approx(0.001 + alone_s + alone_s)


def test_stages_deal_a_batch_among_themselves() -> None:
    # 8 sequences on 2 stages: a round takes what 4 of them take on the whole model.
    finish = decodes(opt(1, 2), [0.0] * 8, [2] * 8)
    assert finish == pytest.approx([round_s(opt().costs, 4, 404)] * 8)


def colocated(arrivals: list[float], outputs: list[int], factor: float) -> tuple[Floats, Floats]:
    count = len(arrivals)
    requests = Requests(np.array(arrivals), np.full(count, 512), np.array(outputs))
    first, finish = np.zeros(count), np.zeros(count)
    room = Room(1e6, 8, True, 0)
    colocated_pool(opt().costs, requests, 1, 512, factor, room, NO_GOAL, first, finish)
    return first, finish


def test_prefills_go_before_decodes_and_stall_them() -> None:
    costs = opt().costs
    whole_s, round_ = prefill_s(costs, 512, 512), round_s(costs, 1, 513)
    first, finish = colocated([0.0, whole_s + 0.001], [3, 1], 0.0)
    assert first == pytest.approx([whole_s, 2 * whole_s + round_])
    assert finish[0] == pytest.approx(2 * whole_s + round_ + round_s(costs, 1, 514))


def test_a_mixed_step_gives_running_sequences_a_token() -> None:
    costs = opt().costs
    whole_s, round_ = prefill_s(costs, 512, 512), round_s(costs, 1, 513)
    first, finish = colocated([0.0, 1.1 * whole_s + 0.001], [3, 2], 1.1)
    mixed_s = (
        1.1 * prefill_s(costs, 513, 512 * 512 / 513)
        + round_s(costs, 1, 514)
        - (round_s(costs, 1, 0))
    )
    assert first[0] == pytest.approx(1.1 * whole_s)
    assert finish[0] == pytest.approx(1.1 * whole_s + round_ + mixed_s, rel=1e-3)
    assert first[1] == finish[0] and finish[1] == pytest.approx(first[1] + round_)


def test_a_rate_is_closed_in_on() -> None:
    assert largest_rate(lambda rate: rate <= 13.7) == pytest.approx(13.7, rel=0.011)
    assert largest_rate(lambda rate: rate <= 0.02) == pytest.approx(0.02, rel=0.011)
    assert largest_rate(lambda rate: False) == 0.0
    assert largest_rate(lambda rate: True) > 1e4


def test_a_prefill_instance_keeps_what_m_d_1_says() -> None:
    # 72 ms each, 90th percentile of wait + service at 0.4 s; the tail of M/D/1 is exponential.
    judge = Judge(all_alike(512, 64), SLO, rules=replace(COMPAT, saturates=True))
    found = judge.prefill_rps(opt())
    # With the exponential tail of the mean wait (Pollaczek-Khinchine) it is 10.7; batches of two
    # never form, as two prompts exceed L_m.
    assert 9.9 < found < 11.4
    service_s = prefill_s(opt().costs, 512, 512)
    busy = found * service_s
    wait_s = found * service_s**2 / (2 * (1 - busy))
    assert wait_s * log(10 * busy) == pytest.approx(0.4 - service_s, rel=0.5)


def test_more_instances_sustain_more_than_their_sum() -> None:
    judge = Judge(all_alike(512, 64), SLO)
    one, two = judge.prefill_rps(opt()), judge.prefill_rps(opt(), 2)
    assert 2 * one < two < 2.6 * one
    assert judge.decode_rps(opt(), 2) > 1.9 * judge.decode_rps(opt())


def test_both_targets_are_harder_to_keep_than_either() -> None:
    traffic = draw(Lengths(300, 180_000), Lengths(60, 7_200), 2048)
    slo = Slo(ttft_s=0.4, tpot_s=0.029)
    joint, apart = (
        Judge(traffic, slo, rules=Rules(joint=joint)).split_rps(opt(), 1, opt(), 1)
        for joint in (True, False)
    )
    assert joint < 0.99 * apart


@pytest.mark.parametrize(
    ("rules", "link"),
    [(Rules(), Link(2e-4, 40)), (Rules(keeps=True), Link())],
    ids=["a slow link", "little memory"],
)
def test_what_the_paper_leaves_out_costs_goodput(rules: Rules, link: Link) -> None:
    small = replace(opt(), limits=replace(opt().limits, kv_tokens=6000))
    traffic = all_alike(512, 200)
    slo = Slo(ttft_s=1.0, tpot_s=0.06)
    sender = replace(opt(), link=link)
    ours = Judge(traffic, slo, rules=rules).split_rps(sender, 3, small, 1)
    paper = replace(rules, moves=False, keeps=False)
    theirs = Judge(traffic, slo, rules=paper).split_rps(sender, 3, small, 1)
    assert ours < 0.8 * theirs


def test_the_same_requests_at_every_rate() -> None:
    traffic = draw(Lengths(200, 80_000), Lengths(100, 15_000), 2048, 4000, seed=3)
    slow, fast = traffic.at(1.0), traffic.at(4.0)
    assert np.array_equal(slow.prompts, fast.prompts)
    assert slow.arrivals == pytest.approx(4 * fast.arrivals)
    assert float(np.mean(slow.prompts)) == pytest.approx(200, rel=0.05)
    assert float(np.std(slow.prompts)) == pytest.approx(200, rel=0.1)
    assert int((slow.prompts + slow.outputs).max()) <= 2048


def test_requests_that_were_seen_stay_pairs() -> None:
    seen = of_pairs(np.array([10, 20]), np.array([1, 2]), 100)
    assert np.array_equal(seen.prompts, 10 * seen.outputs) and len(set(seen.outputs)) == 2


def test_a_goal_is_of_the_requests_in_the_middle() -> None:
    # The first and the last tenth come in one burst: they load the system and do not count.
    gaps = np.ones(1000)
    gaps[:100] = gaps[-100:] = 0.0
    judge = Judge(Traffic(gaps, np.full(1000, 512), np.full(1000, 2)), SLO)
    assert judge.prefill_rps(opt()) > 1.0


def test_where_a_gpu_is_saturated() -> None:
    steps = coefficients("own")
    found = [saturating_tokens(steps["opt-13b", tp].prefill_s, 2048) for tp in (1, 2, 4)]
    assert found == [560, 768, 1072]  # 90 % of 8.0, 12.3 and 22.5 thousand tokens/s


def test_costs_are_of_any_model_with_steps() -> None:
    steps = coefficients("own")["opt-13b", 2].at(1.0)
    costs = costs_of(steps, Limits(512, 512, 4, 2048), pp=2)
    assert round_s(costs, 4, 800) == pytest.approx(steps.decode_s(2, 400))
