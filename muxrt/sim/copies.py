"""The copy lane of a unit: blocks on their way between the arena and host memory or other arenas.

Assumptions, each of which a measurement on GPUs may replace:

* A unit has one copy lane, as the worker has: its copies run one after the other.
* Each GPU has a link of its own, in each direction, on which the mesh's ranks copy side by side.
* The GPUs of a node reach host memory over `NODE_LINKS` such links together (as in a DGX A100, with
  two GPUs behind each PCIe switch). Units of a node whose copies run at the same time share them if
  they are simulated together: where they have replicas of a model in common.
* What is fetched from another unit of the node goes over the links between GPUs, those of the unit
  that has fewer or slower ones; from another node over the network, which all transfers out of a
  node, or into it, share. Sealing takes no time.
* A model that wakes comes from host memory, on the links of the swaps in; one that falls asleep
  takes no time, as its weights are there already.
"""

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import msgspec

from muxrt.config.placement import UnitSpec
from muxrt.core import (
    ID_BYTES,
    Copy,
    CopyKind,
    Load,
    Piece,
    Sleep,
    Transfer,
    TransferKind,
)
from muxrt.engine.executor import Done
from muxrt.sim.links import Link, Links, LinkTransfer
from muxrt.sim.loop import FINISH, EventLoop
from muxrt.sim.tokens import Tokens

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


Moved = Copy | Transfer | Load | Sleep


class Peers(Protocol):
    """The other units, as far as K and V come from them."""

    def path(self, source: str, unit: str) -> tuple[Link, ...]:
        """The links from `source` to `unit`; none where `source` is gone."""

    def num_bytes(self, source: str, model: str, pieces: Sequence[Piece]) -> int:
        """Of these pieces of a sequence, as they lie in `source`."""


class CopyLane:
    """Runs copies and transfers one after the other, as fast as their links let them."""

    def __init__(
        self,
        loop: EventLoop,
        links: Links,
        spec: UnitSpec,
        block_bytes: int,
        peers: Peers | None = None,
    ) -> None:
        """`peers` None: nothing is fetched."""
        self._loop, self._links = loop, links
        self._spec, self._block_bytes = spec, block_bytes
        self._peers = peers
        self.tokens = Tokens()  # of the unit: what is fetched opens slots, too
        self._queue: deque[tuple[Moved, Done]] = deque()  # the first one runs
        self._transfer: LinkTransfer | None = None
        self._started_s = 0.0

    def launch(self, work: Moved, done: Done) -> None:
        """Start `work` when those before it are done."""
        self._queue.append((work, done))
        if len(self._queue) == 1:
            self._start()

    def stop(self) -> None:
        """Nothing of what was launched will be done."""
        self._queue.clear()
        if self._transfer is not None:
            self._links.cancel(self._transfer)

    def _start(self) -> None:
        work, _ = self._queue[0]
        self._started_s = self._loop.now_s
        if isinstance(work, Copy):
            num_bytes = len(work.blocks) // ID_BYTES * self._block_bytes
            path = host_path(self._spec, work.kind)
        elif isinstance(work, Load):
            num_bytes, path = work.num_bytes, host_path(self._spec, CopyKind.SWAP_IN)
        elif isinstance(work, Sleep) or work.kind is TransferKind.SEAL:
            self._loop.after(0.0, self._end, FINISH)
            return
        else:
            assert self._peers and work.source, "what is fetched comes from somebody"
            path = self._peers.path(work.source.unit, self._spec.name)
            if not path:
                error = f"{work.source.unit} is gone, and its K and V"
                self._loop.after(0.0, partial(self._end, error), FINISH)
                return
            num_bytes = self._peers.num_bytes(work.source.unit, work.model, work.pieces)
        self._transfer = self._links.send(path, num_bytes, self._end)

    def _end(self, error: str | None = None) -> None:
        if not self._queue:
            return  # the unit died
        work, done = self._queue.popleft()
        elapsed_s = self._loop.now_s - self._started_s
        self._transfer = None
        if self._queue:
            self._start()
        result = self.tokens.run(work, elapsed_s)
        done(work, msgspec.structs.replace(result, error=error))
