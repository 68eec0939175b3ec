"""What stands in for CUDA graphs where there is no GPU: a class that repeats calls.

torch.cuda.CUDAGraph does what was launched; like that one it does nothing while it records.
"""

from collections.abc import Callable

import torch

from muxrt.engine.build import UnitPlan
from muxrt.worker.graphs import Steps

BUDGET_BYTES = 1 << 20  # of a lane
OpenSteps = Callable[[UnitPlan, torch.device, Callable[[int], int]], Steps]


class Repeated:
    """Stands in for a CUDA graph."""

    made = captured = replayed = 0  # in this process

    def __init__(self) -> None:
        self.replays = 0
        self._run: Callable[[], None] | None = None
        Repeated.made += 1

    def capture(self, run: Callable[[], None]) -> None:
        assert self._run is None
        self._run = run
        Repeated.captured += 1

    def replay(self) -> None:
        assert self._run is not None
        self.replays += 1
        Repeated.replayed += 1
        self._run()


def steps(budget_bytes: int = BUDGET_BYTES) -> Steps:
    """Graphs that take no memory."""
    return Steps(budget_bytes, Repeated, lambda: 0)


def playing(graph_bytes: int) -> OpenSteps:
    """In the place of `device_streams.open_steps`; a graph takes so much."""

    def open_steps(plan: UnitPlan, device: torch.device, agree: Callable[[int], int]) -> Steps:
        return Steps(BUDGET_BYTES, Repeated, lambda: Repeated.captured * graph_bytes, agree)

    return open_steps
