"""The executor of the simulator: work takes as long as a cost says, and tokens are counted."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from muxrt.core import Batch, BatchEntry, Result, SlotOpen, Work
from muxrt.engine.executor import Done
from muxrt.sim.loop import FINISH, EventLoop

Cost = Callable[[Work], float]  # seconds a lane needs


class SimPrompt(msgspec.Struct, frozen=True):
    """A simulated request's payload: the one secret the brain must not see."""

    output_tokens: int  # the last of them ends the sequence


@dataclass(frozen=True, slots=True)
class ConstantCost:
    """Seconds per batch by fixed prices; the simplest cost there is."""

    batch_s: float = 0.01
    token_s: float = 0.0001
    copy_s: float = 0.005

    def __call__(self, work: Work) -> float:
        if isinstance(work, Batch):
            return self.batch_s + self.token_s * work.num_tokens
        return self.copy_s


class SimExecutor:
    """Lanes in virtual time: each runs its works one after the other, in launch order."""

    def __init__(self, loop: EventLoop, cost: Cost) -> None:
        self._loop = loop
        self._cost = cost
        self._lane_free_s: dict[int, float] = {}
        self._remaining: dict[tuple[str, int], int] = {}  # by (model, slot)

    def launch(self, work: Work, done: Done) -> None:
        """Finish `work` when its lane has had time for it."""
        elapsed_s = self._cost(work)
        start_s = max(self._loop.now_s, self._lane_free_s.get(work.lane, 0.0))
        self._lane_free_s[work.lane] = start_s + elapsed_s
        result = self._run(work, elapsed_s)
        self._loop.at(start_s + elapsed_s, lambda: done(work, result), FINISH)

    def _run(self, work: Work, elapsed_s: float) -> Result:
        if not isinstance(work, Batch):
            return Result(elapsed_s=elapsed_s)
        for opened in work.opened:
            self._open(work.model, opened)
        drawn = [self._draw(work.model, entry) for entry in work.entries]
        tokens = tuple(remaining for remaining in drawn)
        stopped = tuple(remaining == 0 for remaining in drawn)
        return Result(tokens, stopped, elapsed_s=elapsed_s)

    def _open(self, model: str, opened: SlotOpen) -> None:
        prompt = msgspec.msgpack.decode(opened.payload, type=SimPrompt)
        self._remaining[model, opened.slot] = prompt.output_tokens

    def _draw(self, model: str, entry: BatchEntry) -> int | None:
        """A sampled token: how many are still to come after it; None if nothing is sampled."""
        if not entry.samples:
            return None
        # Past its end a sequence draws what nobody will read, as the real one does.
        self._remaining[model, entry.slot] = max(0, self._remaining[model, entry.slot] - 1)
        return self._remaining[model, entry.slot]
