"""Starts the processes of a mesh's other ranks before this one knows, or imports, what they load.

So Python, torch and the weights of all ranks load beside each other, and each rank beats from its
first moment on. Nothing here needs torch: the unit's process comes here before it imports that.
"""

import logging
import os
from contextlib import ExitStack

import msgspec

from muxrt.config.placement import Mesh
from muxrt.errors import MuxrtError
from muxrt.worker.piped import Piped, start_piped
from muxrt.worker.watch import BEATS_BYTES, Beats, Watch

log = logging.getLogger(__name__)

MODULE = "muxrt.worker.rank_process"


class RankProcesses:
    """Ranks 1, 2, ... of a mesh, each of which waits for its setup, and this one's watch."""

    def __init__(self, mesh: Mesh, num_lanes: int) -> None:
        """`num_lanes` are those for batches; the copy lane comes on top."""
        self._stack = ExitStack()
        # Beats at first; whoever knows how much ranks exchange makes it larger, and closes it.
        self.memory = os.memfd_create("muxrt-mesh")
        os.ftruncate(self.memory, BEATS_BYTES)
        is_shared = mesh.exchange == "shared" and mesh.device == "cpu"
        lanes = range(num_lanes + 1 if is_shared else 0)
        # Eventfds by which ranks are woken, by lane and rank; none where gloo or NCCL wakes.
        self.wakes = tuple(tuple(open_wake() for _ in range(mesh.tp)) for _ in lanes)
        wakes = [wake for lane in self.wakes for wake in lane]
        for wake in wakes:
            self._stack.callback(os.close, wake)
        inherited = (self.memory, *wakes)
        facts, us = msgspec.json.encode(mesh).decode(), str(os.getpid())
        self.piped: dict[int, Piped] = {
            rank: start_piped(MODULE, inherited, (str(self.memory), str(rank), facts, us))
            for rank in range(1, mesh.tp)
        }
        self.reason: str | None = None  # why the mesh cannot go on
        beats = Beats(self.memory, mesh.tp)
        self._watch = Watch(beats, 0, self.piped, mesh, self._silence)
        self._stack.callback(self._watch.close)

    def loaded(self) -> None:
        """Every rank has loaded: from now on none may stand still for longer than the timeout."""
        self._watch.loaded()

    def lose(self, reason: str) -> None:
        """The mesh cannot go on; from any thread. The first reason counts."""
        self.reason = self.reason or reason

    def check(self) -> None:
        """Raises MuxrtError if a rank died or stood still; one that gave up says why itself."""
        for rank, piped in self.piped.items():
            if self.reason is None and (status := piped.process.poll()):
                pid = piped.process.pid
                self.lose(f"rank {rank} (process {pid}) ended with status {status}")
        if self.reason is not None:
            raise MuxrtError(f"the unit's mesh is broken: {self.reason}")

    def close(self) -> None:
        """End them all, whatever they do."""
        self._stack.close()
        for piped in self.piped.values():
            piped.process.kill()

    def _silence(self, rank: int, seconds: float) -> None:
        """It stands still: end it, so that nobody waits for it."""
        process = self.piped[rank].process
        if process.poll() == 0:
            return  # it gave up, and its pipe says why
        self.lose(f"rank {rank} (process {process.pid}) did not move for {seconds:.1f} s")
        log.error("event=rank_silent rank=%d pid=%d seconds=%.1f", rank, process.pid, seconds)
        process.kill()


def open_wake() -> int:
    """An eventfd by which a rank is woken; rank processes inherit it."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
