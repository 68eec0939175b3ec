"""Step times from a profile.

prefill = f(tokens, sum of squared lengths, share), decode = f(batch, sum of contexts, share).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from muxrt.config.model import ModelShape
from muxrt.core import Phase
from muxrt.cost.monotone import Curve, Floats, Surface, Term, fit_surface
from muxrt.cost.profile import Cell
from muxrt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FittedSteps:
    """Steps at one share."""

    prefill: Curve  # of prefill work, in tokens
    batch: Curve
    context: Curve
    squares_per_token: float

    def prefill_s(self, tokens: float, squares: float) -> float:
        return self.prefill(tokens + self.squares_per_token * squares)

    def decode_s(self, batch: float, context: float) -> float:
        return self.batch(batch) + self.context(context)

    def decode_batch_s(self, batch: float) -> float:
        return self.batch(batch)

    @property
    def decode_context(self) -> Curve:
        return self.context


@dataclass(frozen=True, slots=True)
class Fitted:
    """The fit of one model on `tp` GPUs; `Steps` by share are kept."""

    source: str
    squares_per_token: float
    prefill: Surface
    decode: Surface
    _at: dict[float, FittedSteps]

    def at(self, share: float) -> FittedSteps:
        """Steps at `share` of the SMs."""
        if share not in self._at:
            (prefill,) = self.prefill.at(share)
            batch, context = self.decode.at(share)
            self._at[share] = FittedSteps(prefill, batch, context, self.squares_per_token)
        return self._at[share]


@dataclass(frozen=True, slots=True)
class FittedLanes:
    """The fit of one model on a CPU, where more cores may well be slower: small work is cut up.

    A share that was measured has a fit of its own; others are as `between` says.
    """

    source: str
    measured: dict[int, Fitted]  # by per cent of the cores
    between: Fitted

    def at(self, share: float) -> FittedSteps:
        """Steps on a lane with `share` of the cores."""
        pct = round(100 * share)
        return self.measured[pct].at(pct / 100) if pct in self.measured else self.between.at(share)


def squares_per_token(shape: ModelShape) -> float:
    """Work of a prefill's attention in units of one token's linear layers, per squared length.

    A prompt of n tokens attends n^2 / 2 times (causal); each time costs 4 x heads x head size FLOPs
    per layer (scores and values). Profiles with prompts of 512 tokens at most cannot tell (the
    share is 1 % there); it matters for long prompts.
    """
    q_width = shape.num_heads * shape.head_dim
    return (4 * q_width / 2) / (2 * linear_params(shape) / shape.num_layers)


def linear_params(shape: ModelShape) -> int:
    """Weights of all layers that each token of a prefill is multiplied with; not the head's."""
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    widths = 2 * q_width + 2 * kv_width + 3 * shape.intermediate_size
    return shape.num_layers * shape.hidden_size * widths


def fit(cells: Sequence[Cell], shape: ModelShape, source: str) -> Fitted:
    """Fit the cells of one model on one number of GPUs.

    Raises ConfigError where a phase has too little to fit: two shares or one, and two sizes.
    """
    per_token = squares_per_token(shape)
    prefill = [cell for cell in cells if cell.prefill_s is not None]
    decode = [cell for cell in cells if cell.decode_s is not None]
    return Fitted(
        source,
        per_token,
        _fit_phase(Phase.PREFILL, prefill, [_prefill_term(prefill, per_token)]),
        _fit_phase(Phase.DECODE, decode, [_batch_term(decode), _context_term(decode)]),
        {},
    )


def fit_lanes(cells: Sequence[Cell], shape: ModelShape, source: str) -> FittedLanes:
    """`fit`, and each share with enough cells by itself. Raises ConfigError as `fit` does."""
    measured = {}
    for pct in sorted({cell.sm_pct for cell in cells}):
        own = [cell for cell in cells if cell.sm_pct == pct]
        with suppress(ConfigError):  # too few of this share alone
            measured[pct] = fit(own, shape, source)
    return FittedLanes(source, measured, fit(cells, shape, source))


def _fit_phase(phase: Phase, cells: Sequence[Cell], terms: Sequence[Term]) -> Surface:
    if any(len(term.knots) < 2 for term in terms):
        key = f"{cells[0].model} tp {cells[0].tp}" if cells else "the model"
        raise ConfigError(
            f"the profile has {len(cells)} {phase.value} cells of {key}, expected at least two"
            " batch sizes and two lengths"
        )
    shares = np.array([cell.sm_pct / 100 for cell in cells])
    return fit_surface(terms, shares, np.array([cell.time_s(phase) for cell in cells], float))


def _prefill_term(cells: Sequence[Cell], per_token: float) -> Term:
    tokens = np.array([cell.tokens for cell in cells], float)
    lengths = np.array([cell.seq_len for cell in cells], float)
    return Term(tokens + per_token * tokens * lengths, _unique(tokens))


def _batch_term(cells: Sequence[Cell]) -> Term:
    batch = np.array([cell.batch for cell in cells], float)
    return Term(batch, _unique(batch))


def _context_term(cells: Sequence[Cell]) -> Term:
    tokens = np.array([cell.tokens for cell in cells], float)
    return Term(tokens, _unique(tokens))


def _unique(values: Floats) -> Floats:
    knots: Floats = np.unique(values)
    return knots
