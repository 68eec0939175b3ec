"""Lanes that are parts of one device: a model's decode batch is on one of them at a time."""

from dataclasses import replace

import pytest
from sim_world import burst, config, setting, unit
from worlds import World

from muxrt.config.placement import Lanes
from muxrt.core import Batch, Phase
from muxrt.engine.executor import Done
from muxrt.sim.executor import MeshExecutor
from muxrt.sim.simulate import simulate

GREEN = {depth: Lanes(kind="green", sm_pct=(40, 60), depth=depth) for depth in (1, 2)}


@pytest.mark.parametrize("depth", [1, 2])
def test_who_comes_later_joins_the_batch_that_runs(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Batch] = []
    launch = MeshExecutor.launch

    def noted(self: MeshExecutor, work: Batch, done: Done) -> None:
        launched.append(work)
        launch(self, work, done)

    monkeypatch.setattr(MeshExecutor, "launch", noted)
    known = replace(setting("a"), fold=False)
    asked = [*burst("a", 1, output=200), *burst("a", 3, at_s=0.2, output=100)]
    simulate(config(unit("a", lanes=GREEN[depth])), known, asked)
    sizes = [len(batch.entries) for batch in launched if batch.phase is Phase.DECODE]
    assert max(sizes) == 4
    # Apart they would take 199 + 99 steps.
    assert len(sizes) < 199 + 10


@pytest.mark.parametrize("depth", [1, 2])
def test_two_models_still_decode_beside_each_other(depth: int) -> None:
    asked = [*burst("a", 1, output=300), *burst("b", 1, output=300)]
    run = simulate(config(unit("a", "b", lanes=GREEN[depth])), setting("a", "b"), asked)
    assert min(run.units[0].lanes_busy) > 0.8


def test_cores_of_their_own_share_a_model() -> None:
    """On a CPU a lane has its own cores: one model alone keeps all of them busy."""
    world = World(lanes=2, models="a")
    world.submit("a", output=40)
    world.at(0.02, lambda: world.submit("a", output=40))
    world.run()
    lanes = {b.lane for b in world.batches("a") if b.phase is Phase.DECODE}
    assert lanes == {0, 1}
