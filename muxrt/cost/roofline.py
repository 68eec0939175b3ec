"""Step times from a GPU's data sheet: for a model, tp or GPU that nobody profiled.

A step reads the weights, or launches its layers, whichever takes longer; then come the arithmetic
of its tokens, the reading of their KV, and the all-reduces of tensor parallelism, each at the
fraction of the peak that an engine reaches. (The traffic of a transformer: Pope et al. 2022,
section 3. A pure roofline, the maximum of arithmetic and reading, fits the A100 profile worse:
median error 8 and 9 % against 7 and 7 %.)
"""

from dataclasses import dataclass

from muxrt.config.cluster import GpuKind
from muxrt.config.model import ModelShape
from muxrt.cost.fitted import squares_per_token
from muxrt.cost.memory import num_params
from muxrt.cost.monotone import Curve

DTYPE_BYTES = 2  # fp16 or bf16 weights, activations, K and V
ALL_REDUCES = 2  # per layer: after attention, after the MLP (Shoeybi et al. 2019)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What fraction of the data sheet an engine reaches.

    The defaults are `calibrate`d on the A100 profile (MuxServe's engine), but for `layer_s`: there
    it is 0.38 ms, launches from Python. An engine with CUDA graphs has none; 10 us are assumed, not
    measured.
    """

    flops: float = 0.74
    bandwidth: float = 0.60
    link: float = 0.33
    layer_s: float = 10e-6  # launches and all else that does not grow with the work
    saturating_share: float = 0.41  # of the SMs: these read as fast as all of them


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on `tp` GPUs of one kind."""

    shape: ModelShape
    tp: int
    gpu: GpuKind
    efficiency: Efficiency = Efficiency()

    @property
    def source(self) -> str:
        return "roofline"

    def at(self, share: float) -> "RooflineSteps":
        """Steps at `share` of the SMs."""
        if not 0 < share <= 1:
            raise ValueError(f"a share is above 0 and at most 1: {share}")
        shape, gpu, efficiency = self.shape, self.gpu, self.efficiency
        weights = num_params(shape) - shape.vocab_size * shape.hidden_size  # the input table: rows
        read_share = min(1.0, share / efficiency.saturating_share)
        bytes_per_s = self.tp * gpu.bandwidth_bytes_per_s * efficiency.bandwidth * read_share
        kv_token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES
        # A ring all-reduce is 2 (n - 1) messages one behind the other, and moves 2 (n - 1) / n of
        # what it reduces over each link (Thakur et al. 2005; Patarasuk and Yuan 2009).
        all_reduces, messages = ALL_REDUCES * shape.num_layers, 2 * (self.tp - 1)
        link_bytes = messages / self.tp * shape.hidden_size * DTYPE_BYTES
        per_link = gpu.link_bytes_per_s * efficiency.link
        latency_s = all_reduces * messages * gpu.link_latency_s
        launched_s = shape.num_layers * efficiency.layer_s
        return RooflineSteps(
            token_flops_s=2 * weights / (self.tp * gpu.flops * efficiency.flops * share),
            # Launches run ahead of the device: whichever of the two is slower is what is seen.
            fixed_s=max(weights * DTYPE_BYTES / bytes_per_s, launched_s) + latency_s,
            kv_token_s=kv_token_bytes / bytes_per_s,
            link_token_s=all_reduces * link_bytes / per_link,
            squares_per_token=squares_per_token(shape),
        )


@dataclass(frozen=True, slots=True)
class RooflineSteps:
    """Steps at one share; everything in seconds per unit of work."""

    token_flops_s: float
    fixed_s: float
    kv_token_s: float
    link_token_s: float
    squares_per_token: float

    def prefill_s(self, tokens: float, squares: float) -> float:
        arithmetic = tokens + self.squares_per_token * squares
        moved_s = self.link_token_s * tokens
        return self.fixed_s + self.token_flops_s * arithmetic + moved_s

    def mean_prefill_s(self, tokens: float, squares: float) -> float:
        return self.prefill_s(tokens, squares)

    def decode_s(self, batch: float, context: float) -> float:
        return self.decode_batch_s(batch) + self.kv_token_s * context

    def decode_batch_s(self, batch: float) -> float:
        return self.fixed_s + (self.token_flops_s + self.link_token_s) * batch

    @property
    def decode_context(self) -> Curve:
        return Curve((0.0,), (0.0,), self.kv_token_s)
