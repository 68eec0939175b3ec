"""Exchanges between the ranks of a CPU mesh through memory that all have mapped.

Everybody writes its part into its own room, all meet, and each reads what it needs from the rooms
of the others: an all-reduce is one write and one sum, in the order of the ranks. There are two sets
of rooms in turn, so that nobody writes where a slower rank still reads: who comes to the next
meeting has read everything of the last. Who waits looks for a moment, then sleeps and is woken: on
a core that others want, too, a rank that spins has used up its share of it when it is needed.
"""

import os
import select
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt.config.shard import Shard, part_of
from muxrt.kernels import meeting
from muxrt.worker.collectives import RankLost

Floats = npt.NDArray[np.float32]

ROOM = 1 << 18  # floats that a rank exchanges at a time
PARTS = 4  # of a timeout
LOOKS = 2_000  # 40 us on a Xeon; a rank that comes later is waited for asleep


class SharedRanks:
    """The `Ranks` of one lane."""

    def __init__(
        self, memory: Tensor, wakes: Sequence[int], shard: Shard, timeout_s: float
    ) -> None:
        """memory [num_bytes(size)] uint8, zeros at first: shared by the ranks, as is `wakes`.

        `wakes` are eventfds, one by which each rank is woken. Who is missing for `timeout_s` is
        lost.
        """
        self.rank, self.size, self._timeout_s = shard.rank, shard.size, timeout_s
        counters = _counters_bytes(shard.size)
        self._counters = memory[:counters].view(torch.int64).numpy()
        rooms = memory[counters:].view(torch.float32).view(2, shard.size, ROOM)
        self._rooms: Floats = rooms.numpy()
        self._wakes, self._turn = tuple(wakes), 0
        self._poll = select.poll()
        self._poll.register(self._wakes[self.rank], select.POLLIN)

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
            for rank in range(2, self.size):
                piece += rooms[rank, : len(piece)]

    def join(self, part: Tensor, width: int) -> Tensor | None:
        rows = len(part)
        cuts = [part_of(width, rank, self.size) for rank in range(self.size)]
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
        state = self._meet(LOOKS)
        if state == meeting.AWAITED:
            self._wake()
            state = self._meet(LOOKS)
        if state != meeting.MET:
            self._sleep()
        return rooms

    def _meet(self, looks: int) -> int:
        state: int = meeting.meet(self._counters, self.rank, self.size, self._turn, looks)
        return state

    def _wake(self) -> None:
        asleep = self._counters[self.size * meeting.SPACING :: meeting.SPACING]
        for rank in np.flatnonzero(asleep).tolist():
            os.eventfd_write(self._wakes[rank], 1)

    def _sleep(self) -> None:
        """Until all have come. Raises RankLost.

        The timeout is waited for in parts: of a machine that slept itself, one is gone.
        """
        missed = 0
        while missed < PARTS:
            meeting.doze(self._counters, self.rank, self.size, 1)
            # Who came before it could see that we sleep is seen by us now.
            state = self._meet(1)
            if state != meeting.MET:
                is_woken = self._poll.poll(self._timeout_s / PARTS * 1000)
                missed += not is_woken
            meeting.doze(self._counters, self.rank, self.size, -1)
            with suppress(BlockingIOError):
                os.eventfd_read(self._wakes[self.rank])
            if state == meeting.MET or self._meet(1) == meeting.MET:
                return
        counts = self._counters[: self.size * meeting.SPACING : meeting.SPACING]
        missing = np.flatnonzero(counts < self._turn).tolist()
        raise RankLost(
            f"an exchange between ranks failed: {missing} did not come within {self._timeout_s:g} s"
        )


def _counters_bytes(size: int) -> int:
    return 2 * size * meeting.SPACING * 8


def num_bytes(size: int) -> int:
    """Memory of one lane; pages are taken when touched."""
    return _counters_bytes(size) + 2 * size * ROOM * 4


def _pieces(values: npt.NDArray[np.float32]) -> Iterator[Floats]:
    for begin in range(0, len(values), ROOM):
        yield values[begin : begin + ROOM]
