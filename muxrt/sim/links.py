"""Links that transfers share: who moves bytes over one slows the others on it down.

Rates are max-min fair (Bertsekas & Gallager, Data Networks, 2nd ed., section 6.5.2: progressive
filling): every transfer gets as much as every other of its most crowded link, unless it is held up
elsewhere, and what it leaves there goes to the others. They are found anew when a transfer starts
or ends.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from muxrt.sim.loop import FINISH, Event, EventLoop


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a connection. Equal links are the same link."""

    name: str
    bytes_per_s: float
    latency_s: float = 0.0  # from when a byte has left until it is there

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.latency_s < 0:
            raise ValueError(
                f"link {self.name}: found {self.bytes_per_s} bytes/s and {self.latency_s} s,"
                " expected more than 0 bytes/s and at least 0 s"
            )


@dataclass(slots=True, eq=False)
class LinkTransfer:
    """Bytes on their way over some links."""

    path: tuple[Link, ...]
    done: Callable[[], None]
    left: float  # bytes that are still to be sent, at `since_s`
    since_s: float
    rate: float = 0.0  # bytes/s
    end: Event | None = None  # the last byte leaves; afterwards, it arrives


class Links:
    """The transfers of one clock, and what each gets of its links."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._sending: dict[LinkTransfer, None] = {}  # in order of their starts

    def send(
        self, path: Sequence[Link], num_bytes: float, done: Callable[[], None]
    ) -> LinkTransfer:
        """Move `num_bytes` over all links of `path`; `done` is called when the last one is there.

        Raises ValueError without a link or for less than no bytes.
        """
        if not path or num_bytes < 0:
            raise ValueError(
                f"found {num_bytes} bytes over {len(path)} links, expected at least 0 over 1"
            )
        transfer = LinkTransfer(tuple(dict.fromkeys(path)), done, num_bytes, self._loop.now_s)
        self._sending[transfer] = None
        self._deal()
        return transfer

    def cancel(self, transfer: LinkTransfer) -> None:
        """It goes no further and `done` is not called; too late does no harm."""
        if transfer.end is not None:
            transfer.end.cancel()
        if transfer in self._sending:
            del self._sending[transfer]
            self._deal()

    def _deal(self) -> None:
        """Give every transfer its rate, and find out when its last byte leaves with it."""
        now = self._loop.now_s
        for transfer, rate in fair_rates(self._sending).items():
            if rate == transfer.rate:
                continue
            transfer.left = max(0.0, transfer.left - (now - transfer.since_s) * transfer.rate)
            transfer.since_s, transfer.rate = now, rate
            if transfer.end is not None:
                transfer.end.cancel()
            ends_s = now + transfer.left / rate
            transfer.end = self._loop.at(ends_s, partial(self._sent, transfer), FINISH)

    def _sent(self, transfer: LinkTransfer) -> None:
        del self._sending[transfer]
        latency_s = sum(link.latency_s for link in transfer.path)
        transfer.end = self._loop.after(latency_s, transfer.done, FINISH)
        self._deal()


def fair_rates(transfers: Iterable[LinkTransfer]) -> dict[LinkTransfer, float]:
    """Bytes/s of each, max-min fair over the links of its path."""
    waiting = list(transfers)
    room: dict[Link, float] = {link: link.bytes_per_s for t in waiting for link in t.path}
    rates: dict[LinkTransfer, float] = {}
    while waiting:
        users = {link: [t for t in waiting if link in t.path] for link in room}
        share, tight = min(
            ((room[link] / len(mine), link) for link, mine in users.items() if mine),
            key=lambda found: found[0],
        )
        for transfer in users[tight]:
            rates[transfer] = share
            for link in transfer.path:
                room[link] -= share
        waiting = [t for t in waiting if t not in rates]
    return rates
