"""The kernels behind one dispatch point: a program records what to compute, the device says how.

Activations are float32; the arena is float32 or bfloat16; weights are float32, bfloat16 or int8.
"""

from muxrt.kernels import cpu_meet as meeting
from muxrt.kernels.cpu import CpuProgram as Program
from muxrt.kernels.cpu import checksum, copy_blocks, sample, warm_up
from muxrt.kernels.packing import (
    HUGE_BYTES,
    Packed,
    Pages,
    map_pages,
    pack_into,
    packed_elems,
    unpack,
)
from muxrt.kernels.team import Team
from muxrt.kernels.types import AttentionMeta, DeviceMeta, KvCache, MetaArrays

__all__ = [
    "HUGE_BYTES",
    "AttentionMeta",
    "DeviceMeta",
    "KvCache",
    "MetaArrays",
    "Packed",
    "Pages",
    "Program",
    "Team",
    "checksum",
    "copy_blocks",
    "map_pages",
    "meeting",
    "pack_into",
    "packed_elems",
    "sample",
    "unpack",
    "warm_up",
]
