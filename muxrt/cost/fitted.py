"""Step times from a profile.

prefill = f(tokens, sum of squared lengths, share), decode = f(batch, sum of contexts, share).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil

import numpy as np

from muxrt.config.model import ModelShape
from muxrt.core import Phase
from muxrt.cost.monotone import CAUCHY, Curve, Floats, Surface, Term, fit_surface
from muxrt.cost.profile import Cell
from muxrt.errors import ConfigError

GRANULARITIES = (1, 8, 16, 32, 64, 128)  # tokens; the tiles that kernels have
CLEARLY = 0.8  # of the error without tiles
FOLDS = 5
MIN_CELLS = 2 * FOLDS


@dataclass(frozen=True, slots=True)
class FittedSteps:
    """Steps at one share."""

    prefill: Curve  # of prefill work, in tokens
    batch: Curve
    context: Curve
    squares_per_token: float
    granularity: int  # a prefill computes a multiple of so many tokens

    def prefill_s(self, tokens: float, squares: float) -> float:
        computed = ceil(tokens / self.granularity) * self.granularity
        return self.prefill(computed + self.squares_per_token * squares)

    def mean_prefill_s(self, tokens: float, squares: float) -> float:
        # Lengths that fall anywhere within a multiple are half of it short of its end.
        computed = tokens + (self.granularity - 1) / 2
        return self.prefill(computed + self.squares_per_token * squares)

    def decode_s(self, batch: float, context: float) -> float:
        return self.batch(batch) + self.context(context)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The fit of one model on `tp` GPUs; `Steps` by share are kept."""

    source: str
    squares_per_token: float
    granularity: int
    prefill: Surface
    decode: Surface
    _at: dict[float, FittedSteps]

    def at(self, share: float) -> FittedSteps:
        """Steps at `share` of the SMs."""
        if share not in self._at:
            (prefill,) = self.prefill.at(share)
            batch, context = self.decode.at(share)
            self._at[share] = FittedSteps(
                prefill, batch, context, self.squares_per_token, self.granularity
            )
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


def fit(cells: Sequence[Cell], shape: ModelShape, source: str, granularity: int = 1) -> Fitted:
    """Fit the cells of one model on one number of GPUs.

    A prefill of any number of tokens takes as long as one of the next multiple of `granularity`.
    Raises ConfigError where a phase has too little to fit: two shares or one, and two sizes.
    """
    per_token = squares_per_token(shape)
    prefill = [cell for cell in cells if cell.prefill_s is not None]
    decode = [cell for cell in cells if cell.decode_s is not None]
    return Fitted(
        source,
        per_token,
        granularity,
        _fit_phase(Phase.PREFILL, prefill, [_prefill_term(prefill, per_token, granularity)]),
        _fit_phase(Phase.DECODE, decode, [_batch_term(decode), _context_term(decode)]),
        {},
    )


def fit_lanes(
    cells: Sequence[Cell], shape: ModelShape, source: str, granularity: int = 1
) -> FittedLanes:
    """`fit`, and each share with enough cells by itself. Raises ConfigError as `fit` does."""
    measured = {}
    for pct in sorted({cell.sm_pct for cell in cells}):
        own = [cell for cell in cells if cell.sm_pct == pct]
        with suppress(ConfigError):  # too few of this share alone
            measured[pct] = fit(own, shape, source, granularity)
    return FittedLanes(source, measured, fit(cells, shape, source, granularity))


def find_granularity(cells: Sequence[Cell], shape: ModelShape) -> int:
    """The multiple of tokens that kernels seem to compute: what predicts unseen prefills best.

    1 unless a coarser one is clearly better. Cells at lengths between the multiples are needed to
    tell; each share is fitted by itself.
    """
    shares = {cell.sm_pct for cell in cells}
    prefills = [[c for c in cells if c.sm_pct == s and c.prefill_s is not None] for s in shares]
    enough = [several for several in prefills if len(several) >= MIN_CELLS]
    if not enough:
        return 1
    error = {
        tile: sum(_unseen_error(several, squares_per_token(shape), tile) for several in enough)
        for tile in GRANULARITIES
    }
    best = min(GRANULARITIES, key=error.__getitem__)
    return best if error[best] < CLEARLY * error[1] else 1


def _unseen_error(cells: Sequence[Cell], per_token: float, granularity: int) -> float:
    """Relative error of prefills that are not in the fit, each in turn: its mean, robustly."""
    found = []
    ordered = sorted(cells, key=lambda cell: (cell.tokens, cell.batch))
    for fold in range(FOLDS):
        kept = [cell for index, cell in enumerate(ordered) if index % FOLDS != fold]
        surface = _fit_phase(Phase.PREFILL, kept, [_prefill_term(kept, per_token, granularity)])
        unseen = ordered[fold::FOLDS]
        work = _prefill_term(unseen, per_token, granularity).work
        (curve,) = surface.at(cells[0].sm_pct / 100)
        for cell, at in zip(unseen, work, strict=True):
            found.append(min(CAUCHY, abs(curve(float(at)) / (cell.prefill_s or 1.0) - 1)))
    return float(np.mean(found))


def _fit_phase(phase: Phase, cells: Sequence[Cell], terms: Sequence[Term]) -> Surface:
    if any(len(term.knots) < 2 for term in terms):
        key = f"{cells[0].model} tp {cells[0].tp}" if cells else "the model"
        raise ConfigError(
            f"the profile has {len(cells)} {phase.value} cells of {key}, expected at least two"
            " batch sizes and two lengths"
        )
    shares = np.array([cell.sm_pct / 100 for cell in cells])
    return fit_surface(terms, shares, np.array([cell.time_s(phase) for cell in cells], float))


def _prefill_term(cells: Sequence[Cell], per_token: float, granularity: int) -> Term:
    tokens = np.array([cell.tokens for cell in cells], float)
    lengths = np.array([cell.seq_len for cell in cells], float)
    computed = np.ceil(tokens / granularity) * granularity
    return Term(computed + per_token * tokens * lengths, _unique(computed))


def _batch_term(cells: Sequence[Cell]) -> Term:
    batch = np.array([cell.batch for cell in cells], float)
    return Term(batch, _unique(batch))


def _context_term(cells: Sequence[Cell]) -> Term:
    tokens = np.array([cell.tokens for cell in cells], float)
    return Term(tokens, _unique(tokens))


def _unique(values: Floats) -> Floats:
    knots: Floats = np.unique(values)
    return knots
