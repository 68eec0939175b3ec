"""Served tokens against `transformers`, in float32, for every way a sequence can be scheduled."""

import hashlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from real_world import DEMO, MODELS, RealWorld, prompts

from muxrt.config.placement import Slo
from muxrt.core import Batch

NUM_PROMPTS = 50
OUTPUT = 24
TIE = 1e-4  # logits closer than this may swap places between two ways to add the same numbers


@cache
def reference(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO / model, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_after(model: str, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The reference's logits before each of `tokens`, teacher-forced. [tokens, vocab]."""
    ids = torch.tensor([prompt + tokens])
    return reference(model)(ids).logits[0, len(prompt) - 1 : -1].float()


def assert_greedy(world: RealWorld) -> None:
    """Every served token is the reference's choice after the tokens before it."""
    for served in world.served.values():
        logits = logits_after(served.model, served.prompt, served.tokens)
        chosen = logits.gather(1, torch.tensor(served.tokens)[:, None])[:, 0]
        behind = logits.max(dim=1).values - chosen
        assert behind.max() < TIE, f"{served.model}: {served.tokens} is not greedy"


def keys_of(model: str, tokens: list[int], block_tokens: int) -> tuple[bytes, ...]:
    keys, chain = [], model.encode()
    for end in range(block_tokens, len(tokens), block_tokens):
        part = np.array(tokens[end - block_tokens : end], np.int32).tobytes()
        chain = hashlib.blake2b(chain + part, digest_size=16).digest()
        keys.append(chain)
    return tuple(keys)


@pytest.mark.parametrize("planes_per_block", [1, 8])
@pytest.mark.parametrize("model", MODELS)
def test_alone(model: str, planes_per_block: int) -> None:
    world = RealWorld((model,), planes_per_block=planes_per_block)
    for prompt in prompts(model, NUM_PROMPTS, 120):
        world.submit(model, prompt, OUTPUT, ignore_eos=True)
        world.run()
    assert_greedy(world)


def crowd(
    world: RealWorld, count: int = NUM_PROMPTS, longest: int = 120, reuse: bool = False
) -> None:
    """`count` prompts for every model at once; what does not fit waits."""
    for model in world.plan.models:
        layout = world.plan.models[model].layout
        for prompt in prompts(model, count, longest):
            keys = keys_of(model, prompt, layout.block_tokens) if reuse else ()
            world.submit(model, prompt, OUTPUT, keys, ignore_eos=True)


@pytest.mark.parametrize(("lanes", "depth"), [(1, 1), (1, 2), (2, 2)])
def test_16_at_once_of_three_models_in_one_arena(lanes: int, depth: int) -> None:
    world = RealWorld(lanes=lanes, depth=depth, max_sequences=16)
    crowd(world)
    world.run()
    assert_greedy(world)


@pytest.mark.parametrize(("lanes", "depth"), [(1, 1), (2, 2)])
def test_the_policy_changes_when_a_token_comes_not_which(lanes: int, depth: int) -> None:
    """With targets that a third of the requests miss: `slo` starts them in another order."""
    worlds = {}
    for policy in ("adbs", "slo"):
        world = worlds[policy] = RealWorld(
            lanes=lanes, depth=depth, max_sequences=8, policy=policy, slo=Slo(0.3, 0.05)
        )
        crowd(world, count=20)
        world.run()
    adbs, slo = worlds["adbs"], worlds["slo"]
    assert [s.tokens for s in slo.served.values()] == [s.tokens for s in adbs.served.values()]
    asked = [[w.opened for w in x.executor.works if isinstance(w, Batch)] for x in (adbs, slo)]
    assert asked[0] != asked[1]
    assert_greedy(slo)


@pytest.mark.parametrize("prefill_tokens", [16, 50])
def test_chunked_prefill(prefill_tokens: int) -> None:
    world = RealWorld(prefill_tokens=prefill_tokens, max_sequences=16)
    crowd(world)
    world.run()
    assert_greedy(world)


def test_prefix_reuse() -> None:
    world = RealWorld(max_sequences=16)
    for _ in range(2):
        crowd(world, reuse=True)
        world.run()
    again = list(world.served.values())[len(world.served) // 2 :]
    assert sum(served.cached_tokens for served in again) > 1000
    assert_greedy(world)


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
@pytest.mark.parametrize("depth", [1, 2])
def test_forced_preemption(preempt: str, depth: int) -> None:
    world = RealWorld(
        num_groups=1.0, swap_groups=2.0, depth=depth, preempt=preempt, max_sequences=16
    )
    for model in MODELS:
        for prompt in prompts(model, 12, 600, seed=1):
            world.submit(model, prompt, 200, ignore_eos=True)
    world.run()
    assert world.preempted() > 5
    assert_greedy(world)


def test_bfloat16_kv_stays_close() -> None:
    """K and V in bfloat16 (8 bits of mantissa) against float32, teacher-forced: a stated error."""
    world = RealWorld(kv_dtype="bfloat16", max_sequences=16)
    crowd(world, count=20)
    world.run()
    for served in world.served.values():
        logits = logits_after(served.model, served.prompt, served.tokens)
        chosen = logits.gather(1, torch.tensor(served.tokens)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() < 0.25


def test_bfloat16_weights_are_what_was_published() -> None:
    """The demo models come in bfloat16: kept so, nothing is lost, for sums are in float32."""
    world = RealWorld(weights="bfloat16", max_sequences=16)
    crowd(world, count=20)
    world.run()
    assert_greedy(world)


def test_int8_weights_stay_close() -> None:
    """Linear layers in int8 against float32, teacher-forced: the stated errors."""
    world = RealWorld(weights="int8", max_sequences=16)
    crowd(world, count=20)
    world.run()
    behind = []
    for served in world.served.values():
        logits = logits_after(served.model, served.prompt, served.tokens)
        chosen = logits.gather(1, torch.tensor(served.tokens)[:, None])[:, 0]
        behind.append(logits.max(dim=1).values - chosen)
    errors = torch.cat(behind)
    assert errors.max() < 0.5, "logits behind the reference's best"
    assert 0 < (errors > 0).float().mean() < 0.04, "share of tokens that are not the best"


@pytest.mark.parametrize("model", MODELS)
def test_logprobs(model: str) -> None:
    world = RealWorld((model,), prefill_tokens=50)
    for prompt in prompts(model, 10, 120):
        world.submit(model, prompt, 8, ignore_eos=True, logprobs=5, prompt_logprobs=3)
    world.run()
    for served in world.served.values():
        wanted = logits_after(model, served.prompt[:1], served.prompt[1:] + served.tokens)
        wanted = wanted.log_softmax(dim=-1)
        found = served.prompt_logprobs + served.logprobs
        assert [entry.token for entry in found] == served.prompt[1:] + served.tokens
        for row, entry in zip(wanted, found, strict=True):
            assert abs(row[entry.token] - entry.logprob) < 1e-3
            top = row.topk(len(entry.top_tokens))
            assert (top.values - torch.tensor(entry.top_logprobs)).abs().max() < 1e-3


def test_the_same_seed_draws_the_same_tokens_whatever_the_batch() -> None:
    """Alone, and among 16 others."""
    model = MODELS[0]
    alone, crowded = RealWorld((model,)), RealWorld((model,), max_sequences=32)
    texts = prompts(model, 17, 60)
    for seed, prompt in enumerate(texts):
        alone.submit(model, prompt, OUTPUT, temperature=0.8, seed=seed, ignore_eos=True)
        alone.run()
        crowded.submit(model, prompt, OUTPUT, temperature=0.8, seed=seed, ignore_eos=True)
    crowded.run()
    for request, served in alone.served.items():
        assert served.tokens == crowded.served[request].tokens
