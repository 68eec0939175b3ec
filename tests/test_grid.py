"""Which passes a profile measures: enough for a fit first, none twice, none that does not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxrt.config.presets import PRESETS
from muxrt.core import Phase
from muxrt.cost.fitted import fit
from muxrt.cost.grid import Pass, levels
from muxrt.cost.profile import Cell


def cell(one: Pass) -> Cell:
    """A cell of a pass that takes 1 us a token, but for a base of 1 ms."""
    time_s = 1e-3 + 1e-6 * one.tokens
    times = (time_s, None) if one.phase is Phase.PREFILL else (None, time_s)
    return Cell("m", 1, 100, one.batch, one.seq_len, *times)


@given(st.integers(8, 5000), st.integers(200, 100_000))
def test_no_pass_is_there_twice_or_too_large(max_tokens: int, kv_tokens: int) -> None:
    passes = [one for level in levels(max_tokens, kv_tokens) for one in level]
    assert len(passes) == len(set(passes))
    for one in passes:
        assert 1 <= one.seq_len < max_tokens
        assert one.tokens <= kv_tokens


@pytest.mark.parametrize("max_tokens", [16, 96, 256, 1024, 4096, 131_072])
def test_the_first_level_alone_can_be_fitted(max_tokens: int) -> None:
    first = levels(max_tokens, 50_000)[0]
    steps = fit([cell(one) for one in first], PRESETS["llama-7b"], "test").at(1.0)
    for one in first:
        time_s = 1e-3 + 1e-6 * one.tokens
        if one.phase is Phase.DECODE:
            assert steps.decode_s(one.batch, one.tokens) == pytest.approx(time_s, rel=0.1)
        else:
            found = steps.prefill_s(one.tokens, one.tokens * one.seq_len)
            assert found == pytest.approx(time_s, rel=0.1)


def test_prefills_are_batches_that_the_scheduler_makes() -> None:
    prefills = [
        one for level in levels(131_072, 10**6) for one in level if one.phase.name[0] == "P"
    ]
    assert max(one.tokens for one in prefills) == 512
