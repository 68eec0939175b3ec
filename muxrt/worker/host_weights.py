"""Weights that leave memory while their model sleeps, and come back when it wakes.

They are computed with from one range of addresses that stays theirs, so that programs recorded over
them, in this process or another one, need not know: asleep, its pages are the system's. What they
come back from is a copy of the packed weights in a file without a name (in TMPDIR), written once.
On a CPU host memory is the memory that models sleep to save, so that copy is the page cache's: it
takes what nobody else needs, and is read from the disk where the system had better use for it.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from time import perf_counter
from typing import Self

from muxrt.core import Load, Result, Sleep
from muxrt.errors import MuxrtError
from muxrt.models.llama import Llama
from muxrt.worker.kv_storage import Segment, SharedWeights, share_weights

log = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20  # read at a time by one thread: a few huge pages, many per model


class HostWeights:
    """A model's weights: where they are computed with, and what they come back from."""

    def __init__(self, weights: SharedWeights) -> None:
        """They are there. Raises MuxrtError where there is no room for the copy."""
        self.weights = weights
        self.num_bytes = weights.segment.num_bytes
        self._copy, name = tempfile.mkstemp(prefix="muxrt-weights-")
        os.unlink(name)
        try:
            self._store()
        except OSError as error:
            raise MuxrtError(
                f"no room for {self.num_bytes} bytes of weights in {tempfile.gettempdir()}:"
                f" {error.strerror}; set TMPDIR to another folder"
            ) from None

    @classmethod
    def of(cls, llama: Llama, is_private: bool) -> tuple[Self, Llama]:
        """The weights of `llama`, moved; the model over them, asleep.

        `is_private`: no other process maps them.
        """
        (shard, shape), state = llama.part, llama.state()
        del llama  # what it holds can go once it has moved, if the caller lets go, too
        moved = cls(share_weights(state, is_private))
        model = Llama.from_state(shape, moved.weights.state(), shard)
        moved.drop()
        return moved, model

    def _store(self) -> None:
        with self.weights.segment.view() as home:
            begin = 0
            while begin < self.num_bytes:
                begin += os.write(self._copy, home[begin : begin + PIECE_BYTES])

    def drop(self) -> None:
        """The model sleeps: its memory is the system's."""
        self.weights.segment.discard()

    def load(self, threads: Executor) -> None:
        """It wakes: its weights are there. Raises MuxrtError where the copy cannot be read."""
        reads = [threads.submit(self._read, piece) for piece in self._pieces()]
        wait(reads)  # for all: what is read after a failure would take memory that nobody counts
        try:
            for read in reads:
                read.result()
        except OSError as error:
            self.drop()
            raise MuxrtError(f"the copy of its weights cannot be read: {error}") from None

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for begin in range(0, self.num_bytes, PIECE_BYTES):
            yield begin, min(begin + PIECE_BYTES, self.num_bytes)

    def _read(self, piece: tuple[int, int]) -> None:
        begin, end = piece
        while begin < end:
            count = self.weights.segment.read(self._copy, begin, end)
            if not count:
                raise OSError(f"it ends at byte {begin} of {self.num_bytes}")
            begin += count

    def close(self) -> None:
        """Give memory and copy back."""
        os.close(self._copy)
        self.weights.segment.close()


class WeightMover:
    """What the copy lane does for models that sleep and wake."""

    def __init__(
        self, weights: Mapping[str, HostWeights], arena: Segment, block_bytes: int, num_threads: int
    ) -> None:
        """`weights` by model; what waking ones take from `arena` are its blocks."""
        self._weights = weights
        self._arena = arena
        self._block_bytes = block_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="weights")
        self._left: list[Segment] = []  # of who made room, for who wakes next
        self._offered: list[Segment] = []  # of others that sleep: the system's, if it needs them

    def run(self, work: Load | Sleep) -> Result:
        """Wake a model or let it sleep. Raises MuxrtError where its weights cannot be read."""
        begun_s, taken = perf_counter(), 0
        model = self._weights[work.model]
        home = model.weights.segment
        if isinstance(work, Load):
            taken = self._hand_over(work, home)
            model.load(self._threads)
        elif work.makes_room:
            self._left.append(home)
        else:
            home.offer()
            self._offered.append(home)
        elapsed_s = perf_counter() - begun_s
        log.info(
            "event=%s model=%s mb=%.1f taken_mb=%.1f ms=%.2f",
            *("woke" if isinstance(work, Load) else "slept", work.model),
            *(model.num_bytes / 1e6, taken / 1e6, elapsed_s * 1e3),
        )
        return Result(elapsed_s=elapsed_s)

    def _hand_over(self, work: Load, home: Segment) -> int:
        """Give the weights pages of who slept, and then of blocks that made room; how many bytes.

        What is left of those goes back, before there is more than there may be. New pages would
        have to be zeroed first, which takes as long as filling them.
        """
        ends = (work.first_block * self._block_bytes, work.end_block * self._block_bytes)
        taken = 0
        if home in self._offered:  # its own may be there still
            self._offered.remove(home)
        else:
            for segment in self._left:
                taken += home.take_pages(taken, segment)
            while self._offered and (more := home.take_pages(taken, self._offered[0])):
                taken += more
                self._offered.pop(0)
            taken += home.take_pages(taken, self._arena, *ends)
        self._arena.discard(*ends)
        while self._left:
            self._left.pop().discard()
        return taken

    def close(self) -> None:
        """Nothing is moved any more; all memory and copies are given back."""
        self._threads.shutdown()
        for model in self._weights.values():
            model.close()
