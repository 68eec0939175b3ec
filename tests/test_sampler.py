"""The sampler against a slow reference, against statistics, and seed against batch."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from muxrt.core import SamplingParams  # noqa: E402
from muxrt.kernels import Team, warm_up  # noqa: E402
from muxrt.worker import sampler  # noqa: E402
from muxrt.worker.sampler import BadLogits, Drawn, Sampling, uniforms  # noqa: E402

VOCAB = 97
EOS = (2, 5)
GREEDY = SamplingParams(temperature=0.0)

warm_up()


@dataclass
class Row:
    """One sequence: what it asked for, its tokens so far, and its next logits."""

    params: SamplingParams
    tokens: list[int]
    prompt_tokens: int
    logits: list[float]


def draw(rows: list[Row], slots: list[int] | None = None) -> Drawn:
    """All rows in one batch, row i in slot `slots[i]`."""
    slots = slots or list(range(len(rows)))
    sampling = Sampling(max(slots) + 1, VOCAB, EOS)
    history = np.zeros((max(slots) + 1, 64), dtype=np.int32)
    for row, slot in zip(rows, slots, strict=True):
        sampling.open(slot, row.prompt_tokens, row.params)
        history[slot, : len(row.tokens)] = row.tokens
    logits = torch.tensor([row.logits for row in rows], dtype=torch.float32)
    positions = np.array([len(row.tokens) for row in rows])
    with Team() as team:
        return sampling.draw(logits, np.array(slots), positions, history, team)


# -- the reference: one row, plain Python, float64 ---------------------------------------------


def reference_logits(row: Row) -> list[float]:
    params, logits = row.params, list(row.logits)
    outputs = row.tokens[row.prompt_tokens :]
    for token in set(row.tokens):
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(outputs):
        logits[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        if token < VOCAB:
            logits[token] += bias
    if len(outputs) < params.min_tokens:
        for token in stops(params):
            logits[token] = -math.inf
    return logits


def stops(params: SamplingParams) -> set[int]:
    return {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}


def reference_probs(row: Row) -> list[float]:
    """The filtered distribution, normalised."""
    logits, params = reference_logits(row), row.params
    top = max(logits)
    weights = [math.exp((logit - top) / params.temperature) for logit in logits]
    probs = [weight / sum(weights) for weight in weights]
    ranked = sorted(probs, reverse=True)
    ranked = ranked[: params.top_k or VOCAB]
    floor = max(ranked[-1], params.min_p * ranked[0])
    if params.top_p < 1:
        mass, goal = 0.0, params.top_p * sum(ranked)
        for prob in ranked:
            mass += prob
            if mass >= goal:
                floor = max(floor, prob)
                break
    kept = [prob if prob >= floor else 0.0 for prob in probs]
    return [prob / sum(kept) for prob in kept]


def may_draw(row: Row, token: int) -> bool:
    """`token` is the reference's, or rounding alone separates it from that."""
    if row.params.temperature == 0:
        logits = reference_logits(row)
        return logits[token] >= max(logits) - 1e-4
    number = uniforms(
        np.array([row.params.seed], dtype=np.uint64), np.array([len(row.tokens)])
    ).item()
    for slack in (0.0, 1e-4, -1e-4):
        mass = 0.0
        for candidate, prob in enumerate(reference_probs(row)):
            mass += prob
            if mass > number + slack:
                if candidate == token:
                    return True
                break
    return False


def is_near_an_edge(row: Row) -> bool:
    """A filter's cut lies so near a token that float32 may decide it otherwise."""
    if row.params.temperature == 0:
        return False
    nudged = [
        {
            "temperature": row.params.temperature * factor,
            "top_p": min(1.0, row.params.top_p * other),
        }
        for factor, other in ((1 + 1e-5, 1), (1 - 1e-5, 1), (1, 1 + 1e-5), (1, 1 - 1e-5))
    ]
    support = [prob > 0 for prob in reference_probs(row)]
    for change in nudged:
        params = SamplingParams(**{**asdict(row.params), **change})
        other = Row(params, row.tokens, row.prompt_tokens, row.logits)
        if [prob > 0 for prob in reference_probs(other)] != support:
            return True
    # The floor of min-p is a product, whose own rounding no nudge above reaches.
    probs = reference_probs(Row(SamplingParams(), row.tokens, row.prompt_tokens, row.logits))
    heated = [p / max(probs) for p in probs]
    return any(
        abs(p ** (1 / row.params.temperature) - row.params.min_p) < 1e-5 * (p + 1e-3)
        for p in heated
    )


