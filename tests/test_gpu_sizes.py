"""Sizes of device kernels from the figures of chips."""

import pytest
import torch

from muxrt.kernels import device
from muxrt.kernels.device import Chip

# SMs, shared memory of a program and of an SM, capability: CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability", and the chips' data sheets.
CHIPS = {
    "h200": Chip(132, 232448, 233472, (9, 0)),
    "a100": Chip(108, 166912, 167936, (8, 0)),
    "l40s": Chip(142, 101376, 102400, (8, 9)),
    "t4": Chip(40, 65536, 65536, (7, 5)),
}
EACH_CHIP = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
HEADS = pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (80, 3), (128, 1), (128, 8)])


def kv_bytes(tiling: device.Tiling, head_dim: int, element: int) -> int:
    """Of K and V in shared memory, rows padded to a power of two."""
    return 2 * tiling.tokens * (64 if head_dim == 64 else 128) * element * tiling.stages


@EACH_CHIP
@HEADS
@pytest.mark.parametrize("element", [1, 2, 4])
def test_two_decode_programs_fit_on_an_sm(
    chip: Chip, head_dim: int, group: int, element: int
) -> None:
    tiling = device.decode_tiling(chip, head_dim, group, element)
    assert tiling.rows >= group
    resident = device.programs_per_sm(chip, tiling, head_dim, element)
    assert resident * kv_bytes(tiling, head_dim, element) <= chip.shared_bytes_per_sm
    assert resident >= 2 or tiling.stages == 1


@EACH_CHIP
@HEADS
@pytest.mark.parametrize(("dtype", "element"), [(2, 1), (2, 2), (4, 4)])
def test_a_prefill_program_fits(
    chip: Chip, head_dim: int, group: int, dtype: int, element: int
) -> None:
    tiling = device.prefill_tiling(chip, head_dim, group, dtype, element)
    queries = tiling.rows * (64 if head_dim == 64 else 128) * dtype
    assert queries + kv_bytes(tiling, head_dim, element) <= chip.shared_bytes
    assert tiling.rows >= group


def test_a_larger_chip_takes_larger_tiles() -> None:
    tilings = [device.prefill_tiling(chip, 128, 1, 2, 2) for chip in CHIPS.values()]
    sizes = [tiling.tokens * tiling.stages for tiling in tilings]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_a_group_that_no_tile_was_made_for_has_one() -> None:
    assert device.prefill_tiling(CHIPS["h200"], 64, 200, 2, 2).rows == 256


@pytest.mark.parametrize("sm_count", [8, 66, 132])
def test_splits_fill_the_lane_and_no_more(sm_count: int) -> None:
    splits = device.decode_splits(sm_count, 3, num_sequences=2, num_kv_heads=8, max_tiles=64)
    assert sm_count * 3 <= splits * 16 < sm_count * 3 + 16


def test_no_more_splits_than_there_is_work() -> None:
    assert device.decode_splits(132, 3, num_sequences=64, num_kv_heads=32, max_tiles=64) == 1
    assert device.decode_splits(132, 3, num_sequences=1, num_kv_heads=1, max_tiles=5) == 5
    assert device.decode_splits(132, 3, num_sequences=1, num_kv_heads=1, max_tiles=9999) == 64


def test_float8_needs_ada() -> None:
    for name, chip in CHIPS.items():
        if name in {"h200", "l40s"}:
            device.check_kv_dtype(chip, torch.float8_e4m3fn)
        else:
            with pytest.raises(ValueError, match=r"capability \d\.\d, expected 8\.9 or newer"):
                device.check_kv_dtype(chip, torch.float8_e4m3fn)
        device.check_kv_dtype(chip, torch.bfloat16)
