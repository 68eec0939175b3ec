"""Draws the next tokens of a batch from its logits.

The order: logprobs are the model's own; then repetition, frequency and presence penalties, bias and
forbidden stop tokens edit the logits; then temperature, top-k, top-p and min-p. Ties with the last
token a filter keeps stay in, so that no result depends on how equal numbers were sorted. A token is
the inverse of the cumulated probabilities IN ORDER OF TOKEN ID at one uniform number made of seed
and position alone: what else is in the batch moves the edges by rounding errors, nothing more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt import kernels
from muxrt.core import SamplingParams, TokenLogprobs
from muxrt.errors import MuxrtError
from muxrt.kernels import Team

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# What a slot needs beyond the most probable token.
EDITS, LOGPROBS = 1, 2

_FIELDS = [
    ("needs", np.int64),  # all fields have 8 bytes: torch takes no other strides
    ("temperature", np.float64),
    ("top_p", np.float64),
    ("top_k", np.int64),  # 0 = off
    ("min_p", np.float64),
    ("seed", np.uint64),
    ("prompt_tokens", np.int64),
    ("logprobs", np.int64),  # -1 = not asked for
    ("prompt_logprobs", np.int64),  # -1 = not asked for
]
_FILTERS = ("temperature", "top_k", "top_p", "min_p")
SLICE_ELEMS = 1 << 22  # logits handled at a time: bounds scratch memory to tens of MiB


class BadLogits(MuxrtError):
    """A model gave infinities or NaN: its weights or its KV are damaged."""


@dataclass(frozen=True, slots=True)
class Edits:
    """How one slot's logits are changed; ids are below the vocabulary size."""

    repetition: float
    frequency: float
    presence: float
    bias_ids: Ints
    bias: Floats
    stop_ids: Ints  # forbidden until `min_tokens` were drawn
    min_tokens: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token per row, and whether it ends its sequence."""

    tokens: list[int]
    stopped: list[bool]
    logprobs: list[TokenLogprobs | None] | None  # None where no row asked


class Sampling:
    """What the slots of one model asked for."""

    def __init__(self, num_slots: int, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.params = np.zeros(num_slots, dtype=_FIELDS)
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._stops: list[frozenset[int]] = [frozenset()] * num_slots
        self._edits: dict[int, Edits] = {}

    def open(self, slot: int, prompt_tokens: int, params: SamplingParams) -> None:
        """The slot starts a new sequence; what it asked for before is forgotten."""
        stops = frozenset(params.stop_token_ids)
        self._stops[slot] = stops if params.ignore_eos else stops | self._eos_ids
        self._edits.pop(slot, None)
        needs = 0
        if _has_edits(params):
            self._edits[slot] = self._make_edits(params, self._stops[slot])
            needs |= EDITS
        if params.logprobs is not None:
            needs |= LOGPROBS
        self.params[slot] = (
            needs,
            params.temperature,
            params.top_p,
            params.top_k or 0,
            params.min_p,
            params.seed & 0xFFFF_FFFF_FFFF_FFFF,
            prompt_tokens,
            _count(params.logprobs),
            _count(params.prompt_logprobs),
        )

    def draw(
        self,
        logits: Tensor,
        slots: Ints,
        positions: Ints,
        history: npt.NDArray[np.int32],
        team: Team,
    ) -> Drawn:
        """The token at `positions[i]` of slot `slots[i]` from row i. Overwrites `logits`.

        logits [N, vocab] float32; slots, positions [N]; history [num_slots, max tokens] holds the
        tokens before each position. Raises BadLogits.
        """
        step = max(1, SLICE_ELEMS // logits.shape[1])
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        for begin in range(0, len(slots), step):
            part = slice(begin, begin + step)
            drawn, scored = self._draw(logits[part], slots[part], positions[part], history, team)
            tokens += drawn
            logprobs += scored or [None] * len(drawn)
        stopped = [token in ends for token, ends in zip(tokens, self.stops(slots), strict=True)]
        return Drawn(tokens, stopped, logprobs if any(logprobs) else None)

    def stops(self, slots: Ints) -> list[frozenset[int]]:
        """The tokens that end each slot's sequence."""
        return [self._stops[slot] for slot in slots.tolist()]

    def edits(self, slots: Ints) -> dict[int, Edits]:
        """How logits are changed, by row, of the slots that ask for it. slots [N]"""
        rows = np.flatnonzero(self.params["needs"][slots] & EDITS).tolist()
        return {row: self._edits[int(slots[row])] for row in rows}

    def _draw(
        self,
        logits: Tensor,
        slots: Ints,
        positions: Ints,
        history: npt.NDArray[np.int32],
        team: Team,
    ) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        params = self.params[slots]
        needs = int(np.bitwise_or.reduce(params["needs"]))
        wanted = np.flatnonzero(params["needs"] & LOGPROBS)
        scores = logits[torch.from_numpy(wanted)].log_softmax(dim=-1) if len(wanted) else None
        if needs & EDITS:
            self._edit(logits, params, slots, positions, history)
        heat, top_k, top_p, min_p = (params[name] for name in _FILTERS)
        numbers = uniforms(params["seed"], positions) if heat.any() else np.zeros(len(slots))
        drawn = kernels.sample(logits, heat, top_k, top_p, min_p, numbers, team)
        chosen: list[int] = drawn.tolist()
        if min(chosen) < 0:
            raise BadLogits("the model's logits are not finite")
        if scores is None:
            return chosen, None
        counts = params["logprobs"][wanted]
        found = describe(scores, [chosen[row] for row in wanted], counts.tolist())
        return chosen, spread(found, wanted, len(chosen))

    def _make_edits(self, params: SamplingParams, stops: frozenset[int]) -> Edits:
        # No model draws a token beyond its vocabulary: a bias there changes nothing.
        bias = {i: value for i, value in params.logit_bias.items() if 0 <= i < self._vocab_size}
        return Edits(
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            np.array(list(bias), dtype=np.int64),
            np.array(list(bias.values()), dtype=np.float64),
            np.array([i for i in stops if 0 <= i < self._vocab_size], dtype=np.int64),
            params.min_tokens,
        )

    def _edit(
        self,
        logits: Tensor,
        params: npt.NDArray[np.void],
        slots: Ints,
        positions: Ints,
        history: npt.NDArray[np.int32],
    ) -> None:
        rows: npt.NDArray[np.float32] = logits.numpy()  # the same memory
        for index, edits in self.edits(slots).items():
            tokens = history[slots[index], : positions[index]]
            apply_edits(rows[index], edits, tokens, int(params["prompt_tokens"][index]))


