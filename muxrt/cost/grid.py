"""Which forward passes to measure, the most telling first.

A fit needs two sizes of each kind of work at every share; what comes later refines it. So cells
come in levels: the corners, then what lies between, then the rest.
"""

from collections.abc import Iterator
from typing import NamedTuple

from muxrt.core import Phase

BATCHES = (1, 8, 32, 4, 16, 2, 64)  # of decodes; the first three are level 0
NUM_CORNERS = 3
PREFILL_TOKENS = 512  # of a prefill batch: the scheduler's default, longer prompts go in chunks
PROMPTS = (1.0, 0.125, 0.5, 0.03125, 0.25, 0.0625)  # of the longest one
# Kernels compute tiles of tokens: lengths off the powers of two show how large these are.
BETWEEN = (24, 40, 48, 56, 72, 80, 96, 112, 120, 144, 160, 176, 208, 240, 320, 400)
SEVERAL = ((4, 64), (8, 32), (2, 256), (4, 128), (16, 16))  # prompts of so many tokens each
CONTEXTS = (0.25, 0.03125, 0.0625, 1.0, 0.125, 0.5)  # of the longest one
LONGEST_CONTEXT = 4096
NUM_LEVELS = 3


class Pass(NamedTuple):
    """A forward pass of `batch` sequences, of `seq_len` tokens each, as in `cost.profile.Cell`."""

    phase: Phase
    batch: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


def levels(max_tokens: int, kv_tokens: int) -> list[list[Pass]]:
    """The passes of each level, none twice.

    `max_tokens` is the longest sequence, `kv_tokens` what the memory holds of all sequences of a
    pass together; what exceeds either is left out.
    """
    seen: set[Pass] = set()
    found: list[list[Pass]] = []
    for level in range(NUM_LEVELS):
        fresh = [one for one in _level(level, max_tokens) if _fits(one, max_tokens, kv_tokens)]
        found.append([one for one in dict.fromkeys(fresh) if one not in seen])
        seen |= set(fresh)
    return found


def _fits(one: Pass, max_tokens: int, kv_tokens: int) -> bool:
    # There must be room for the token that is drawn.
    return 1 <= one.seq_len < max_tokens and one.tokens <= kv_tokens


def _level(level: int, max_tokens: int) -> Iterator[Pass]:
    reach = min(LONGEST_CONTEXT, max_tokens)
    contexts = [max(1, round(part * reach) - (part == 1.0)) for part in CONTEXTS]
    longest_prompt = min(PREFILL_TOKENS, max_tokens - 1)
    prompts = [max(1, round(part * longest_prompt)) for part in PROMPTS]
    corners = BATCHES[:NUM_CORNERS]
    if level == 0:
        yield Pass(Phase.PREFILL, 1, prompts[0])
        yield from (Pass(Phase.DECODE, batch, contexts[0]) for batch in corners)
        yield from (Pass(Phase.PREFILL, 1, tokens) for tokens in prompts[1:3])
        yield from (Pass(Phase.DECODE, batch, contexts[1]) for batch in corners)
    elif level == 1:
        yield from (Pass(Phase.DECODE, batch, contexts[0]) for batch in BATCHES)
        yield from (Pass(Phase.DECODE, batch, contexts[3]) for batch in corners)
        yield from (Pass(Phase.PREFILL, 1, tokens) for tokens in prompts)
    else:
        yield from (Pass(Phase.PREFILL, *several) for several in SEVERAL)
        yield from (Pass(Phase.PREFILL, 1, n) for n in BETWEEN if n < longest_prompt)
        for context in contexts:
            yield from (Pass(Phase.DECODE, batch, context) for batch in BATCHES)
