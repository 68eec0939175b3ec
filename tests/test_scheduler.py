"""Scheduler and memory rules in small simulated worlds."""

import msgspec
import pytest
from worlds import FailingExecutor, World

from muxrt.core import Batch, Copy, Phase

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


@DEPTHS
def test_a_request_yields_its_tokens_and_leaves_nothing(depth: int) -> None:
    world = World("a", depth=depth)
    rid = world.submit("a", prompt=20, output=5)
    world.run()
    assert world.answers[rid].tokens == [4, 3, 2, 1, 0]


@DEPTHS
def test_steps_past_the_end_are_dropped(depth: int) -> None:
    world = World("a", depth=depth)
    rid = world.submit("a", output=3, max_tokens=50)
    world.run()
    assert (len(world.answers[rid].tokens), world.answers[rid].finish) == (3, "stop")
    assert sum(batch.phase is Phase.DECODE for batch in world.batches()) == 2 + (depth - 1)


@DEPTHS
def test_max_tokens_ends_with_length(depth: int) -> None:
    world = World("a", depth=depth)
    rid = world.submit("a", output=50, max_tokens=4)
    world.run()
    assert (len(world.answers[rid].tokens), world.answers[rid].finish) == (4, "length")
    assert len(world.batches()) == 4


def test_a_request_for_no_token_only_computes_its_prompt() -> None:
    world = World("a")
    rid = world.submit("a", prompt=30, max_tokens=0)
    world.run()
    assert (world.answers[rid].tokens, world.answers[rid].finish) == ([], "length")


@DEPTHS
def test_a_long_prompt_goes_in_chunks_and_blocks_nobody(depth: int) -> None:
    # MuxServe never admits a prompt above its token budget, and its queue waits behind it.
    world = World("a", depth=depth, prefill_tokens=32)
    world.submit("a", prompt=100, output=2)
    behind = world.submit("a", prompt=10, output=2)
    world.run()
    starts = [
        entry.start for batch in world.batches() for entry in batch.entries if entry.slot == 0
    ]
    assert starts[:4] == [0, 32, 64, 96]
    assert world.answers[behind].finish == "stop"


def test_prompts_that_fit_share_a_prefill() -> None:
    world = World("a", prefill_tokens=64)
    world.submit("a", prompt=30)
    held = world.loop  # the lane is busy with the first; the next three arrive meanwhile
    for prompt in (30, 30, 30):
        world.submit("a", prompt=prompt)
    world.run()
    assert held.now_s > 0
    sizes = [len(batch.entries) for batch in world.batches() if batch.phase is Phase.PREFILL]
    assert sizes == [1, 2, 1]


def test_max_sequences_is_per_model_and_counts() -> None:
    # MuxServe reads the per-model limit from a dict with getattr and never finds it.
    world = World("ab", max_sequences=2)
    for _ in range(5):
        world.submit("a")
    world.run()
    assert max(len(batch.entries) for batch in world.batches("a")) == 2


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "status"), [(100, 29, 400), (129, 1, 400), (0, 1, 400), (100, 28, 200)]
)
def test_what_cannot_ever_fit_is_refused_at_the_door(
    prompt: int, max_tokens: int, status: int
) -> None:
    world = World("a")
    rid = world.submit("a", prompt=prompt, max_tokens=max_tokens)
    world.run()
    assert world.answers[rid].status == status


def test_a_draining_unit_finishes_and_takes_nothing_new() -> None:
    world = World("a")
    first = world.submit("a")
    world.unit.drain()
    late = world.submit("a")
    world.run()
    assert (world.answers[first].finish, world.answers[late].status) == ("stop", 503)


# -- aborts -----------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("steps", range(8))
def test_an_abort_frees_everything_within_two_steps(depth: int, steps: int) -> None:
    world = World("a", depth=depth)
    rid = world.submit("a", prompt=40, output=30)
    for _ in range(steps):
        world.step()
    world.unit.abort(rid)
    world.answers[rid].finish = "abort"
    before = len(world.memory.launched)
    while world.pool.num_used:
        assert world.step()
    assert len(world.memory.launched) == before
    world.run()


@pytest.mark.parametrize("leave", ["abort", "preempt"])
def test_who_is_to_leave_takes_no_further_step(leave: str) -> None:
    world = World("a", depth=2)
    rid = world.submit("a", output=50)
    scheduler = world.unit.scheduler
    [sequence] = scheduler.queues["a"].running
    while not scheduler.can_decode("a", 0):
        world.step()
    if leave == "abort":
        scheduler.abort(rid)
        world.answers[rid].finish = "abort"
    else:
        scheduler.memory.preempt(sequence)
    assert sequence.in_flight
    assert not scheduler.can_decode("a", 0)
    world.run()


