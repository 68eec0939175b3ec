"""What simulated sequences still have to say: nobody but the executors may know."""

import msgspec

from muxrt.core import BatchEntry, Copy, Load, Result, Sleep, SlotOpen, Transfer, Work


class SimPrompt(msgspec.Struct, frozen=True):
    """A simulated request's payload: the one secret the brain must not see."""

    output_tokens: int  # the last of them ends the sequence
    num_outputs: int = 0  # of them, generated before, in another unit


class Tokens:
    """What the sequences in the slots of a unit still have to say."""

    def __init__(self) -> None:
        self.remaining: dict[str, dict[int, int]] = {}  # by model and slot

    def run(self, work: Work, elapsed_s: float) -> Result:
        """The result of `work`."""
        if isinstance(work, Copy | Load | Sleep):
            return Result(elapsed_s=elapsed_s)
        for opened in work.opened:
            self._open(work.model, opened)
        if isinstance(work, Transfer):
            return Result(elapsed_s=elapsed_s)
        left = self.remaining.setdefault(work.model, {})
        drawn = tuple([_draw(left, entry) for entry in work.entries])
        stopped = tuple([remaining == 0 for remaining in drawn])
        return Result(drawn, stopped, elapsed_s=elapsed_s)

    def _open(self, model: str, opened: SlotOpen) -> None:
        prompt = msgspec.msgpack.decode(opened.payload, type=SimPrompt)
        left = prompt.output_tokens - prompt.num_outputs
        self.remaining.setdefault(model, {})[opened.slot] = left


def _draw(left: dict[int, int], entry: BatchEntry) -> int | None:
    """A sampled token: how many are still to come after it; None if nothing is sampled."""
    if not entry.samples:
        return None
    # Past its end a sequence draws what nobody will read, as the real one does.
    remaining = left[entry.slot] - 1
    if remaining < 0:
        remaining = 0
    left[entry.slot] = remaining
    return remaining
