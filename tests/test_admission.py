"""When a prefill may start without costing running sequences their time per output token."""

from dataclasses import dataclass

import pytest

from muxrt.config.placement import Slo
from muxrt.core import Request, Sequence
from muxrt.cost.latency import BatchShape
from muxrt.kvcache.layout import KvShape, ModelLayout
from muxrt.sched.admission import Admission, Allowance, Need
from muxrt.sched.policies.turns import TimedTurns
from muxrt.sched.queues import ModelQueue, ServedModel

FULL = 512
TARGET = Slo(ttft_s=1.0, tpot_s=0.1)


@dataclass
class KnownLatency:
    """A machine that is known exactly: 10 ms a batch and 1 ms a token, unless told otherwise."""

    batch_s: float = 0.01
    token_s: float = 0.001

    def predict(self, model: str, shape: BatchShape) -> float | None:
        return self.batch_s + self.token_s * shape.num_tokens

    def observe(self, model: str, shape: BatchShape, elapsed_s: float) -> None:
        raise AssertionError("admission only asks")


def queue_of(name: str, first_tokens: list[float], slo: Slo | None = TARGET) -> ModelQueue:
    """A model with one decoding sequence per time of a first token, and no token after that."""
    layout = ModelLayout(KvShape(name, 1, 1, 8, 4), 16, 1)
    queue = ModelQueue(ServedModel(name, layout, 128, 256, slo))
    for order, at_s in enumerate(first_tokens):
        sequence = Sequence(Request(order, name, 10, 50, b""), order)
        queue.waiting.append(sequence)
        queue.start(sequence)
        sequence.num_scheduled, sequence.outputs_scheduled = 10, 1
        queue.prefilled(sequence)
        sequence.outputs_committed, sequence.first_token_s = 1, at_s
    return queue


def admission(
    *queues: ModelQueue, lanes: int = 1, beside_share: float = 1.0, **latency: float
) -> Admission:
    by_name = {queue.name: queue for queue in queues}
    return Admission(by_name, KnownLatency(**latency), lanes, FULL, beside_share)


def ask(
    asked: Admission, now: float, tokens: int = 20, deadline_s: float | None = None
) -> Allowance:
    return asked.allowance("a", Need(tokens, deadline_s), now)


def test_without_targets_or_without_anyone_running_nobody_is_held_back() -> None:
    everything = Allowance(FULL, 256)
    assert ask(admission(queue_of("a", [])), 0.0) == everything
    assert ask(admission(queue_of("a", [0.0] * 200, slo=None)), 99.0) == everything


@pytest.mark.parametrize(
    ("now", "tokens", "may_start"),
    # The next token is due at 0.1; a decode step takes 11 ms, a prefill 10 ms and 1 ms a token.
    [(0.0, 70, True), (0.0, 80, False), (0.03, 40, True), (0.05, 40, False)],
)
def test_a_prefill_ends_before_anybody_falls_behind(
    now: float, tokens: int, may_start: bool
) -> None:
    assert (ask(admission(queue_of("a", [0.0])), now, tokens).tokens > 0) is may_start


def test_more_prompts_share_the_prefill_as_far_as_time_goes() -> None:
    allowed = ask(admission(queue_of("a", [0.0])), now=-0.2, tokens=20)
    assert 150 <= allowed.tokens <= 280  # 0.3 s to spare, less a decode step and what a batch costs


def test_a_prefill_is_no_larger_than_the_deadline_of_its_first_prompt_allows() -> None:
    idle_for_long = admission(queue_of("a", [1.0]))
    assert ask(idle_for_long, now=0.0, deadline_s=0.2).tokens <= 190
    # It alone would be too late: that is not for admission to judge.
    assert ask(idle_for_long, now=0.0, tokens=100, deadline_s=0.05).tokens == 100


def test_only_as_many_start_as_the_decode_steps_of_all_models_have_room_for() -> None:
    # 0.9 x 0.1 s less two steps: a's 10 ms and 30 x 1 ms, b's 10 ms and 10 x 1 ms.
    two = admission(queue_of("a", [9.0] * 30), queue_of("b", [9.0] * 10))
    assert ask(two, 0.0).sequences == pytest.approx(30, abs=1)
    full = admission(queue_of("a", [9.0] * 85))
    assert ask(full, 0.0).sequences == 0


def test_two_lanes_have_room_for_more() -> None:
    queues = queue_of("a", [9.0] * 30), queue_of("b", [9.0] * 10)
    one, two = (ask(admission(*queues, lanes=n), 0.0).sequences for n in (1, 2))
    assert two > 2 * one


def test_a_lane_that_keeps_the_pace_lets_another_prefill() -> None:
    assert ask(admission(queue_of("a", [0.0]), lanes=2), now=0.05, tokens=500).tokens == FULL


@pytest.mark.parametrize(("beside_share", "may_start"), [(1.0, True), (0.7, True), (0.5, False)])
def test_a_policy_says_how_well_the_other_lanes_must_keep_the_pace(
    beside_share: float, may_start: bool
) -> None:
    # A step of 50 sequences takes 60 ms of the 100 that its pace allows.
    queue = queue_of("a", [0.0] * 50)
    asked = admission(queue, lanes=2, beside_share=beside_share)
    assert (ask(asked, now=0.0, tokens=100).tokens > 0) is may_start


def test_other_models_sequences_count() -> None:
    assert ask(admission(queue_of("a", []), queue_of("b", [0.0])), 0.05, 60).tokens == 0


def test_a_target_that_one_sequence_alone_would_miss_binds_nobody() -> None:
    assert ask(admission(queue_of("a", [0.0]), batch_s=0.2), 0.05) == Allowance(FULL, 256)


def test_who_is_hopelessly_behind_is_not_waited_for() -> None:
    late = queue_of("a", [-0.5])
    assert ask(admission(late), now=0.0).tokens == 0
    assert ask(admission(late), now=5.0).tokens == FULL


def test_what_was_computed_is_forgotten_when_the_queue_changes() -> None:
    queue = queue_of("a", [0.0])
    asked = admission(queue)
    assert ask(asked, 0.05, 60).tokens == 0
    queue.running[0].outputs_committed = 10
    queue.changed()
    assert ask(asked, 0.05, 60).tokens > 0


# -- turns by time ----------------------------------------------------------------------------


def test_models_get_the_same_time_not_the_same_number_of_turns() -> None:
    turns, spent = TimedTurns(), {"slow": 0.0, "fast": 0.0}
    for _ in range(100):
        model = turns.order(spent)[0]
        seconds = {"slow": 3.0, "fast": 1.0}[model]
        spent[model] += seconds
        turns.served(model, seconds)
    assert abs(spent["slow"] - spent["fast"]) <= 3.0


def test_equal_turns_are_round_robin() -> None:
    turns, seen = TimedTurns(), []
    for _ in range(6):
        seen.append(turns.order("abc")[0])
        turns.served(seen[-1], 0.5)
    assert seen == list("abcabc")


def test_who_was_away_has_saved_nothing_up() -> None:
    turns = TimedTurns()
    for _ in range(50):
        turns.served("a", 1.0)
    seen = []
    for _ in range(4):
        seen.append(turns.order("ab")[0])
        turns.served(seen[-1], 1.0)
    assert sorted(seen) == list("aabb")
