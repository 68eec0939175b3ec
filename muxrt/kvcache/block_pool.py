"""The unit's one pool of KV blocks: a free list, block groups, and an account per model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from muxrt.core import BlockGroup, BlockIds
from muxrt.errors import ConfigError
from muxrt.kvcache.prefix_cache import PrefixCache


@dataclass(slots=True)
class Account:
    """What one model holds and is entitled to, in blocks."""

    blocks_per_group: int
    quota: int = 0
    used: int = 0  # in groups that some sequence holds; a shared group counts once
    cached: int = 0  # in idle groups of the prefix cache: free for whoever needs them

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
        self._held: set[BlockGroup] = set()
        self._leaving: set[int] = set()  # retired ids that a group still holds

    @property
    def num_available(self) -> int:
        """Blocks that can be had at once: free ones and those of idle cached groups."""
        return self._num_free + self._num_cached

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        """Blocks in groups that sequences hold."""
        return sum(account.used for account in self.accounts.values())

    def grow(self, ids: Iterable[int]) -> None:
        """Add an extent of new blocks."""
        new = np.fromiter(ids, np.int32)
        known = set(self._all_ids())
        if not known.isdisjoint(new.tolist()) or len(set(new.tolist())) != len(new):
            raise ConfigError("grow: a block id is in the pool already")
        self._free = np.concatenate(
            [self._free[: self._num_free], new[::-1], self._spare(len(new))]
        )
        self._num_free += len(new)
        self.num_blocks += len(new)

    def retire(self, ids: Iterable[int]) -> int:
        """Take blocks out of the pool; returns how many are still held and leave when released.

        Idle cached groups that contain one are forgotten.
        """
        gone = set(ids)
        for group in [g for g in self.prefixes.idle() if not gone.isdisjoint(g.blocks.tolist())]:
            self._forget(group)
        free = self._free[: self._num_free]
        leaving_now = np.isin(free, np.fromiter(gone, np.int32))
        kept = free[~leaving_now]
        self._leaving |= gone - set(free[leaving_now].tolist())
        self._free[: len(kept)] = kept
        self._num_free = len(kept)
        self.num_blocks -= len(gone)
        return len(self._leaving)

    def take(self, model: str, num_groups: int) -> list[BlockGroup] | None:
        """New groups for `model`, evicting idle cached ones if need be; None if too few exist."""
        account = self.accounts[model]
        size = account.blocks_per_group
        wanted = size * num_groups
        if wanted > self._num_free and not self._evict(wanted - self._num_free):
            return None
        self._num_free -= wanted
        account.used += wanted
        # One copy for all groups: their `blocks` are rows of it.
        rows = self._free[self._num_free : self._num_free + wanted].reshape(num_groups, size).copy()
        groups = [BlockGroup(model, row) for row in rows]
        self._held.update(groups)
        return groups

    def share(self, groups: Iterable[BlockGroup]) -> None:
        """One more sequence holds each of `groups` (found by `prefixes.match`)."""
        for group in groups:
            group.refs += 1
            if group.refs == 1:
                self.prefixes.unpark(group)
                self._count_cached(group, -len(group.blocks))
                self.accounts[group.model].used += len(group.blocks)
                self._held.add(group)

    def release(self, groups: Sequence[BlockGroup]) -> None:
        """One sequence lets go of each of `groups`; those that nobody holds are reusable."""
        # Last first: the tail is the least likely to be somebody's prefix, so it is evicted first.
        for group in reversed(groups):
            assert group.refs > 0, "a group is released twice"
            group.refs -= 1
            if group.refs:
                continue
            self._held.remove(group)
            self.accounts[group.model].used -= len(group.blocks)
            if group.key is None or self._is_leaving(group):
                self._drop(group)
            else:
                self.prefixes.park(group)
                self._count_cached(group, len(group.blocks))

    def num_idle(self, groups: Iterable[BlockGroup]) -> int:
        """Blocks of `groups` that `num_available` counts: sharing them makes them unavailable."""
        return sum(len(group.blocks) for group in groups if group.refs == 0)

    def _drop(self, group: BlockGroup) -> None:
        """Put the blocks of a group that nobody holds back on the free list."""
        if group.key is not None:
            self.prefixes.forget(group)
        ids = group.blocks
        if self._leaving:
            ids = np.array([i for i in ids.tolist() if not self._leave(i)], np.int32)
        self._free[self._num_free : self._num_free + len(ids)] = ids
        self._num_free += len(ids)

    def _leave(self, block: int) -> bool:
        if block not in self._leaving:
            return False
        self._leaving.remove(block)
        return True

    def _is_leaving(self, group: BlockGroup) -> bool:
        return bool(self._leaving) and not self._leaving.isdisjoint(group.blocks.tolist())

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
        self._count_cached(group, -len(group.blocks))
        self._drop(group)

    def _count_cached(self, group: BlockGroup, change: int) -> None:
        self._num_cached += change
        self.accounts[group.model].cached += change

    def _spare(self, num_new: int) -> BlockIds:
        """Room on the stack for the blocks that are not free now."""
        return np.empty(self.num_blocks - self._num_free + num_new, np.int32)

    def _all_ids(self) -> list[int]:
        ids: list[int] = self._free[: self._num_free].tolist()
        for group in [*self._held, *self.prefixes.idle()]:
            ids.extend(group.blocks.tolist())
        return ids

    def check(self) -> bool:
        """No block lost, none held twice, every account right. Costs time: for tests."""
        ids = self._all_ids()
        assert len(ids) == len(set(ids)), "a block is held twice"
        assert len(ids) - len(self._leaving) == self.num_blocks, "a block is lost"
        assert self._leaving <= set(ids), "a leaving block is not held"
        self.prefixes.check()
        for name, account in self.accounts.items():
            used = sum(len(g.blocks) for g in self._held if g.model == name)
            cached = sum(len(g.blocks) for g in self.prefixes.idle() if g.model == name)
            assert (account.used, account.cached) == (used, cached), (
                f"the account of {name} is wrong"
            )
        assert self._num_cached == sum(a.cached for a in self.accounts.values())
        return True
