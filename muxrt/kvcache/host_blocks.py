"""Host memory for swapped-out sequences: block ids on a stack, nothing else."""

import numpy as np

from muxrt.core import BlockIds


class HostBlocks:
    """A fixed number of host blocks, as large as the arena's."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: BlockIds = np.arange(num_blocks, dtype=np.int32)[::-1].copy()
        self.num_free = num_blocks

    def take(self, num_blocks: int) -> BlockIds | None:
        """Ids of `num_blocks` blocks, or None if fewer are free."""
        if num_blocks > self.num_free:
            return None
        self.num_free -= num_blocks
        return self._free[self.num_free : self.num_free + num_blocks].copy()

    def release(self, ids: BlockIds) -> None:
        """Give blocks back."""
        assert self.num_free + len(ids) <= self.num_blocks, "a host block is released twice"
        self._free[self.num_free : self.num_free + len(ids)] = ids
        self.num_free += len(ids)

    def check(self, held: list[BlockIds]) -> bool:
        """With the ids that sequences hold, every host block exists exactly once."""
        ids = [*self._free[: self.num_free].tolist(), *(int(i) for part in held for i in part)]
        assert sorted(ids) == list(range(self.num_blocks)), "a host block is lost or held twice"
        return True
