"""A model over two ranks says what it says over one, whatever happens to its sequences."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mesh_world import Compute, alone, mesh, over  # noqa: E402
from real_world import DEMO, MODELS, demo_plan  # noqa: E402

from muxrt.config.placement import Lanes  # noqa: E402
from muxrt.core import SamplingParams  # noqa: E402
from muxrt.worker.executor import LaneExecutor  # noqa: E402
from tests.rank_worlds import (  # noqa: E402
    CASES,
    SETTING,
    draw_and_score,
    serve_a_crowd,
    serve_prompts_again,
    step_of,
)
from tests.worker_world import Desk, Reference, make_plan, write_models  # noqa: E402


@pytest.fixture(scope="module", params=["shared", "gloo"])
def two(request: pytest.FixtureRequest) -> Iterator[Compute]:
    """The three demo models on two ranks of two lanes."""
    plan = over(request.param, demo_plan(MODELS, tp=2, **SETTING))
    with mesh(plan, {m: DEMO / m for m in MODELS}) as executor:
        yield alone(executor)


@pytest.mark.parametrize(("scheduling", "count", "longest", "output"), CASES)
def test_two_ranks_give_the_tokens_of_one(
    two: Compute, scheduling: dict[str, Any], count: int, longest: int, output: int
) -> None:
    serve_a_crowd(two, scheduling, count, longest, output)


def test_cached_prefixes_lie_on_every_rank(two: Compute) -> None:
    serve_prompts_again(two)


def test_it_draws_and_scores_as_one_rank_does(two: Compute) -> None:
    draw_and_score(two)


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


def test_a_batch_that_fails_fails_alone(busy: tuple[LaneExecutor, Desk]) -> None:
    executor, desk = busy
    bad = desk.seat("wide", 5)
    bad.prompt[2] = 10_000
    (result,) = executor.run([desk.batch(0, [(bad, 5)])])
    assert result.error is not None and "outside the vocabulary" in result.error
    good = desk.seat("wide", 5, SamplingParams(temperature=0.0))
    (result,) = executor.run([desk.batch(0, [(good, 5)])])
    assert result.error is None and result.tokens[0] is not None
