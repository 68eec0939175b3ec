"""What moves blocks and weights in a mesh: every rank moves its part; it is over when all have.

A sequence that is handed over lies on all ranks, each of which has a share of the unit's address:
some of the kv heads. Sealing gives the checksums of all heads, rank after rank; fetching, each rank
takes its own heads from whoever has them (`worker/transfer.py`).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import msgspec
import numpy as np
import torch

from muxrt.config.model import ModelShape
from muxrt.config.shard import Shard
from muxrt.core import Load, Result, Sleep, Transfer, TransferKind, Work
from muxrt.engine.build import UnitPlan
from muxrt.errors import MuxrtError
from muxrt.models.ranks import Ranks
from muxrt.worker.kv_storage import Storage
from muxrt.worker.lanes import attempt
from muxrt.worker.runner import Copier
from muxrt.worker.transfer import Exchange, Geometry, joined
from muxrt.worker.transports import SharedTransport

SPOKEN_BYTES = 1 << 16  # what a rank can say at once: some thousand checksums
_LENGTH_BYTES = 4


def open_exchange(
    unit: str,
    shard: Shard,
    plan: UnitPlan,
    shapes: Mapping[str, ModelShape],
    storage: Storage,
    stack: ExitStack,
) -> Exchange:
    """What reads other units' blocks into a rank's, and lets others read those.

    `plan` is the rank's, `shapes` are of whole models.
    """
    transport = SharedTransport(storage.arena.fd, storage.arena.num_bytes)
    stack.callback(transport.close)
    geometries = {}
    for model in plan.models:
        heads = shard.kv_heads(shapes[model])
        found = Geometry.of(plan, model)
        geometries[model] = msgspec.structs.replace(
            found, first_head=heads.start, end_head=heads.stop
        )
    return Exchange(unit, geometries, storage.arena.tensor(), transport)


class JoinedAddresses:
    """How K and V on all ranks are reached."""

    def __init__(self, found: Mapping[str, bytes]) -> None:
        self._found = found

    def address(self, model: str) -> bytes:
        return self._found[model]


def join_addresses(
    exchange: Exchange, models: Iterable[str], line: Ranks
) -> JoinedAddresses | None:
    """Those of all ranks, on the first; all ranks call it together."""
    found = {}
    for model in models:
        spoken = speak(exchange.address(model), line)
        found[model] = joined(spoken) if spoken else b""
    return JoinedAddresses(found) if line.rank == 0 else None


def add_up(numbers: Mapping[str, int], line: Ranks) -> dict[str, int]:
    """Each of these, the sum over all ranks, on the first one; all ranks call it together."""
    if not numbers:
        return {}
    spoken = [msgspec.msgpack.decode(m) for m in speak(msgspec.msgpack.encode(numbers), line)]
    return {name: sum(each[name] for each in spoken) for name in numbers if spoken}


def speak(message: bytes, line: Ranks) -> list[bytes]:
    """What every rank says, on the first rank; nothing on the others.

    Raises MuxrtError for more than SPOKEN_BYTES.
    """
    length = len(message).to_bytes(_LENGTH_BYTES, "little")
    if len(length + message) > SPOKEN_BYTES:
        raise MuxrtError(f"found {len(message)} bytes to say, expected {SPOKEN_BYTES} at most")
    padded = (length + message).ljust(SPOKEN_BYTES, b"\0")
    bits = torch.frombuffer(bytearray(padded), dtype=torch.float32)
    heard = line.join(bits[None], line.size * len(bits))
    if heard is None:
        return []
    rows = heard.numpy().view(np.uint8).reshape(line.size, SPOKEN_BYTES)
    messages = [row.tobytes() for row in rows]
    return [
        each[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(each[:_LENGTH_BYTES], "little")]
        for each in messages
    ]


class CopyTogether:
    """A copier whose works end when they have ended on every rank: blocks may be reused then."""

    def __init__(self, copier: Copier, line: Ranks) -> None:
        self._copier, self._line = copier, line

    def run(self, work: Work) -> Result:
        """Raises MuxrtError where it failed on other ranks, RankLost where one is missing."""
        result = attempt(self._copier.run, work)
        failed = torch.tensor([float(result.error is not None)])
        self._line.add(failed)
        if failed.item():
            if result.error is None:
                self._undo(work)
                raise MuxrtError(f"{int(failed.item())} other ranks could not do their part")
            return result
        if isinstance(work, Transfer) and work.kind is TransferKind.SEAL:
            spoken = speak(msgspec.msgpack.encode(result.checksums), self._line)
            checksums = (msgspec.msgpack.decode(each, type=tuple[int, ...]) for each in spoken)
            together = tuple(checksum for rank in checksums for checksum in rank)
            return msgspec.structs.replace(result, checksums=together)
        return result

    def _undo(self, work: Work) -> None:
        """A model that woke here only sleeps again."""
        if isinstance(work, Load):
            self._copier.run(Sleep(work.id, work.lane, work.model, work.num_bytes))
