"""Exchanges between the ranks of a CPU mesh through memory that all have mapped.

Everybody writes its part into its own room, all meet, and each reads what it needs from the rooms
of the others: an all-reduce is one write and one sum, in the order of the ranks. There are two sets
of rooms in turn, so that nobody writes where a slower rank still reads: who comes to the next
meeting has read everything of the last.
"""

from collections.abc import Iterator
from time import monotonic, sleep

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt.config.shard import Shard, part_of
from muxrt.kernels import MEET_SPACING, meet
from muxrt.worker.collectives import RankLost
from muxrt.worker.kv_storage import Segment

Floats = npt.NDArray[np.float32]

ROOM = 1 << 18  # floats that a rank exchanges at a time
LOOKS = 20_000  # about a millisecond; later than that a rank is late, and is waited for asleep
ASLEEP_S = 1e-4


class SharedRanks:
    """The `Ranks` of one lane."""

    def __init__(
        self, memory: Segment, offset: int, lane: int, shard: Shard, timeout_s: float
    ) -> None:
        """`memory` has `num_bytes` from `offset` on. Who is missing for `timeout_s` is lost."""
        self.rank, self._size, self._timeout_s = shard.rank, shard.size, timeout_s
        counters, rooms = shard.size * MEET_SPACING, 2 * shard.size * ROOM
        at = offset + lane * num_bytes(shard.size, 1)
        self._counters = memory.tensor(torch.int64, at, counters).numpy()
        floats = memory.tensor(torch.float32, at + 8 * counters, rooms)
        self._rooms: Floats = floats.view(2, shard.size, ROOM).numpy()
        self._turn = 0

    def share(self, values: Tensor) -> None:
        """values 1-D int32."""
        bits = values.view(torch.float32).numpy()
        for piece in _pieces(bits):
            rooms = self._exchange(piece if self.rank == 0 else piece[:0])
            piece[:] = rooms[0, : len(piece)]

    def add(self, values: Tensor) -> None:
        for piece in _pieces(values.view(-1).numpy()):
            rooms = self._exchange(piece)
            np.add(rooms[0, : len(piece)], rooms[1, : len(piece)], out=piece)
            for rank in range(2, self._size):
                piece += rooms[rank, : len(piece)]

    def join(self, part: Tensor, width: int) -> Tensor | None:
        rows = len(part)
        cuts = [part_of(width, rank, self._size) for rank in range(self._size)]
        step = ROOM // max(len(cut) for cut in cuts)
        joined = np.empty((rows, width), np.float32) if self.rank == 0 else None
        for begin in range(0, rows, step):
            piece = part[begin : begin + step].numpy()
            rooms = self._exchange(np.ascontiguousarray(piece).reshape(-1))
            if joined is None:
                continue
            for rank, cut in enumerate(cuts):
                found = rooms[rank, : len(piece) * len(cut)].reshape(len(piece), len(cut))
                joined[begin : begin + step, cut.start : cut.stop] = found
        return None if joined is None else torch.from_numpy(joined)

    def close(self) -> None:
        """Nothing to do: the memory is the segment's."""

    def _exchange(self, values: Floats) -> Floats:
        """Put `values` into our room; everybody's rooms, until the next but one exchange."""
        self._turn += 1
        rooms: Floats = self._rooms[self._turn % 2]
        rooms[self.rank, : len(values)] = values
        if not self._has_met():
            due_s = monotonic() + self._timeout_s
            while not self._has_met():
                self._check(due_s)
        return rooms

    def _has_met(self) -> bool:
        met: bool = meet(self._counters, self.rank, self._size, self._turn, LOOKS)
        return met

    def _check(self, due_s: float) -> None:
        if monotonic() > due_s:
            counts = self._counters[::MEET_SPACING]
            missing = np.flatnonzero(counts < self._turn).tolist()
            raise RankLost(
                f"an exchange between ranks failed: {missing} did not come within"
                f" {self._timeout_s:g} s"
            )
        sleep(ASLEEP_S)


def num_bytes(size: int, lanes: int) -> int:
    """What a segment needs for `lanes` lanes of `size` ranks; pages are taken when touched."""
    return lanes * size * (8 * MEET_SPACING + 2 * 4 * ROOM)


def _pieces(values: npt.NDArray[np.float32]) -> Iterator[Floats]:
    for begin in range(0, len(values), ROOM):
        yield values[begin : begin + ROOM]