def test_an_unknown_abort_is_ignored() -> None:
    world = World("a")
    world.unit.abort(99)
    assert world.unit.is_idle


# -- preemption -------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_preemption_keeps_generated_tokens(depth: int, preempt: str) -> None:
    # MuxServe throws generated tokens away and starts again.
    world = World("a", depth=depth, num_blocks=40, swap_blocks=100, preempt=preempt)
    first = world.submit("a", prompt=60, output=60)
    second = world.submit("a", prompt=60, output=60)
    world.run()
    for rid in (first, second):
        assert world.answers[rid].tokens == list(range(59, -1, -1))
    stats = world.unit.stats().models[0]
    assert (stats.preemptions_swap, stats.preemptions_recompute) == (
        (0, stats.preemptions_recompute) if preempt == "recompute" else (stats.preemptions_swap, 0)
    )
    assert stats.preemptions_swap + stats.preemptions_recompute > 0


def test_the_newest_is_preempted_and_the_oldest_never() -> None:
    world = World("a", num_blocks=40)
    oldest = world.submit("a", prompt=60, output=60)
    newest = world.submit("a", prompt=60, output=60)
    world.run()
    assert world.answers[oldest].finished_s < world.answers[newest].finished_s  # type: ignore[operator]
    restarts = [
        e.slot
        for b in world.batches()
        if b.phase is Phase.PREFILL
        for e in b.entries
        if e.start == 0
    ]
    assert restarts.count(0) == 1
    assert restarts.count(1) > 1


def test_a_full_host_falls_back_to_recompute() -> None:
    world = World("a", num_blocks=40, swap_blocks=3, preempt="swap")
    for _ in range(2):
        world.submit("a", prompt=60, output=60)
    world.run()
    assert world.unit.stats().models[0].preemptions_recompute > 0


def test_a_swapped_sequence_is_not_computed_again() -> None:
    world = World("a", num_blocks=40, swap_blocks=100, preempt="swap")
    for _ in range(2):
        world.submit("a", prompt=60, output=60)
    world.run()
    prefilled = sum(b.num_tokens for b in world.batches() if b.phase is Phase.PREFILL)
    assert prefilled == 120
    assert sum(isinstance(work, Copy) for work in world.memory.launched) >= 2


def test_running_sequences_get_freed_blocks_before_preempted_ones_return() -> None:
    # Found by fuzzing: the oldest freed a block by preempting, and the preempted took it back.
    world = World(
        "a", policy="round-robin", lanes=2, depth=2, num_blocks=36, swap_blocks=500, preempt="swap"
    )
    for prompt in (13, 14, 18, 18):
        world.submit("a", prompt=prompt, output=48)
    world.run(max_steps=2000)


# -- quotas, loans, claims --------------------------------------------------------------------


def flood(world: World, model: str, count: int, prompt: int = 60, output: int = 60) -> list[int]:
    return [world.submit(model, prompt=prompt, output=output) for _ in range(count)]


def test_a_busy_model_borrows_what_others_leave_free() -> None:
    world = World("ab", num_blocks=200)
    flood(world, "a", 8)
    peak = 0
    while world.step():
        peak = max(peak, world.pool.accounts["a"].borrowed)
    assert peak > 0
    world.run()


@DEPTHS
def test_quotas_are_walls_where_nobody_may_borrow(depth: int) -> None:
    world = World("ab", num_blocks=120, depth=depth, borrow=False, quotas={"a": 0.5, "b": 0.5})
    flood(world, "a", 20)
    kept = world.submit("b", prompt=60, output=60)
    peak = 0
    while world.step():
        peak = max(peak, world.pool.accounts["a"].used)
    group = world.pool.accounts["a"].blocks_per_group
    assert 60 - 4 * group <= peak <= 60  # full, although b leaves most of its share free
    assert {name: a.quota for name, a in world.pool.accounts.items()} == {"a": 60, "b": 60}
    assert world.unit.stats().models[1].preemptions_recompute == 0
    assert world.answers[kept].finish == "stop"
    world.run()