def apply_edits(
    row: npt.NDArray[np.float32], edits: Edits, tokens: npt.NDArray[np.int32], prompt_tokens: int
) -> None:
    """Change one row of logits in place. row [vocab]; tokens: all of the sequence so far."""
    if edits.repetition != 1.0:
        seen = np.unique(tokens)
        logit = row[seen]
        row[seen] = np.where(logit > 0, logit / edits.repetition, logit * edits.repetition)
    outputs = tokens[prompt_tokens:]
    if (edits.frequency or edits.presence) and len(outputs):
        ids, counts = np.unique(outputs, return_counts=True)
        row[ids] -= (edits.frequency * counts + edits.presence).astype(np.float32)
    row[edits.bias_ids] += edits.bias.astype(np.float32)
    if len(outputs) < edits.min_tokens:
        row[edits.stop_ids] = -np.inf


def uniforms(seeds: npt.NDArray[np.uint64], positions: Ints) -> Floats:
    """A number in [0, 1) for each seed and position: SplitMix64 as a counter-based generator."""
    gamma = np.uint64(0x9E37_79B9_7F4A_7C15)
    with np.errstate(over="ignore"):
        counters = _mix(seeds + gamma) + (positions.astype(np.uint64) + np.uint64(1)) * gamma
    return (_mix(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class TopScores(NamedTuple):
    """Log-probabilities of chosen tokens, and of the most probable ones, most probable first."""

    tokens: Tensor  # [N]
    chosen: Tensor  # [N]
    ids: Tensor  # [N, width]
    values: Tensor  # [N, width]

    @classmethod
    def of(cls, scores: Tensor, tokens: Tensor, width: int) -> "TopScores":
        """scores [N, vocab]: log-probabilities; tokens [N]."""
        chosen = scores.gather(1, tokens.long()[:, None])[:, 0]
        top = scores.topk(min(width, scores.shape[1]), dim=-1)
        return cls(tokens, chosen, top.indices, top.values)

    def read(self, counts: Sequence[int]) -> list[TokenLogprobs]:
        """As the client gets them, with `counts[i]` of the most probable."""
        columns = (column.tolist() for column in self)
        return [
            TokenLogprobs(token, chosen, tuple(ids[:count]), tuple(values[:count]))
            for token, chosen, ids, values, count in zip(*columns, counts, strict=True)
        ]


def describe(scores: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Logprobs of `tokens[i]` and of the `counts[i]` most probable ones.

    scores [N, vocab]: log-probabilities.
    """
    return TopScores.of(scores, torch.tensor(tokens), max(counts)).read(counts)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))


def _has_edits(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
        or params.logit_bias
        or params.min_tokens
    )


def _count(asked: int | None) -> int:
    return -1 if asked is None else asked


def spread(found: list[TokenLogprobs], rows: Ints, length: int) -> list[TokenLogprobs | None]:
    """Put `found` at `rows` of a list of `length`."""
    spread: list[TokenLogprobs | None] = [None] * length
    for row, item in zip(rows.tolist(), found, strict=True):
        spread[row] = item
    return spread
