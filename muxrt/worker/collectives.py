"""Exchanges between ranks by torch.distributed, one group for each lane: gloo, or NCCL on GPUs.

Lanes of a rank are threads that run at their own pace; with a group each, no exchange of one can
wait for one of another. Within a lane the ranks run the same works in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    AllreduceOptions,
    BroadcastOptions,
    GatherOptions,
    PrefixStore,
    ProcessGroupGloo,
    ReduceOp,
    Store,
    TCPStore,
)

from muxrt.config.shard import Shard, part_of
from muxrt.errors import MuxrtError
from muxrt.worker.lanes import LaneDied

CPU = torch.device("cpu")
LOOPBACK, HOST = "lo", "127.0.0.1"  # all ranks of a mesh are processes of one machine
MEET_S = 120.0  # for all ranks to be there, each having loaded its weights


class RankLost(LaneDied):
    """Another rank did not take part in an exchange: it is gone, or stands still."""


def check_nccl() -> None:
    """Raise MuxrtError unless GPUs can exchange with this torch."""
    if not torch.distributed.is_nccl_available():
        raise MuxrtError(f"torch {torch.__version__} was built without NCCL")


def open_store(port: int | None = None) -> TCPStore:
    """Where ranks find each other: a new one, or the one that listens on `port`."""
    timeout = timedelta(seconds=MEET_S)
    return TCPStore(HOST, port or 0, None, port is None, timeout, wait_for_workers=False)


class GroupRanks:
    """The `Ranks` of one lane."""

    def __init__(
        self, store: Store, name: str, shard: Shard, timeout_s: float, device: torch.device = CPU
    ) -> None:
        """Meet the other ranks: they open groups of the same names in the same order.

        `device` is where this rank's tensors are. An exchange by gloo that takes longer than
        `timeout_s` raises RankLost; of NCCL's, a thread of its own ends the process.
        """
        self.rank = shard.rank
        self.size = shard.size
        self._device = device
        if device.type == "cuda":
            # Its watchdog counts from the launch, behind whatever the lane does before: for who is
            # late there is `Overdue` (worker/device_mesh.py).
            timeout_s = max(timeout_s, MEET_S)
        self._timeout = timedelta(seconds=timeout_s)
        open_group = _open_nccl if device.type == "cuda" else _open_gloo
        self._group = open_group(PrefixStore(name, store), shard, self._timeout)
        self._share, self._add, self._gather = (
            BroadcastOptions(),
            AllreduceOptions(),
            GatherOptions(),
        )
        self._most = AllreduceOptions()
        self._most.reduceOp = ReduceOp(ReduceOp.MAX)
        for options in (self._share, self._add, self._gather, self._most):
            # NCCL's then run on the lane's stream, not on one of the group's: with the SMs that the
            # lane has, and inside its graphs.
            options.asyncOp = False

    def share(self, values: Tensor) -> None:
        self._wait(self._group.broadcast([values], self._share))

    def add(self, values: Tensor) -> None:
        self._wait(self._group.allreduce([values], self._add))

    def join(self, part: Tensor, width: int) -> Tensor | None:
        rows, columns = part.shape
        widest = -(-width // self.size)
        if columns < widest:  # pieces of one size are gathered
            part = torch.cat((part, part.new_zeros(rows, widest - columns)), dim=1)
        is_first = self.rank == 0
        pieces = [part.new_empty(rows, widest) for _ in range(self.size)] if is_first else []
        outputs = [pieces] if is_first else []
        self._wait(self._group.gather(outputs, [part.contiguous()], self._gather))
        if not is_first:
            return None
        counts = [len(part_of(width, rank, self.size)) for rank in range(self.size)]
        held = [piece[:, :count] for piece, count in zip(pieces, counts, strict=True)]
        return torch.cat(held, dim=1)

    def most(self, number: int) -> int:
        """The largest of what the ranks say, on all of them; the host waits for it."""
        said = torch.tensor([number], dtype=torch.int64, device=self._device)
        self._wait(self._group.allreduce([said], self._most))
        return int(said.item())

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Exchanges that begin meanwhile may take as long as loading may."""
        self._group._set_default_timeout(timedelta(seconds=MEET_S))
        try:
            yield
        finally:
            self._group._set_default_timeout(self._timeout)

    def close(self) -> None:
        """End its threads; nothing may be under way, unless NCCL does it. Twice is as once."""
        if self._group is None:
            return
        if self._device.type == "cuda":
            self._group.abort()  # without the others, who may be gone
        self._group = None

    def _wait(self, exchange: Any) -> None:
        if exchange is None:  # NCCL's, on the current stream
            return
        try:
            exchange.wait()
        except RuntimeError as error:
            raise RankLost(f"an exchange between ranks failed: {_first_line(error)}") from None


def _open_gloo(store: Store, shard: Shard, timeout: timedelta) -> Any:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(interface=LOOPBACK)]
    options._timeout = timeout
    options._threads = 1  # a lane has one exchange at a time
    return ProcessGroupGloo(store, shard.rank, shard.size, options)


def _open_nccl(store: Store, shard: Shard, timeout: timedelta) -> Any:
    """Not run yet (docs/gpu-status.md). The ranks meet in their first exchange."""
    dist: Any = torch.distributed  # its stubs leave out what depends on how torch was built
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
