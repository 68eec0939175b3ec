"""Exchanges between the ranks of a CPU mesh: torch.distributed's gloo, one group for each lane.

Lanes of a rank are threads that run at their own pace; with a group each, no exchange of one can
wait for one of another. Within a lane the ranks run the same works in the same order.
"""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    AllreduceOptions,
    BroadcastOptions,
    GatherOptions,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from muxrt.config.shard import Shard, part_of
from muxrt.worker.lanes import LaneDied

LOOPBACK, HOST = "lo", "127.0.0.1"  # all ranks of a mesh are processes of one machine
MEET_S = 120.0  # for all ranks to be there, each having loaded its weights


class RankLost(LaneDied):
    """Another rank did not take part in an exchange: it is gone, or stands still."""


def open_store(port: int | None = None) -> TCPStore:
    """Where ranks find each other: a new one, or the one that listens on `port`."""
    timeout = timedelta(seconds=MEET_S)
    return TCPStore(HOST, port or 0, None, port is None, timeout, wait_for_workers=False)


class GlooRanks:
    """The `Ranks` of one lane."""

    def __init__(self, store: Store, name: str, shard: Shard, timeout_s: float) -> None:
        """Meet the other ranks: they open groups of the same names in the same order.

        An exchange that takes longer than `timeout_s` raises RankLost.
        """
        self.rank = shard.rank
        self._size = shard.size
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(interface=LOOPBACK)]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1  # a lane has one exchange at a time
        self._group: Any = ProcessGroupGloo(
            PrefixStore(name, store), shard.rank, shard.size, options
        )
        self._share, self._add, self._gather = (
            BroadcastOptions(),
            AllreduceOptions(),
            GatherOptions(),
        )

    def share(self, values: Tensor) -> None:
        self._wait(self._group.broadcast([values], self._share))

    def add(self, values: Tensor) -> None:
        self._wait(self._group.allreduce([values], self._add))

    def join(self, part: Tensor, width: int) -> Tensor | None:
        rows, columns = part.shape
        widest = -(-width // self._size)
        if columns < widest:  # gloo gathers pieces of one size
            part = torch.cat((part, part.new_zeros(rows, widest - columns)), dim=1)
        is_first = self.rank == 0
        pieces = [torch.empty(rows, widest) for _ in range(self._size)] if is_first else []
        outputs = [pieces] if is_first else []
        self._wait(self._group.gather(outputs, [part.contiguous()], self._gather))
        if not is_first:
            return None
        counts = [len(part_of(width, rank, self._size)) for rank in range(self._size)]
        held = [piece[:, :count] for piece, count in zip(pieces, counts, strict=True)]
        return torch.cat(held, dim=1)

    def close(self) -> None:
        """End its threads."""
        self._group = None

    def _wait(self, exchange: Any) -> None:
        try:
            exchange.wait()
        except RuntimeError as error:
            raise RankLost(f"an exchange between ranks failed: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
