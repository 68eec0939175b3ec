"""The time of any batch from the times of pure prefills and decodes."""

from collections.abc import Iterable
from typing import NamedTuple

from muxrt.core import Batch, BatchEntry, Phase
from muxrt.cost.steps import Steps


class BatchWork(NamedTuple):
    """What the time of one forward pass depends on; the arguments of `Steps`."""

    prefill_tokens: int = 0
    squares: int = 0  # of prompts: (end squared - start squared) of each chunk, added up
    decodes: int = 0  # sequences that take one step
    context: int = 0  # tokens that their steps attend to, all together
    share: float = 1.0  # of the layers

    @classmethod
    def of(cls, batch: Batch) -> "BatchWork":
        """The work of a batch; in a mixed one, entries of a single token are decode steps."""
        if batch.phase is Phase.DECODE:
            starts = sum([entry.start for entry in batch.entries])
            return cls(decodes=len(batch.entries), context=starts + len(batch.entries))
        if batch.phase is Phase.PREFILL:
            tokens = sum([entry.num_tokens for entry in batch.entries])
            return cls(tokens, _squares(batch.entries), share=batch.share)
        chunks = [entry for entry in batch.entries if entry.num_tokens > 1]
        steps = [entry for entry in batch.entries if entry.num_tokens == 1]
        return cls(
            sum(entry.num_tokens for entry in chunks),
            _squares(chunks),
            len(steps),
            sum(entry.start + 1 for entry in steps),
        )


def _squares(entries: Iterable[BatchEntry]) -> int:
    """A chunk of n tokens from s on attends to half of (s + n)^2 - s^2 tokens."""
    return sum([entry.num_tokens * (2 * entry.start + entry.num_tokens) for entry in entries])


def batch_s(steps: Steps, work: BatchWork) -> float:
    """Seconds of one forward pass, or of its part.

    A mixed batch reads the weights once: its decode tokens go through the linear layers with the
    prompts', and only the reading of their KV comes on top. It takes no less than its decodes do.
    """
    if not work.decodes:
        return steps.prefill_s(work.prefill_tokens, work.squares) * work.share
    decode_s = steps.decode_s(work.decodes, work.context)
    if not work.prefill_tokens:
        return decode_s
    kv_s = decode_s - steps.decode_s(work.decodes, 0)
    linear_s = steps.prefill_s(work.prefill_tokens + work.decodes, work.squares)
    return max(decode_s, linear_s + kv_s)