def asdict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


token = st.integers(0, VOCAB - 1)
small = st.sampled_from([0.0, 0.0, 0.7, -0.5, 1.5])


@st.composite
def rows(draw_from: st.DrawFn) -> Row:
    params = SamplingParams(
        temperature=draw_from(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_p=draw_from(st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.05])),
        top_k=draw_from(st.sampled_from([None, 1, 3, 40, 500])),
        min_p=draw_from(st.sampled_from([0.0, 0.0, 0.1])),
        presence_penalty=draw_from(small),
        frequency_penalty=draw_from(small),
        repetition_penalty=draw_from(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        logit_bias=draw_from(
            st.dictionaries(st.integers(0, VOCAB + 9), st.sampled_from([-100.0, 2.0]), max_size=3)
        ),
        seed=draw_from(st.integers(-(2**63), 2**64 - 1).map(lambda seed: seed % 2**64)),
        min_tokens=draw_from(st.sampled_from([0, 0, 2, 50])),
        ignore_eos=draw_from(st.booleans()),
        stop_token_ids=tuple(draw_from(st.lists(token, max_size=2))),
    )
    tokens = draw_from(st.lists(token, min_size=1, max_size=40))
    prompt_tokens = draw_from(st.integers(1, len(tokens)))
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32)))
    logits = rng.normal(scale=draw_from(st.sampled_from([0.5, 3.0])), size=VOCAB)
    return Row(params, tokens, prompt_tokens, logits.astype(np.float32).tolist())


@settings(max_examples=150, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=5))
def test_every_row_draws_what_the_reference_draws(batch: list[Row]) -> None:
    drawn = draw(batch)
    for row, chosen, stopped in zip(batch, drawn.tokens, drawn.stopped, strict=True):
        assert stopped == (chosen in stops(row.params))
        assert is_near_an_edge(row) or may_draw(row, chosen), (row, chosen)


def some_row(logits_seed: int = 0, /, **params: Any) -> Row:
    logits = (
        np.random.default_rng(logits_seed).normal(scale=2, size=VOCAB).astype(np.float32).tolist()
    )
    return Row(SamplingParams(**params), [1, 7, 7, 9], 2, logits)


