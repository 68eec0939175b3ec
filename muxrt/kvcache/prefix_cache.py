"""Reusable block groups: an index by chained hash key, and an LRU of those no sequence holds."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from muxrt.core import BlockGroup


class PrefixCache:
    """Knows which complete groups exist. It counts no blocks: that is the pool's business."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, BlockGroup] = {}
        self._idle: OrderedDict[bytes, BlockGroup] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._by_key)

    def publish(self, group: BlockGroup, key: bytes) -> None:
        """Make a complete group findable. A second group of the same content stays private."""
        if group.key is None and key not in self._by_key:
            group.key = key
            self._by_key[key] = group

    def match(self, keys: Sequence[bytes]) -> list[BlockGroup]:
        """The groups of the longest known prefix of `keys`."""
        found = []
        for key in keys:
            group = self._by_key.get(key)
            if group is None:
                break
            found.append(group)
        return found

    def park(self, group: BlockGroup) -> None:
        """No sequence holds `group` any more; it becomes the most recently used idle one."""
        assert group.key is not None
        self._idle[group.key] = group

    def unpark(self, group: BlockGroup) -> None:
        """A sequence holds `group` again."""
        assert group.key is not None
        del self._idle[group.key]

    def oldest_idle(self) -> BlockGroup | None:
        """The least recently used group that no sequence holds."""
        return next(iter(self._idle.values()), None)

    def forget(self, group: BlockGroup) -> None:
        """Drop a group that no sequence holds from the index."""
        assert group.key is not None
        self._idle.pop(group.key, None)
        del self._by_key[group.key]
        group.key = None

    def idle(self) -> Iterator[BlockGroup]:
        """The idle groups, oldest first."""
        return iter(self._idle.values())

    def check(self) -> bool:
        """Every key leads to a group that bears it; idle means held by nobody."""
        for key, group in self._by_key.items():
            assert group.key == key, "a group is filed under another key"
            assert (group.refs == 0) == (key in self._idle), f"refs={group.refs} of an idle group"
        assert self._idle.keys() <= self._by_key.keys(), "an idle group cannot be found"
        return True
