"""What a model over two ranks must give as one rank gives it, whatever the ranks are."""

from typing import Any

from mesh_world import Compute
from real_world import MODELS, RealWorld, prompts
from test_equality import TIE, keys_of, logits_after

from muxrt.core import Batch, Copy
from tests.worker_world import Seat

# Little memory, so that a crowd is preempted; blocks of two planes, one for each rank.
SETTING: dict[str, Any] = {
    "num_groups": 1.0,
    "swap_groups": 2.0,
    "planes_per_block": 2,
    "lanes": 2,
    "depth": 2,
    "max_sequences": 16,
}

# What the scheduler is told, and prompts of each model, their longest, and tokens of each answer.
CASES: list[tuple[dict[str, Any], int, int, int]] = [
    ({}, 8, 120, 24),  # two lanes, at depth 2
    ({"prefill_tokens": 32}, 6, 200, 8),  # in chunks
    ({"preempt": "swap"}, 10, 600, 50),
    ({"preempt": "recompute"}, 10, 600, 50),
]


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


def step_of(seat: Seat) -> int:
    """A chunk of the prompt, then the rest, then a token at a time."""
    return min(seat.pending, 13) if not seat.outputs_scheduled else 1


def serve_a_crowd(
    two: Compute, scheduling: dict[str, Any], count: int, longest: int, output: int
) -> None:
    """One of CASES on one rank and on two."""
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


def serve_prompts_again(two: Compute) -> None:
    """Prompts that come twice find their blocks on every rank."""
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


def draw_and_score(two: Compute) -> None:
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
