"""What a run of decode steps is to the brain: how long it may be, and what is left of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import World

from muxrt.core import Batch, Phase, Request, SequenceState
from muxrt.engine.requests import Ledger
from muxrt.sched.rotation import Rotation
from muxrt.sched.run import Flying, Stepped, horizon, resume


def decoding(num: int = 3, models: str = "a", policy: str = "adbs") -> World:
    """`num` sequences of each model that are prefilled; each has 40 tokens to come."""
    world = World(models=models, policy=policy, num_blocks=400, depth=2)
    for name in models:
        for _ in range(num):
            world.submit(name, 10, 40)
    scheduler = world.unit.scheduler
    while not horizon(scheduler) or scheduler.policy.rotation(scheduler) is None:
        assert world.step()
    return world


def test_the_horizon_is_the_first_limit() -> None:
    world = decoding()
    (queue,) = world.unit.scheduler.queues.values()
    limits = [s.request.max_tokens - s.outputs_scheduled for s in queue.decoding]
    assert horizon(world.unit.scheduler) == min(limits) > 30


def test_somebody_who_waits_ends_the_horizon() -> None:
    world = decoding(num=8)  # as many as may run
    world.submit("a", 10, 5)
    assert horizon(world.unit.scheduler) == 0


def test_a_prefill_ends_the_horizon() -> None:
    world = World(models="a")
    world.submit("a", 10, 5)
    assert world.unit.scheduler.prefills_in_flight()
    assert horizon(world.unit.scheduler) == 0


def test_hash_keys_are_left_to_the_brain() -> None:
    world = World(models="a")
    world.submit("a", 40, 30, family=1, shared=40)
    for _ in range(6):
        world.step()
    assert world.unit.scheduler.queues["a"].decoding
    assert horizon(world.unit.scheduler) == 0


def test_a_preempted_sequence_ends_the_horizon() -> None:
    world = decoding()
    scheduler = world.unit.scheduler
    scheduler.memory.preempt(scheduler.queues["a"].running[-1])
    assert horizon(scheduler) == 0  # on its way out
    world.step()
    assert horizon(scheduler) == 0  # out


def test_a_sequence_on_its_way_back_from_host_memory_ends_the_horizon() -> None:
    world = World(models="a", num_blocks=400, swap_blocks=400, preempt="swap", depth=2)
    for _ in range(2):
        world.submit("a", 10, 40)
    scheduler = world.unit.scheduler
    while not horizon(scheduler):
        assert world.step()
    (queue,) = scheduler.queues.values()
    scheduler.memory.preempt(queue.running[-1])
    while not any(s.state is SequenceState.SWAPPING_IN for s in queue.running):
        assert world.step()
    assert not (queue.waiting or queue.preempted or queue.prefilling)
    assert scheduler.memory.is_settled  # the copy is in flight, no more
    assert horizon(scheduler) == 0
    world.run()


@pytest.mark.parametrize("policy", ["adbs", "round-robin"])
def test_models_take_turns(policy: str) -> None:
    scheduler = decoding(models="abc", policy=policy).unit.scheduler
    rotation = scheduler.policy.rotation(scheduler)
    assert rotation is not None and rotation.turns
    batch = scheduler.policy.next_batch(scheduler, 0, 99.0)
    assert batch is not None and batch.model == rotation.models[0]
    scheduler.policy.rotated(rotation.models[1])
    after = scheduler.policy.rotation(scheduler)
    assert after == Rotation((*rotation.models[2:], *rotation.models[:2]))


def test_first_come_first_served_takes_no_turns() -> None:
    scheduler = World(models="abc", policy="fcfs").unit.scheduler
    for number, name in enumerate("cab"):
        scheduler.add(Request(number, name, 4, 4, b""))
    assert scheduler.policy.rotation(scheduler) == Rotation(("c", "a", "b"), turns=False)


def test_a_round_of_decodes_before_the_next_prefill_is_no_rotation() -> None:
    world = World(models="ab", depth=2)
    world.submit("a", 10, 30)
    world.submit("b", 10, 30)
    scheduler = world.unit.scheduler
    assert scheduler.prefills_in_flight()
    assert scheduler.policy.rotation(scheduler) is None


def test_a_reservation_is_no_rotation() -> None:
    world = World(models="a", num_blocks=36, max_sequences=4, quota_period_s=50.0)
    for _ in range(3):
        world.submit("a", 60, 40)
    while not world.unit.scheduler.memory.reserved:
        assert world.step()
    assert world.unit.scheduler.policy.rotation(world.unit.scheduler) is None


def test_the_brain_goes_on_from_where_a_run_ended() -> None:
    """Ten steps are counted for it, two of them in flight; it finishes the rest by itself."""
    world = decoding()
    scheduler, steps = world.unit.scheduler, 10
    (queue,) = scheduler.queues.values()
    members = list(queue.decoding)
    before = [(s.num_scheduled, s.num_committed, s.outputs_committed) for s in members]
    in_flight = members[0].in_flight
    assert in_flight == 2
    layout = queue.model.layout
    scheduler.memory.grow(
        "a", [(s, layout.num_groups(s.num_scheduled + steps) - len(s.groups)) for s in members]
    )
    flying = [Flying("a", 0, members)] * in_flight
    batches = resume(scheduler, [Stepped(members, steps, steps, in_flight, 0)], flying)
    assert world.unit.check()
    for sequence, (scheduled, committed, outputs) in zip(members, before, strict=True):
        assert sequence.num_scheduled == scheduled + steps
        assert sequence.num_committed == committed + steps
        assert sequence.outputs_committed == outputs + steps
    assert [batch.phase for batch in batches] == [Phase.DECODE] * 2
    starts = [[entry.start for entry in batch.entries] for batch in batches]
    assert starts[0] == [scheduled + steps - 2 for scheduled, _, _ in before]
    assert starts[1] == [start + 1 for start in starts[0]]
    following = scheduler.schedule(99.0)
    assert following is None  # the lane has its two


def test_groups_are_taken_for_all_at_once() -> None:
    world = decoding()
    memory, (queue,) = world.unit.scheduler.memory, world.unit.scheduler.queues.values()
    first, second, third = queue.decoding
    held, used = [len(s.groups) for s in queue.decoding], memory.pool.num_used
    memory.grow("a", [(first, 2), (second, 0), (third, 1)])
    assert [len(s.groups) for s in queue.decoding] == [held[0] + 2, held[1], held[2] + 1]
    assert memory.pool.num_used == used + 3 * queue.model.layout.blocks_per_group
    assert world.unit.check()


def test_who_held_much_for_a_moment_is_remembered() -> None:
    world = World(models="ab", quotas={"a": 0.5, "b": 0.5}, num_blocks=200, quota_period_s=1.0)
    quotas = {n: account.quota for n, account in world.pool.accounts.items()}
    world.unit.held({"b": quotas["b"]})
    usage = world.unit._usage("b")
    assert usage.peak_blocks == quotas["b"]
    world.unit.held({"b": 1})
    assert world.unit._usage("b").peak_blocks == quotas["b"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 50))
def test_tokens_of_many_requests_are_counted_at_once(outputs: list[int], num: int) -> None:
    ledger = Ledger()
    for number, tokens in enumerate(outputs):
        ledger.open(Request(number, "a", 7, 9, b""), "u")
        ledger.add_tokens(number, tokens)
    ledger.weigh("a", "u", len(outputs) * num)
    assert ledger.load("a", "u").tokens == sum(outputs) + len(outputs) * (7 + num)
    ledger.credit(range(len(outputs)), num)
    assert ledger.check()
    assert ledger.load("a", "u").tokens == sum(outputs) + len(outputs) * (7 + num)


def test_a_batch_of_a_run_names_its_sequences_oldest_first() -> None:
    world = decoding()
    (queue,) = world.unit.scheduler.queues.values()
    members = list(queue.decoding)
    flying = [Flying("a", 0, members[::-1])] * 2
    batches: list[Batch] = resume(world.unit.scheduler, [Stepped(members, 0, 0, 2, 0)], flying)
    assert [entry.slot for entry in batches[0].entries] == [s.slot for s in members]
