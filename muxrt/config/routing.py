"""How requests find the units that prefill and decode them."""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from muxrt.config.document import KeyedError
from muxrt.config.placement import NotNegative, Positive, Share


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A policy, and from when on units of `splitwise` do the other phase's work, too.

    Between the two marks of a queue nothing changes: who helps goes on, who does not, does not.
    """

    policy: Literal["distserve", "splitwise"] = "distserve"
    borrow: bool = True  # a unit of the other pool helps where queues are longer than this:
    borrow_batches: Positive = 4.0  # prefill batches that wait in a unit of the shortest queue
    return_batches: NotNegative = 1.0  # it gets no more where no more than these wait
    borrow_kv: Share = 0.9  # share of the KV of a decode unit that is held or promised
    return_kv: Annotated[float, Meta(ge=0, le=1)] = 0.7


def routing_problems(routing: Routing) -> Iterator[KeyedError]:
    """Marks that contradict each other, and those that nobody would read."""
    for low, high in (("return_batches", "borrow_batches"), ("return_kv", "borrow_kv")):
        found, most = getattr(routing, low), getattr(routing, high)
        if found > most:
            yield KeyedError(
                ("routing", low), f"found {found:g}, expected at most {high}, which is {most:g}"
            )
    if routing.policy == "splitwise":
        return
    plain = Routing()
    for name in ("borrow", "borrow_batches", "return_batches", "borrow_kv", "return_kv"):
        if getattr(routing, name) != getattr(plain, name):
            yield KeyedError(
                ("routing", name),
                f"policy {routing.policy} borrows no units: expected policy: splitwise beside it,"
                " or no such key",
            )
