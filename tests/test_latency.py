"""The online latency fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxrt.core import BatchEntry
from muxrt.cost.latency import MIN_OBSERVATIONS, BatchShape, OnlineLatency, attention_work


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 7), (10, 1), (10, 5)])
def test_attention_work_counts_every_key_a_token_sees(start: int, tokens: int) -> None:
    assert attention_work(start, tokens) == sum(start + i + 1 for i in range(tokens))


def test_a_batch_adds_up() -> None:
    entries = [BatchEntry(0, 10, 1, True), BatchEntry(1, 0, 4, True)]
    assert BatchShape.of(entries) == BatchShape(5, 11 + 10)


def fitted(coefficients: tuple[float, float, float]) -> OnlineLatency:
    latency, (constant, token, attention) = OnlineLatency(), coefficients
    for tokens in (1, 2, 8, 32, 100, 300, 512):
        for context in (0, 100, 900):
            shape = BatchShape(tokens, attention_work(context, tokens))
            elapsed_s = constant + token * tokens + attention * shape.attention_tokens
            latency.observe("m", shape, elapsed_s)
    return latency


def test_a_linear_machine_is_learnt_exactly() -> None:
    latency = fitted((5e-3, 2e-4, 3e-8))
    predicted = latency.predict("m", BatchShape(64, attention_work(200, 64)))
    assert predicted == pytest.approx(5e-3 + 64 * 2e-4 + 3e-8 * attention_work(200, 64), rel=1e-6)


def test_more_work_is_never_predicted_faster() -> None:
    # Slower per token for small batches: an unconstrained fit would go negative somewhere.
    latency = OnlineLatency()
    for tokens in range(1, 40):
        latency.observe("m", BatchShape(tokens, tokens * 100), 0.01 / tokens)
    times = [latency.predict("m", BatchShape(t, t * 100)) for t in (1, 10, 100, 1000)]
    assert times == sorted(times, key=lambda time: time or 0.0)


def test_hundreds_of_decode_steps_do_not_wipe_out_what_a_prefill_takes() -> None:
    latency = OnlineLatency()
    for tokens in (100, 300, 500) * 4:
        latency.observe("m", BatchShape(tokens, 0), 0.01 + 0.001 * tokens)
    for step in range(300):  # from these alone a token seems to cost nothing, or ten times as much
        latency.observe("m", BatchShape(1 + step % 3, 0), (0.01 + 0.001) * (0.9 + step % 4 / 15))
    assert latency.predict("m", BatchShape(400, 0)) == pytest.approx(0.41, rel=0.1)


def test_nothing_is_claimed_before_it_was_seen() -> None:
    latency = OnlineLatency()
    for _ in range(MIN_OBSERVATIONS - 1):
        latency.observe("m", BatchShape(1, 1), 0.01)
    assert latency.predict("m", BatchShape(1, 1)) is None
    assert latency.predict("other", BatchShape(1, 1)) is None


def test_a_machine_that_changes_is_followed() -> None:
    latency = fitted((5e-3, 2e-4, 0.0))
    for _ in range(2000):
        latency.observe("m", BatchShape(1, 100), 20e-3)
    assert latency.predict("m", BatchShape(1, 100)) == pytest.approx(20e-3, rel=0.05)


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 1, 3, 4, 200]), st.integers(1, 9), st.integers(0, 10**4)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.0, 0.01, 0.02]),
)
def test_many_batches_at_once_are_one_after_the_other(
    runs: list[tuple[int, int, int]], odd_s: float
) -> None:
    """To the last bit, whatever sizes alternate; a batch of no time is counted and no more."""
    one, all_ = OnlineLatency(), OnlineLatency()
    for latency in (one, all_):
        latency.observe("m", BatchShape(2, 7), 0.003)
    num_tokens = np.array([tokens for tokens, times, _ in runs for _ in range(5 * times)], int)
    attention = np.array([a + i for _, times, a in runs for i in range(5 * times)], int)
    elapsed_s = 0.01 + 1e-6 * attention + 1e-4 * num_tokens
    elapsed_s[3::7] = odd_s
    for tokens, attended, seconds in zip(num_tokens, attention, elapsed_s, strict=True):
        one.observe("m", BatchShape(int(tokens), int(attended)), float(seconds))
    all_.observe_all("m", num_tokens, attention, elapsed_s)
    for shape in (BatchShape(1, 50), BatchShape(4, 900), BatchShape(300, 10**5)):
        assert one.predict("m", shape) == all_.predict("m", shape)
