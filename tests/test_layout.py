"""Plane, block and group arithmetic."""

import pytest

from muxrt.errors import ConfigError
from muxrt.kvcache.layout import KvShape, plan_arena


def shape(
    name: str, layers: int, kv_heads: int, head_dim: int = 128, dtype_bytes: int = 2
) -> KvShape:
    return KvShape(name, layers, kv_heads, head_dim, dtype_bytes)


PUBLISHED = {
    "7b": (shape("7b", 32, 32), 64),
    "13b": (shape("13b", 40, 40), 100),
    "30b": (shape("30b", 60, 52), 195),
    "llama-3-8b": (shape("llama-3-8b", 32, 8), 16),
    "llama-3-70b": (shape("llama-3-70b", 80, 8), 40),
    "mistral-7b": (shape("mistral-7b", 32, 8), 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_share_blocks_of_16_planes_without_waste(name: str) -> None:
    kv, ids_per_group = PUBLISHED[name]
    arena = plan_arena([kv for kv, _ in PUBLISHED.values()], plane_tokens=16)
    assert arena.planes_per_block == 16
    assert arena.models[name].blocks_per_group == ids_per_group
    assert arena.models[name].blocks_per_group * 16 == kv.num_planes


def test_a_block_size_that_wastes_over_one_percent_is_not_chosen() -> None:
    odd = shape("odd", 5, 3)  # 15 planes: blocks of 2 already waste a sixteenth
    assert plan_arena([odd], plane_tokens=16).planes_per_block == 1


@pytest.mark.parametrize(
    ("head_dim", "dtype_bytes", "block_tokens"),
    [(128, 2, 16), (64, 2, 32), (128, 1, 32), (64, 4, 16)],
)
def test_a_narrower_row_holds_more_tokens_in_the_same_bytes(
    head_dim: int, dtype_bytes: int, block_tokens: int
) -> None:
    narrow = shape("narrow", 4, 4, head_dim, dtype_bytes)
    arena = plan_arena([shape("wide", 4, 4), narrow], plane_tokens=16)
    assert arena.models["narrow"].block_tokens == block_tokens
    assert arena.plane_bytes == 16 * 2 * 128 * 2


def test_rows_that_do_not_divide_a_plane_are_refused_with_the_figures() -> None:
    with pytest.raises(ConfigError, match=r"8192 bytes.*not a whole number of rows of 320 bytes"):
        plan_arena([shape("wide", 4, 4), shape("odd", 4, 4, head_dim=80)], plane_tokens=16)


@pytest.mark.parametrize("planes_per_block", [1, 8, 16])
def test_locate_walks_planes_layer_by_layer(planes_per_block: int) -> None:
    arena = plan_arena([shape("m", 4, 6)], 16, planes_per_block)
    places = [arena.locate("m", layer, head) for layer in range(4) for head in range(6)]
    assert places == [divmod(plane, planes_per_block) for plane in range(24)]


@pytest.mark.parametrize(("tokens", "groups"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_groups_are_rounded_up(tokens: int, groups: int) -> None:
    layout = plan_arena([shape("7b", 32, 32)], 16).models["7b"]
    assert layout.num_groups(tokens) == groups
    assert layout.num_blocks(tokens) == groups * 64
