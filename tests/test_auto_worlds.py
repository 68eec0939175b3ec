"""`auto` is not worse than the best strategy of one kind: one of the ten workloads, two seeds."""

import sys
from pathlib import Path
from statistics import fmean

import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from auto_worlds import SEEDS, SMALL, Beside, World, beside, compare


@pytest.mark.parametrize("world", SMALL[1:], ids=lambda world: world.name)
def test_auto_is_not_worse_than_the_best_strategy_of_one_kind(world: World) -> None:
    row = compare(world, seeds=SEEDS[:2])
    assert not beside(row).is_worse
    assert row["goodput_rps"]["spatial"] is not None
    # Both have something to gain: it is not the colocated placement compared with itself.
    assert fmean(row["goodput_rps"]["auto"]) > fmean(row["goodput_rps"]["spatial"])
    assert row["chosen"]["apart"]


def test_what_noise_is() -> None:
    goodput = {"spatial": [10.0, 12.0], "distserve": [11.0, 11.2], "colocated": None}
    others = {"muxserve": None, "splitwise": None}
    row = {"goodput_rps": {**goodput, **others, "auto": [10.8, 11.0]}}
    found = beside(row)
    assert (found.best, found.best_rps) == ("distserve", pytest.approx(11.1))
    assert found.difference_rps == pytest.approx(-0.2) and found.is_worse
    assert not Beside("spatial", 11.0, 10.9, -0.1, 0.06).is_worse
    assert not Beside("spatial", 11.0, 10.96, -0.04, 0.0).is_worse
    assert Beside("spatial", 11.0, 10.8, -0.2, 0.06).is_worse