@DEPTHS
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_lent_blocks_are_back_within_100_ms_plus_one_step(
    depth: int, lanes: int, preempt: str
) -> None:
    world = World(
        "ab",
        num_blocks=120,
        depth=depth,
        lanes=lanes,
        quotas={"a": 0.5, "b": 0.5},
        quota_period_s=0,
        swap_blocks=500,
        preempt=preempt,
    )
    flood(world, "a", 8)
    while world.pool.num_free > 8:
        assert world.step()
    assert world.pool.accounts["a"].borrowed > 0
    asked_s = world.loop.now_s
    rid = world.submit("b", prompt=100, output=5)
    while world.answers[rid].first_token_s is None:
        assert world.step()
    step_s = max(0.01 + 0.0001 * batch.num_tokens for batch in world.batches())
    started_s = world.answers[rid].first_token_s - 2 * step_s  # type: ignore[operator]
    # Works already in flight (one per depth and lane) end first, then b's chunks run.
    assert started_s - asked_s <= 0.1 + depth * step_s
    world.run()


def test_a_model_within_its_quota_is_never_preempted_for_another() -> None:
    world = World("ab", num_blocks=120, quotas={"a": 0.5, "b": 0.5}, quota_period_s=0)
    kept = world.submit("b", prompt=60, output=60)
    flood(world, "a", 8)
    world.run()
    starts = [e.start for b in world.batches("b") for e in b.entries]
    assert starts.count(0) == 1
    assert world.answers[kept].finish == "stop"


def test_quotas_move_to_who_is_full_and_queueing() -> None:
    world = World("ab", num_blocks=200, max_sequences=8)
    before = world.pool.accounts["a"].quota
    for _ in range(40):
        world.submit("a", prompt=60, output=60)
    while world.step() and world.pool.accounts["a"].quota == before:
        pass
    assert world.pool.accounts["a"].quota > before
    world.run()
    assert sum(account.quota for account in world.pool.accounts.values()) == world.pool.num_blocks


# -- prefix reuse -----------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("planes_per_block", [1, 8])
def test_a_known_prefix_is_not_computed_again(depth: int, planes_per_block: int) -> None:
    world = World("a", depth=depth, planes_per_block=planes_per_block)
    world.submit("a", prompt=60, family=1, shared=50)
    world.run()
    rid = world.submit("a", prompt=70, family=1, shared=50)
    world.run()
    assert world.answers[rid].cached_tokens == 48
    second = [batch for batch in world.batches() if batch.phase is Phase.PREFILL][1]
    assert (second.entries[0].start, second.entries[0].num_tokens) == (48, 22)


def test_prefixes_of_other_models_are_not_mixed_up() -> None:
    world = World("ab")
    world.submit("a", prompt=60, family=1, shared=60)
    world.run()
    rid = world.submit("b", prompt=60, family=1, shared=60)
    world.run()
    assert world.answers[rid].cached_tokens == 0


def test_cached_prefixes_are_evicted_before_anyone_is_preempted() -> None:
    world = World("a", num_blocks=40)
    world.submit("a", prompt=100, output=2, family=1, shared=100)
    world.run()
    assert world.pool.accounts["a"].cached > 0
    world.submit("a", prompt=100, output=20)
    world.run()
    assert world.unit.stats().models[0].preemptions_recompute == 0


# -- deadlines and failures -------------------------------------------------------------------


def test_a_request_whose_deadline_passes_in_the_queue_is_refused_with_429() -> None:
    world = World("a", max_sequences=1)
    world.submit("a", output=60)
    rid = world.submit("a", deadline_s=0.2)
    world.run()
    assert (world.answers[rid].status, world.answers[rid].tokens) == (429, [])
    assert 0.15 < world.answers[rid].finished_s <= 0.2  # type: ignore[operator]


def test_a_request_that_cannot_make_its_deadline_is_not_computed_late() -> None:
    world = World("a")
    for prompt in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100):
        world.submit("a", prompt=prompt, output=10)
    world.run()  # the cost of a batch is learnt
    world.submit("a", output=20)
    rid = world.submit("a", prompt=100, deadline_s=world.loop.now_s + 0.005)
    world.run()
    assert world.answers[rid].status == 429
    assert world.unit.stats().models[0].refused == 1


def test_a_batch_that_fails_takes_only_its_own_sequences() -> None:
    world = World("ab", wrap=lambda loop, plan: FailingExecutor(loop, fail_model="a", fail_batch=5))
    ids = [world.submit("ab"[i % 2], output=6) for i in range(4)]
    world.run()
    assert [world.answers[rid].status for rid in ids] == [500, 200, 500, 200]


def test_batches_are_data() -> None:
    world = World("ab", num_blocks=100, swap_blocks=100)
    for index in range(12):
        world.submit("ab"[index % 2], prompt=50, output=60)
    world.run()
    for work in world.memory.launched:  # kept as decoded from msgpack by the checked executor
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(work), type=Batch | Copy) == work
