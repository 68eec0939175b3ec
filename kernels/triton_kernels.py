"""The device kernels in Triton: what muxrt.kernels.gpu describes. Needs the package triton."""

import triton

from muxrt.kernels.triton_decode import decode_attention
from muxrt.kernels.triton_prefill import prefill_attention
from muxrt.kernels.triton_rope import rope_and_store
from muxrt.kernels.triton_rows import copy_blocks, embed, rms_norm, silu_mul
from muxrt.kernels.triton_sampling import sample

__all__ = [
    "IS_INTERPRETED",
    "copy_blocks",
    "decode_attention",
    "embed",
    "prefill_attention",
    "rms_norm",
    "rope_and_store",
    "sample",
    "silu_mul",
]

IS_INTERPRETED: bool = triton.knobs.runtime.interpret  # decided when the kernels are imported
