"""What one instance of one phase costs, as arrays for compiled simulations.

An instance is one copy of a model on `tp` x `pp` GPUs: `pp` pipeline stages, each with an equal
part of the layers. A batch of prefills goes through the stages one after the other, the next one
follows on its heels. Decodes are dealt to `pp` batches that chase each other round the stages, so
that a sequence gets a token per round and a round takes as long as one of the batches would on the
whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from muxrt.cost.coefficients import LARGE, Published
from muxrt.cost.steps import Steps

Floats = npt.NDArray[np.float64]

# Grids of a prefill's tokens and of their mean length weighted by tokens, and of decode contexts.
# Between the points lines are straight, so times that are linear in both are exact.
NUM_TOKENS, NUM_LENGTHS, NUM_CONTEXTS = 257, 33, 257


class Costs(NamedTuple):
    """Times in seconds; `compiled` functions read it as it is."""

    prefill_s: Floats  # [tokens, lengths] on the whole model
    token_step: float
    length_step: float
    batch_s: Floats  # [sequences + 1]: the part of a decode without contexts
    context_scale: Floats  # [sequences + 1]: what `context_s` is multiplied with
    context_s: Floats  # [contexts]
    context_step: float
    pp: int
    stage_s: float  # more on every stage of a prefill
    first_s: float  # more on its first stage, and for each of its tokens
    first_token_s: float
    round_s: float  # more for a round of decodes


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a table must be."""

    prefill_tokens: int  # of one batch; a longer prompt goes alone
    longest: int  # tokens of a sequence
    sequences: int  # that decode together
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a batch costs beside its steps; `Costs` says when."""

    stage_s: float = 0.0
    first_s: float = 0.0
    first_token_s: float = 0.0
    round_s: float = 0.0


def distserve_overheads(pp: int) -> Overheads:
    """What DistServe's simulator adds: `pp` ms on each stage, Ray's 2 ms and 0.1 us per token.

    Source: LLMServe/DistServe, simdistserve/base/worker.py; no such term is in the paper.
    """
    return Overheads(stage_s=1e-3 * pp, first_s=2e-3, first_token_s=1e-7, round_s=2e-3 * pp)


def costs_of(
    steps: Steps,
    limits: Limits,
    pp: int = 1,
    overheads: Overheads | None = None,
    control_s: float = 0.0,
) -> Costs:
    """The tables of any cost model; `control_s` is the engine's, per sequence and round."""
    ones = np.ones(limits.sequences + 1)
    sizes = range(limits.sequences + 1)
    batch_s = np.array([steps.decode_batch_s(_part(b, pp)) + control_s * b for b in sizes])
    context = steps.decode_context
    return _costs(steps.prefill_s, batch_s, ones, context, limits, pp, overheads or Overheads())


def published_costs(
    published: Published, limits: Limits, pp: int = 1, overheads: Overheads | None = None
) -> Costs:
    """The tables of DistServe's coefficients as they are, two sets that do not meet."""
    sizes = [_part(b, pp) for b in range(limits.sequences + 1)]
    lines = [published.small if size < LARGE else published.large for size in sizes]
    batch_s = np.array([line.a + line.c * b for line, b in zip(lines, sizes, strict=True)])
    scale = np.array([line.b for line in lines])
    return _costs(published.prefill_s, batch_s, scale, float, limits, pp, overheads or Overheads())


def _part(sequences: int, pp: int) -> int:
    """Sequences of the largest of the batches that go round."""
    return -(-sequences // pp)


def _costs(
    prefill_s: Callable[[float, float], float],
    batch_s: Floats,
    context_scale: Floats,
    context_s: Callable[[float], float],
    limits: Limits,
    pp: int,
    overheads: Overheads,
) -> Costs:
    most = max(limits.prefill_tokens, limits.longest)
    tokens = np.linspace(0, most, NUM_TOKENS)
    lengths = np.linspace(0, limits.longest, NUM_LENGTHS)
    contexts = np.linspace(0, limits.kv_tokens / pp, NUM_CONTEXTS)
    return Costs(
        np.array([[prefill_s(t, t * length) for length in lengths] for t in tokens]),
        float(tokens[1]),
        float(lengths[1]),
        batch_s,
        context_scale,
        np.array([context_s(held) for held in contexts]),
        float(contexts[1]),
        pp,
        overheads.stage_s,
        overheads.first_s,
        overheads.first_token_s,
        overheads.round_s,
    )
