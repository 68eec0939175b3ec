"""The unit's one pool of KV blocks: a free list, block groups, and an account per model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import numpy.typing as npt

from muxrt.core import ID_BYTES, BlockGroup, BlockIds, unpack_ids
from muxrt.errors import ConfigError
from muxrt.kvcache.prefix_cache import PrefixCache


@dataclass(slots=True)
class Account:
    """What one model holds and is entitled to, in blocks."""

    blocks_per_group: int
    quota: int = 0
    used: int = 0  # in groups that some sequence holds; a shared group counts once
    cached: int = 0  # in idle groups of the prefix cache: free for whoever needs them
    group_dtype: np.dtype[np.void] = field(init=False)  # the ids of one group, as they are

    def __post_init__(self) -> None:
        self.group_dtype = np.dtype((np.void, ID_BYTES * self.blocks_per_group))

    @property
    def borrowed(self) -> int:
        return max(0, self.used - self.quota)


class BlockPool:
    """Any free block serves any model. A model may hold more than its quota: that is a loan.

    The pool hands out and takes back; who may have what is decided in `sched/`.
    """

    def __init__(self, blocks_per_group: Mapping[str, int]) -> None:
        self.accounts = {name: Account(size) for name, size in blocks_per_group.items()}
        self.prefixes = PrefixCache()
        self.num_blocks = 0  # that exist and are not retired
        self._free: BlockIds = np.empty(0, np.int32)  # a stack; [0, _num_free) are free
        self._num_free = 0
        self._num_cached = 0
        self._exists: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)  # by block id
        self._leaving: set[int] = set()  # retired ids that a group still holds

    @property
    def num_available(self) -> int:
        """Blocks that can be had at once: free ones and those of idle cached groups."""
        return self._num_free + self._num_cached

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_leaving(self) -> int:
        """Retired blocks that a group still holds."""
        return len(self._leaving)

    @property
    def num_used(self) -> int:
        """Blocks in groups that sequences hold."""
        return sum(account.used for account in self.accounts.values())

    def grow(self, ids: Iterable[int]) -> None:
        """Add an extent of new blocks."""
        if isinstance(ids, range):  # how arenas grow, by millions of blocks
            new = np.arange(ids.start, ids.stop, ids.step, dtype=np.int32)
        else:
            new = np.fromiter(ids, np.int32)
        if not len(new):
            return
        room = max(0, int(new.max()) + 1 - len(self._exists))
        exists = np.concatenate([self._exists, np.zeros(room, np.bool_)])
        num_before = np.count_nonzero(exists)
        exists[new] = True
        # Counted, not sorted: an arena of 80 GB has half a million blocks.
        if np.count_nonzero(exists) != num_before + len(new):
            raise ConfigError("grow: a block id is in the pool already")
        self._exists = exists
        # Under those that are free already: an extent that came late may have to go again.
        self._free = np.concatenate(
            [new[::-1], self._free[: self._num_free], self._spare(len(new))]
        )
        self._num_free += len(new)
        self.num_blocks += len(new)

    def retire(self, ids: Iterable[int]) -> int:
        """Take blocks out of the pool; returns how many are still held and leave when released.

        Idle cached groups that contain one are forgotten.
        """
        gone = set(ids)
        self._leaving |= gone
        self.num_blocks -= len(gone)
        for group in [group for group in self.prefixes.idle() if self.is_leaving(group)]:
            self._forget(group)
        free = self._free[: self._num_free].copy()
        self._num_free = 0
        self._push(free)
        return len(self._leaving)

    def take(self, model: str, num_groups: int) -> list[BlockGroup] | None:
        """New groups for `model`, evicting idle cached ones if need be; None if too few exist."""
        account = self.accounts[model]
        wanted = account.blocks_per_group * num_groups
        if wanted > self._num_free and not self._evict(wanted - self._num_free):
            return None
        top, self._num_free = self._num_free, self._num_free - wanted
        account.used += wanted
        # One slice for all; numpy cuts it into groups without a loop in Python.
        rows = self._free[self._num_free : top].view(account.group_dtype).tolist()
        return list(map(BlockGroup, repeat(model), rows))

    def share(self, groups: Iterable[BlockGroup]) -> None:
        """One more sequence holds each of `groups` (found by `prefixes.match`)."""
        for group in groups:
            group.refs += 1
            if group.refs == 1:
                self.prefixes.unpark(group)
                account = self._count_cached(group, -1)
                account.used += account.blocks_per_group

    def release(self, groups: Sequence[BlockGroup]) -> None:
        """One sequence lets go of its `groups`; those that nobody holds are reusable."""
        private = []
        # Last first: the tail is the least likely to be somebody's prefix, so it is evicted first.
        for group in reversed(groups):
            assert group.refs > 0, "a group is released twice"
            group.refs -= 1
            if group.refs:
                continue
            if group.key is None:
                private.append(group.blocks)
            else:
                self._park(group)
        if private:
            account = self.accounts[groups[0].model]
            account.used -= account.blocks_per_group * len(private)
            self._push(unpack_ids(b"".join(private)))

    def num_idle(self, groups: Iterable[BlockGroup]) -> int:
        """Blocks of `groups` that `num_available` counts: sharing them makes them unavailable."""
        return sum(group.num_blocks for group in groups if group.refs == 0)

    def _park(self, group: BlockGroup) -> None:
        """Nobody holds a reusable group any more: it is idle, or gone if a block of it leaves."""
        account = self._count_cached(group, 1)
        account.used -= account.blocks_per_group
        self.prefixes.park(group)
        if self.is_leaving(group):
            self._forget(group)

    def _push(self, ids: BlockIds) -> None:
        """Put blocks that nobody holds on the free list, but for those that leave."""
        if self._leaving:
            leaves = np.isin(ids, np.fromiter(self._leaving, np.int32))
            self._exists[ids[leaves]] = False
            self._leaving.difference_update(ids[leaves].tolist())
            ids = ids[~leaves]
        self._free[self._num_free : self._num_free + len(ids)] = ids
        self._num_free += len(ids)

    def is_leaving(self, group: BlockGroup) -> bool:
        """A block of it was retired."""
        return bool(self._leaving) and not self._leaving.isdisjoint(unpack_ids(group.blocks))

    def _evict(self, num_blocks: int) -> bool:
        """Free at least `num_blocks` of idle groups; False and nothing done if there are fewer."""
        if num_blocks > self._num_cached:
            return False
        target = self._num_free + num_blocks
        while self._num_free < target:
            group = self.prefixes.oldest_idle()
            assert group is not None, "cached blocks without an idle group"
            self._forget(group)
        return True

    def _forget(self, group: BlockGroup) -> None:
        """An idle group is no longer known; its blocks are free."""
        self._count_cached(group, -1)
        self.prefixes.forget(group)
        self._push(unpack_ids(group.blocks))

    def _count_cached(self, group: BlockGroup, sign: int) -> Account:
        account = self.accounts[group.model]
        self._num_cached += sign * account.blocks_per_group
        account.cached += sign * account.blocks_per_group
        return account

    def _spare(self, num_new: int) -> BlockIds:
        """Room on the stack for the blocks that are not free now."""
        return np.empty(self.num_blocks - self._num_free + num_new, np.int32)

    def check(self, held: Iterable[BlockGroup]) -> bool:
        """With the groups that sequences hold, no block is lost or held twice, no account wrong.

        Costs time: for tests.
        """
        held = set(held)
        ids: list[int] = self._free[: self._num_free].tolist()
        for group in [*held, *self.prefixes.idle()]:
            ids.extend(unpack_ids(group.blocks).tolist())
        assert len(ids) == len(set(ids)), "a block is held twice"
        assert set(ids) == set(np.flatnonzero(self._exists).tolist()), "a block is lost"
        assert len(ids) - len(self._leaving) == self.num_blocks, "blocks are miscounted"
        assert self._leaving <= set(ids), "a leaving block is not held"
        self.prefixes.check()
        for name, account in self.accounts.items():
            used = sum(g.num_blocks for g in held if g.model == name)
            idle = sum(g.num_blocks for g in self.prefixes.idle() if g.model == name)
            assert (account.used, account.cached) == (used, idle), f"the account of {name} is wrong"
        assert self._num_cached == sum(a.cached for a in self.accounts.values())
        return True
