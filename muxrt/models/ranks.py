"""What the ranks that hold a model together say to each other while they compute a batch."""

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """One lane's line to the other ranks; all call the same methods in the same order.

    On cores every method returns once the ranks it needs have called it, too, and raises RankLost
    (worker) where one does not within the mesh's timeout. On GPUs it is launched on the current
    stream, and the host goes on: all of it may be captured in a CUDA graph.
    """

    rank: int
    size: int

    def share(self, values: Tensor) -> None:
        """`values` become the first rank's."""

    def add(self, values: Tensor) -> None:
        """`values` become their sum over all ranks, the same bits on each."""

    def join(self, part: Tensor, width: int) -> Tensor | None:
        """part [N, columns of this rank], any strides -> [N, width] on the first rank, else None.

        Columns are dealt as `Shard.vocab` does.
        """
