"""The clock is all that differs between serving and simulating: the same works, byte for byte."""

from random import Random

import msgspec
import numpy as np
import pytest
from clock_world import CORES, Asked, RealRun, Replay
from handoff_world import split_plan
from real_world import MODELS, demo_plan, prompts

from muxrt.core import Batch, Copy, Phase, Transfer, Work
from muxrt.engine.build import UnitPlan
from muxrt.server.prefix_keys import prefix_keys


def workload(seed: int, plan: UnitPlan) -> list[Asked]:
    """More than memory holds at once, for three models; prompts that come again share blocks.

    Some have no patience and are refused, some clients leave; of those that come first nobody
    does, and their answers are long: they need more than there is, on a slow machine too.
    The last come late, one after the other with one prompt: they find it in the cache.
    """
    random, at_s, found = Random(seed), 0.0, list[Asked]()
    pools = {model: prompts(model, 24, 300, seed=seed) for model in MODELS}
    for index in range(52):
        is_first, is_last = index < 30, index >= 48
        at_s += 0.0 if is_first else 0.3 if is_last else random.expovariate(60)
        model = MODELS[0] if is_last else random.choice(MODELS)
        prompt = pools[model][0 if is_last else index // 2]
        tokens = np.array(prompt, "<i4").tobytes()
        found.append(
            Asked(
                at_s,
                model,
                prompt,
                random.randint(150 if is_first else 1, 250),
                prefix_keys(model, tokens, plan.models[model].layout.block_tokens),
                patience_s=random.choice(
                    [None] * 4 + [0.0]
                    if is_first
                    else [None]
                    if is_last
                    else [None, None, 0.0, 0.5]
                ),
                leaves_s=None if is_first or is_last else random.choice([0.2, *[None] * 3]),
                ignores_eos=is_first or random.random() < 0.4,
            )
        )
    return found


def decisions(works: list[Work]) -> list[bytes]:
    """What was launched, as it goes over the wire, without prompts: only the worker reads those."""
    return [msgspec.msgpack.encode(_decision(work)) for work in works]


def _decision(work: Work) -> Work:
    if not isinstance(work, Batch):
        return work
    opened = tuple(msgspec.structs.replace(slot, payload=b"") for slot in work.opened)
    return msgspec.structs.replace(work, opened=opened)


@pytest.mark.parametrize("policy", ["fcfs", "round-robin", "adbs"])
@pytest.mark.parametrize(
    ("lanes", "depth", "preempt"), [(1, 1, "recompute"), (2, 1, "swap"), (2, 2, "auto")]
)
def test_every_work_is_the_same_in_both_worlds(
    policy: str, lanes: int, depth: int, preempt: str
) -> None:
    if lanes > len(CORES):
        pytest.skip(f"needs {lanes} cores")
    plan = demo_plan(
        lanes=lanes, depth=depth, num_groups=1.1, swap_groups=0.5, policy=policy,
        prefill_tokens=128, quota_period_s=0.05, max_sequences=16, preempt=preempt,
    )  # fmt: skip
    asked = workload(3, plan)
    real = RealRun(plan, asked).log
    simulated = Replay(plan, asked, real).log
    wanted, found = decisions(real.works), decisions(simulated.works)
    for number, (one, other) in enumerate(zip(wanted, found, strict=False)):
        assert one == other, f"work {number} of {len(wanted)}"
    assert len(found) == len(wanted)
    assert simulated.tokens == real.tokens and simulated.refused == real.refused
    # The case is worth it.
    phases = {work.phase for work in real.works if isinstance(work, Batch)}
    assert {Phase.PREFILL, Phase.DECODE} <= phases and len(wanted) > 100
    assert {work.lane for work in real.works if isinstance(work, Batch)} == set(range(lanes))
    assert len(real.ticks_s) > 0 and len(real.left_s) > 0 and len(real.refused) > 0
    assert real.preemptions > 0 and real.cached_tokens > 0
    if preempt != "auto":
        has_copies = any(isinstance(work, Copy) for work in real.works)
        assert has_copies == (preempt == "swap")


def test_parts_of_a_pass_and_pieces_are_the_same_in_both_worlds() -> None:
    model = MODELS[2]
    plan = split_plan("p", "prefill", [model], stream_tokens=64, prefill_tokens=256)
    long = [p for p in prompts(model, 60, 400, seed=5) if len(p) > 20][:16]
    asked = [
        Asked(0.02 * number, model, prompt, 1, hold_s=0.1, ignores_eos=True)
        for number, prompt in enumerate(long)
    ]
    real = RealRun(plan, asked).log
    simulated = Replay(plan, asked, real).log
    assert decisions(real.works) == decisions(simulated.works)
    parts = [work for work in real.works if isinstance(work, Batch) and work.layers is not None]
    pieces = [work for work in real.works if isinstance(work, Transfer)]
    assert len(parts) > len(asked) // 2 and len(pieces) > len(asked) + len(parts) // 2
    assert real.ended == simulated.ended == set(range(len(asked)))
