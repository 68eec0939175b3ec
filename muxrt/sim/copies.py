"""The copy lane of a unit: blocks on their way between the arena and host memory.

Assumptions, each of which a measurement on GPUs may replace:

* A unit has one copy lane, as the worker has: its copies run one after the other.
* Each GPU has a link of its own, in each direction, on which the mesh's ranks copy side by side.
* The GPUs of a node reach host memory over `NODE_LINKS` such links together (as in a DGX A100, with
  two GPUs behind each PCIe switch). Units of a node whose copies run at the same time share them if
  they are simulated together: where they have replicas of a model in common.
"""

from collections import deque

from muxrt.config.placement import UnitSpec
from muxrt.core import ID_BYTES, Copy, CopyKind, Result
from muxrt.engine.executor import Done
from muxrt.sim.links import Link, Links, LinkTransfer
from muxrt.sim.loop import EventLoop

# PCIe 4.0 x16, as A100's data sheet has it (32e9), at the 80 % that large copies reach.
HOST_LINK_BYTES_PER_S = 25.6e9
NODE_LINKS = 4


def host_path(spec: UnitSpec, kind: CopyKind) -> tuple[Link, ...]:
    """The links between the mesh of a unit and its node's memory, in the direction of a copy."""
    node = spec.mesh.node or 0
    return (
        Link(f"{spec.name} {kind.value}", HOST_LINK_BYTES_PER_S * len(spec.mesh.gpus or (0,))),
        Link(f"node {node} {kind.value}", HOST_LINK_BYTES_PER_S * NODE_LINKS),
    )


class CopyLane:
    """Runs copies one after the other, as fast as their links let them."""

    def __init__(self, loop: EventLoop, links: Links, spec: UnitSpec, block_bytes: int) -> None:
        self._loop, self._links = loop, links
        self._spec, self._block_bytes = spec, block_bytes
        self._queue: deque[tuple[Copy, Done]] = deque()  # the first one runs
        self._transfer: LinkTransfer | None = None
        self._started_s = 0.0

    def launch(self, copy: Copy, done: Done) -> None:
        """Start `copy` when those before it are done."""
        self._queue.append((copy, done))
        if len(self._queue) == 1:
            self._start()

    def stop(self) -> None:
        """Nothing of what was launched will be done."""
        self._queue.clear()
        if self._transfer is not None:
            self._links.cancel(self._transfer)

    def _start(self) -> None:
        copy, _ = self._queue[0]
        num_bytes = len(copy.blocks) // ID_BYTES * self._block_bytes
        self._started_s = self._loop.now_s
        self._transfer = self._links.send(host_path(self._spec, copy.kind), num_bytes, self._end)

    def _end(self) -> None:
        copy, done = self._queue.popleft()
        elapsed_s = self._loop.now_s - self._started_s
        self._transfer = None
        if self._queue:
            self._start()
        done(copy, Result(elapsed_s=elapsed_s))
