"""Drawing tokens in plain torch: the definition, by sorting whole vocabularies."""

import torch
from torch import Tensor

BAD = -1  # instead of a token: the logits are not finite
LEAST = -87.0  # exponents below it count as 0: exp(-87) is about the least normal float32
TINY = 1e-30  # a temperature below it counts as it

GAMMA = 0x9E37_79B9_7F4A_7C15
FIRST, SECOND = 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) for each seed and position: SplitMix64 (Steele, Lea, Flood 2014).

    seeds [N] int64, the bits of uint64; positions [N] -> [N] float64.
    """
    counters = _mix(seeds + _signed(GAMMA)) + (positions.long() + 1) * _signed(GAMMA)
    return _shift(_mix(counters), 11).double() * 2.0**-53


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    numbers: Tensor,
) -> Tensor:
    """A token per row, as `muxrt.kernels.sample` says. logits [N, vocab] -> [N] int64."""
    logits = logits.float()
    top, best = logits.max(dim=-1)
    is_bad = logits.isnan().any(dim=-1) | ~top.isfinite()
    heat = temperatures.double().clamp_min(TINY).float()[:, None]
    exponents = (logits - top[:, None]) / heat
    weights = torch.where(exponents > LEAST, exponents.exp(), 0.0)
    floor = torch.maximum(_threshold(weights, top_k, top_p.double()), min_p.float())
    kept = torch.where(weights >= floor[:, None], weights, 0.0).double().cumsum(dim=-1)
    mass = kept[:, -1:]
    drawn = (kept <= numbers[:, None] * mass).sum(dim=-1)
    # A number so near to 1 that the product rounds up means the last token.
    last = (kept < mass).sum(dim=-1)
    tokens = torch.where(temperatures > 0, torch.minimum(drawn, last), best)
    return torch.where(is_bad, BAD, tokens)


def _threshold(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least weight that stays. Top-p counts the mass of what top-k left. -> [N] float32."""
    vocab = weights.shape[-1]
    ordered = weights.sort(dim=-1, descending=True).values
    masses = ordered.double().cumsum(dim=-1)
    limits = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)[:, None]
    goals = top_p[:, None] * masses.gather(1, limits - 1)
    ranks = torch.arange(1, vocab + 1, device=weights.device)
    is_enough = (ranks >= limits) | ((masses >= goals) & (top_p[:, None] < 1))
    return ordered.gather(1, is_enough.int().argmax(dim=-1, keepdim=True))[:, 0]


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(FIRST)
    x = (x ^ _shift(x, 27)) * _signed(SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, as if the integers had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: int) -> int:
    """The int64 of the same bits."""
    return bits - (1 << 64)
