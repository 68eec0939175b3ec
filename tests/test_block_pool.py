"""The block pool and the prefix cache: accounts under every operation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxrt.core import BlockGroup, pack_ids, unpack_ids
from muxrt.errors import ConfigError
from muxrt.kvcache.block_pool import BlockPool
from muxrt.kvcache.host_blocks import HostBlocks

SIZES = {"a": 4, "b": 3, "c": 1}


def pool_of(num_blocks: int) -> BlockPool:
    pool = BlockPool(SIZES)
    pool.grow(range(num_blocks))
    return pool


def test_any_free_block_serves_any_model() -> None:
    pool = pool_of(12)
    first = pool.take("a", 3)
    assert first is not None
    ids = {int(i) for group in first for i in unpack_ids(group.blocks)}
    pool.release(first)
    second = pool.take("b", 4)
    assert second is not None
    assert {int(i) for group in second for i in unpack_ids(group.blocks)} == ids
    assert pool.check(second)


def test_taking_more_than_there_is_changes_nothing() -> None:
    pool = pool_of(10)
    assert pool.take("a", 3) is None
    assert (pool.num_free, pool.num_used) == (10, 0)
    assert pool.check([])


def test_a_group_released_twice_is_noticed() -> None:
    pool = pool_of(8)
    groups = pool.take("a", 1)
    assert groups is not None
    pool.release(groups)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(groups)


def test_a_shared_group_counts_once_and_stays_until_the_last_holder() -> None:
    pool = pool_of(8)
    groups = pool.take("a", 1)
    assert groups is not None
    pool.share(groups)
    assert pool.accounts["a"].used == 4
    pool.release(groups)
    assert pool.accounts["a"].used == 4
    pool.release(groups)
    assert pool.accounts["a"].used == 0
    assert pool.check([])


def test_a_published_group_survives_its_sequence_and_is_found() -> None:
    pool = pool_of(8)
    groups = pool.take("a", 2)
    assert groups is not None
    pool.prefixes.publish(groups[0], b"k0")
    pool.prefixes.publish(groups[1], b"k1")
    pool.release(groups)
    assert (pool.num_used, pool.accounts["a"].cached, pool.num_available) == (0, 8, 8)
    assert pool.prefixes.match([b"k0", b"k1", b"k2"]) == groups
    assert pool.prefixes.match([b"k1"]) == [groups[1]]
    pool.share(groups)
    assert (pool.num_used, pool.accounts["a"].cached) == (8, 0)
    assert pool.check(groups)


def test_a_second_group_of_the_same_content_stays_private() -> None:
    pool = pool_of(8)
    groups = pool.take("a", 2)
    assert groups is not None
    pool.prefixes.publish(groups[0], b"k")
    pool.prefixes.publish(groups[1], b"k")
    pool.release(groups)
    assert pool.accounts["a"].cached == 4
    assert pool.check([])


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = pool_of(8)
    groups = pool.take("a", 2)
    assert groups is not None
    for index, group in enumerate(groups):
        pool.prefixes.publish(group, bytes([index]))
    pool.release(groups)
    taken = pool.take("c", 1)
    assert taken is not None
    assert pool.prefixes.match([b"\0", b"\1"]) == groups[:1]
    assert pool.check(taken)


def test_held_groups_are_never_evicted() -> None:
    pool = pool_of(8)
    groups = pool.take("a", 1)
    assert groups is not None
    pool.prefixes.publish(groups[0], b"k")
    assert pool.take("a", 2) is None
    assert pool.prefixes.match([b"k"]) == groups
    assert pool.check(groups)


def test_grown_blocks_are_used_and_known_ids_are_refused() -> None:
    pool = pool_of(4)
    pool.grow(range(100, 104))
    held = pool.take("a", 2)
    assert held is not None
    with pytest.raises(ConfigError, match="in the pool already"):
        pool.grow([103])
    assert pool.check(held)


def test_retired_blocks_leave_at_once_or_when_released() -> None:
    pool = pool_of(12)
    groups = pool.take("a", 1)
    assert groups is not None
    held = {int(i) for i in unpack_ids(groups[0].blocks)}
    assert pool.retire(range(8)) == len(held & set(range(8)))
    assert pool.check(groups)
    pool.release(groups)
    assert pool.num_blocks == pool.num_free == 4
    assert pool.check([])


def test_a_cached_group_with_a_retired_block_is_forgotten() -> None:
    pool = pool_of(8)
    groups = pool.take("a", 1)
    assert groups is not None
    pool.prefixes.publish(groups[0], b"k")
    pool.release(groups)
    assert pool.retire([int(unpack_ids(groups[0].blocks)[0])]) == 0
    assert pool.prefixes.match([b"k"]) == []
    assert (pool.num_blocks, pool.num_available) == (7, 7)
    assert pool.check([])


def test_host_blocks_come_and_go() -> None:
    host = HostBlocks(6)
    ids = host.take(4)
    assert ids is not None
    assert host.take(3) is None
    assert host.check([ids])
    host.release(ids)
    assert host.check([])


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["take", "release", "share", "publish", "grow", "retire"]),
        st.integers(0, 99),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS)
def test_no_operation_loses_a_block(operations: list[tuple[str, int]]) -> None:
    pool, held, extent = pool_of(30), list[list[BlockGroup]](), 30
    retired: set[int] = set()
    for operation, number in operations:
        if operation == "take":
            groups = pool.take("abc"[number % 3], number % 4)
            held += [groups] if groups else []
        elif operation == "grow":
            pool.grow(range(extent, extent + number % 5))
            extent += number % 5
        elif operation == "retire":
            pool.retire({number % extent} - retired)
            retired.add(number % extent)
        elif held:
            groups = held[number % len(held)]
            if operation == "release":
                pool.release(held.pop(number % len(held)))
            elif operation == "share":
                pool.share(groups)
                held.append(list(groups))
            else:
                for index, group in enumerate(groups):
                    pool.prefixes.publish(group, bytes([number, index]))
        assert pool.check([group for groups in held for group in groups])
    for groups in held:
        pool.release(groups)
    assert pool.check([])
    assert pool.num_used == 0
    assert pool.num_available == pool.num_blocks


def test_groups_carry_their_ids_as_the_wire_does() -> None:
    groups = pool_of(8).take("a", 2)
    assert groups is not None
    assert sorted(unpack_ids(pack_ids(groups)).tolist()) == list(range(8))
    assert [group.num_blocks for group in groups] == [4, 4]
