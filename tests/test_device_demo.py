"""Demo models served by the device's engine on the CPU: the CPU engine's own greedy tokens."""

import torch
from real_world import MODELS, RealWorld, prompts

CPU = torch.device("cpu")


def tokens(world: RealWorld) -> list[list[int]]:
    return [served.tokens for served in world.served.values()]


def test_all_models_at_once_give_the_cpu_engine_s_tokens() -> None:
    """Pipelined two deep."""
    worlds = [RealWorld(device=device, depth=2, max_sequences=16) for device in (None, CPU)]
    for world in worlds:
        for model in MODELS:
            for prompt in prompts(model, 4, 150, seed=1):
                world.submit(model, prompt, 24)
        world.run()
    assert tokens(worlds[1]) == tokens(worlds[0])
    assert max(map(len, tokens(worlds[1]))) == 24
    assert worlds[1].executor.works == worlds[0].executor.works


def test_what_is_swapped_out_and_in_again_goes_on_as_on_the_cpu() -> None:
    worlds = [
        RealWorld(
            ("pydoc-s",), device=device, num_groups=1.0, swap_groups=2.0, depth=2, preempt="swap"
        )
        for device in (None, CPU)
    ]
    for world in worlds:
        for prompt in prompts("pydoc-s", 8, 400, seed=1):
            world.submit("pydoc-s", prompt, 100, ignore_eos=True)
        world.run()
        assert world.preempted() > 0
    assert tokens(worlds[1]) == tokens(worlds[0])