def test_draws_follow_the_distribution() -> None:
    row = some_row(temperature=1.2, top_k=20, top_p=0.95, min_p=0.02)
    count = 20_000
    many = [
        Row(SamplingParams(**{**asdict(row.params), "seed": i}), *rest(row)) for i in range(count)
    ]
    found = np.bincount(draw(many).tokens, minlength=VOCAB)
    expected = np.array(reference_probs(row)) * count
    assert not found[expected == 0].any()
    likely = expected > 0
    chi2 = float((((found - expected) ** 2)[likely] / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    # Mean `freedom`, deviation sqrt(2 freedom): five of them is one wrong alarm in a million.
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def rest(row: Row) -> tuple[list[int], int, list[float]]:
    return row.tokens, row.prompt_tokens, row.logits


def test_uniforms_are_uniform_over_seeds_and_over_positions() -> None:
    grid = np.arange(100_000)
    for seeds, positions in (
        (grid.astype(np.uint64), np.full_like(grid, 17)),
        (np.full_like(grid, 17).astype(np.uint64), grid),
    ):
        numbers = np.sort(uniforms(seeds, positions))
        distance = np.abs(numbers - (grid + 0.5) / len(grid)).max()  # Kolmogorov-Smirnov
        assert distance < 2.0 / math.sqrt(len(grid))
        drawn = uniforms(seeds, positions)
        assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / math.sqrt(len(grid))
        assert numbers[0] >= 0 and numbers[-1] < 1


@pytest.mark.parametrize("others", ["random", "greedy", "penalised"])
def test_a_seed_draws_the_same_alone_and_among_sixteen(others: str) -> None:
    extra: dict[str, dict[str, Any]] = {
        "random": {"temperature": 1.5, "top_p": 0.7},
        "greedy": {"temperature": 0.0},
        "penalised": {"presence_penalty": 1.0, "logprobs": 3, "top_k": 5},
    }
    for seed in range(20):
        mine = some_row(seed, seed=seed, temperature=0.9, top_p=0.9)
        batch = [some_row(100 + i, seed=i, **extra[others]) for i in range(15)]
        alone = draw([mine]).tokens[0]
        for place in (0, 7, 15):
            together = draw([*batch[:place], mine, *batch[place:]], list(range(16))[::-1])
            assert together.tokens[place] == alone


def test_positions_draw_different_numbers() -> None:
    params = SamplingParams(seed=3)
    flat = [0.0] * VOCAB
    drawn = draw([Row(params, [1] * length, 1, flat) for length in range(1, 40)]).tokens
    assert len(set(drawn)) > 20


def test_logprobs_are_the_models_own_whatever_the_knobs() -> None:
    row = some_row(
        temperature=0.2, presence_penalty=2.0, logit_bias={3: 100.0}, logprobs=4, top_k=2
    )
    plain = some_row(temperature=0.0)
    drawn = draw([row, plain])
    assert drawn.logprobs is not None and drawn.logprobs[1] is None
    found = drawn.logprobs[0]
    expected = torch.tensor(row.logits, dtype=torch.float64).log_softmax(-1)
    assert found is not None and found.token == drawn.tokens[0] == 3
    assert found.logprob == pytest.approx(float(expected[3]), abs=1e-5)
    best = expected.topk(4)
    assert found.top_tokens == tuple(best.indices.tolist())
    assert found.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_of_none_but_the_chosen_token() -> None:
    drawn = draw([some_row(temperature=0.0, logprobs=0)])
    assert drawn.logprobs is not None and drawn.logprobs[0] is not None
    assert drawn.logprobs[0].top_tokens == ()


def test_a_reopened_slot_forgets_what_it_was_asked_before() -> None:
    sampling = Sampling(1, VOCAB, EOS)
    sampling.open(0, 2, SamplingParams(logit_bias={3: 100.0}, ignore_eos=True, logprobs=2))
    sampling.open(0, 2, GREEDY)
    row = some_row()
    row.logits[EOS[1]] = 50.0
    logits = torch.tensor([row.logits])
    history = np.zeros((1, 8), dtype=np.int32)
    with Team(size=2) as team:
        drawn = sampling.draw(logits, np.array([0]), np.array([4]), history, team)
    assert (drawn.tokens, drawn.stopped, drawn.logprobs) == ([EOS[1]], [True], None)


def test_a_batch_larger_than_a_slice_is_drawn_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [some_row(i, seed=i, logprobs=i % 2 or None, temperature=i % 3) for i in range(11)]
    whole = draw(batch)
    monkeypatch.setattr(sampler, "SLICE_ELEMS", 2 * VOCAB)
    assert draw(batch) == whole


def test_a_wide_nucleus_is_cut_where_the_reference_cuts() -> None:
    """Nearly equal probabilities: the cut falls into a bucket with many others."""
    row = some_row(temperature=50.0, top_p=0.9)
    assert sum(prob > 0 for prob in reference_probs(row)) > 64
    drawn = draw(
        [Row(SamplingParams(**{**asdict(row.params), "seed": i}), *rest(row)) for i in range(5000)]
    )
    support = {i for i, prob in enumerate(reference_probs(row)) if prob > 0}
    assert set(drawn.tokens) <= support
    assert len(set(drawn.tokens)) > 0.95 * len(support)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_logits_are_an_error(bad: float) -> None:
    row = some_row(temperature=0.0)
    row.logits[4] = bad
    with pytest.raises(BadLogits):
        draw([some_row(), row])


def test_a_cold_temperature_is_greedy() -> None:
    row = some_row(temperature=1e-12)
    assert draw([row]).tokens[0] == int(np.argmax(row.logits))
