"""A model over two ranks says what it says over one, whatever happens to its sequences."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mesh_world import Compute, alone, mesh, over  # noqa: E402
from real_world import DEMO, MODELS, RealWorld, demo_plan, prompts  # noqa: E402
from test_equality import TIE, keys_of, logits_after  # noqa: E402

from muxrt.config.placement import Lanes  # noqa: E402
from muxrt.core import Batch, Copy, SamplingParams  # noqa: E402
from muxrt.worker.executor import LaneExecutor  # noqa: E402
from tests.worker_world import Desk, Reference, Seat, make_plan, write_models  # noqa: E402

# Little memory, so that a crowd is preempted; blocks of two planes, one for each rank.
SETTING: dict[str, Any] = {
    "num_groups": 1.0,
    "swap_groups": 2.0,
    "planes_per_block": 2,
    "lanes": 2,
    "depth": 2,
    "max_sequences": 16,
}


@pytest.fixture(scope="module", params=["shared", "gloo"])
def two(request: pytest.FixtureRequest) -> Iterator[Compute]:
    """The three demo models on two ranks of two lanes."""
    plan = over(request.param, demo_plan(MODELS, tp=2, **SETTING))
    with mesh(plan, {m: DEMO / m for m in MODELS}) as executor:
        yield alone(executor)


def assert_same(one: RealWorld, other: RealWorld) -> None:
    """The same tokens; where sums in another order turn a tie, the same up to there."""
    for first, second in zip(one.served.values(), other.served.values(), strict=True):
        if first.tokens == second.tokens:
            continue
        at = next(
            i for i, (a, b) in enumerate(zip(first.tokens, second.tokens, strict=True)) if a != b
        )
        row = logits_after(first.model, first.prompt, first.tokens[: at + 1])[at]
        behind = row.max() - row[[first.tokens[at], second.tokens[at]]]
        assert behind.max() < TIE, f"{first.model}: {first.tokens} and {second.tokens}"


def submit(world: RealWorld, count: int, longest: int, output: int, **sampling: Any) -> None:
    for model in MODELS:
        for seed, prompt in enumerate(prompts(model, count, longest, seed=count)):
            chosen = sampling | ({"seed": seed} if "temperature" in sampling else {})
            world.submit(model, prompt, output, ignore_eos=True, **chosen)


@pytest.mark.parametrize(
    ("scheduling", "count", "longest", "output"),
    [
        ({}, 8, 120, 24),  # two lanes, at depth 2
        ({"prefill_tokens": 32}, 6, 200, 8),  # in chunks
        ({"preempt": "swap"}, 10, 600, 50),
        ({"preempt": "recompute"}, 10, 600, 50),
    ],
)
def test_two_ranks_give_the_tokens_of_one(
    two: Compute, scheduling: dict[str, Any], count: int, longest: int, output: int
) -> None:
    worlds = [
        RealWorld(**SETTING, **scheduling),
        RealWorld(tp=2, compute=two, **SETTING, **scheduling),
    ]
    for world in worlds:
        submit(world, count, longest, output)
        world.run()
    assert_same(*worlds)
    works = worlds[1].executor.works
    assert {work.lane for work in works if isinstance(work, Batch)} == {0, 1}
    if "preempt" in scheduling:
        assert worlds[1].preempted() > 3
        assert any(isinstance(work, Copy) for work in works) == (scheduling["preempt"] == "swap")


def test_cached_prefixes_lie_on_every_rank(two: Compute) -> None:
    worlds = [RealWorld(**SETTING), RealWorld(tp=2, compute=two, **SETTING)]
    for world in worlds:
        for _ in range(2):
            for model in MODELS:
                block_tokens = world.plan.models[model].layout.block_tokens
                for prompt in prompts(model, 6, 100):
                    keys = keys_of(model, prompt, block_tokens)
                    world.submit(model, prompt, 12, keys, ignore_eos=True)
            world.run()
    assert sum(served.cached_tokens for served in worlds[1].served.values()) > 100
    assert_same(*worlds)


def test_it_draws_and_scores_as_one_rank_does(two: Compute) -> None:
    """Seeds, penalties, logprobs of answers and of prompts in chunks."""
    asked = {"temperature": 0.8, "presence_penalty": 0.5, "logprobs": 3, "prompt_logprobs": 2}
    worlds = [
        RealWorld(prefill_tokens=50, **SETTING),
        RealWorld(prefill_tokens=50, tp=2, compute=two, **SETTING),
    ]
    for world in worlds:
        submit(world, 4, 120, 12, **asked)
        world.run()
    for one, other in zip(*(world.served.values() for world in worlds), strict=True):
        assert one.tokens == other.tokens
        found = other.prompt_logprobs + other.logprobs
        assert len(found) == len(one.prompt) - 1 + 12
        for here, there in zip(one.prompt_logprobs + one.logprobs, found, strict=True):
            assert here.token == there.token
            assert abs(here.logprob - there.logprob) < 1e-3


# -- both lanes at once ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module", params=["shared", "gloo"])
def busy(home: Path, request: pytest.FixtureRequest) -> Iterator[tuple[LaneExecutor, Desk]]:
    """Two models that are cut differently: kv heads dealt out, and one that both ranks hold."""
    plan = over(request.param, make_plan(home, 4, Lanes(split=(1, 1)), tp=2))
    with mesh(plan, {name: home / name for name in plan.models}) as executor:
        yield executor, Desk(plan)


def test_two_busy_lanes_do_not_wait_for_each_other(
    busy: tuple[LaneExecutor, Desk], home: Path
) -> None:
    """Works of both lanes and copies, launched in random orders, several in flight on each."""
    executor, desk = busy
    rng, reference = np.random.default_rng(1), Reference(home)
    for _ in range(4):
        seats = {
            lane: [desk.seat(("wide", "narrow")[lane], 20) for _ in range(3)] for lane in (0, 1)
        }
        for _ in range(8):
            works = []
            for lane in rng.permutation([0, 0, 1, 1]).tolist():
                works.append(desk.batch(lane, [(seat, step_of(seat)) for seat in seats[lane]]))
            noted = dict(zip(works, executor.run(works), strict=True))
            for work, result in noted.items():
                desk.note(work, result)
        moved = [desk.swap_out(seats[0][0])]
        for work, result in zip(moved, executor.run(moved), strict=True):
            desk.note(work, result)
        works = [desk.swap_in(seats[0][0]), desk.decode(1, *seats[1])]
        for work, result in zip(works, executor.run(works), strict=True):
            desk.note(work, result)
        works = [desk.decode(1, *seats[0]), desk.decode(0, *seats[1])]  # lanes change hands
        for work, result in zip(works, executor.run(works), strict=True):
            desk.note(work, result)
        for seat in seats[0] + seats[1]:
            reference.check_greedy(seat.model, seat.prompt, seat.outputs)
            desk.leave(seat)


def step_of(seat: Seat) -> int:
    """A chunk of the prompt, then the rest, then a token at a time."""
    return min(seat.pending, 13) if not seat.outputs_scheduled else 1


def test_a_batch_that_fails_fails_alone(busy: tuple[LaneExecutor, Desk]) -> None:
    executor, desk = busy
    bad = desk.seat("wide", 5)
    bad.prompt[2] = 10_000
    (result,) = executor.run([desk.batch(0, [(bad, 5)])])
    assert result.error is not None and "outside the vocabulary" in result.error
    good = desk.seat("wide", 5, SamplingParams(temperature=0.0))
    (result,) = executor.run([desk.batch(0, [(good, 5)])])
    assert result.error is None and result.tokens[0] is not None
