"""The life of a request whose prompt one unit computes and whose answer another one generates.

The prefill unit computes the prompt and the first token and then holds K and V; the decode unit
fetches them when it has room and goes on; then the holder lets go. Whatever fails on the way is
computed again on the decode side, from the prompt and the tokens that the client already has: a
failure costs time, never a token. `STEPS` is all of it; what it says is done by the endpoint
(server/dispatch.py) and the simulator (sim/group.py) alike.
"""

from dataclasses import dataclass
from enum import Enum

from muxrt.core import Held, Output
from muxrt.errors import TransferFailed

# Held blocks are let go after so many seconds; whoever comes later computes the prompt again.
LEASE_S = 30.0
# A request that was set back so often is given up: it may be what its units die of.
MAX_SETBACKS = 3


class Stage(Enum):
    """Where a request is on its way from one unit to another."""

    PREFILLING = "prefilling"
    FETCHING = "fetching"  # its decode unit was told; the prefill unit holds its blocks
    DECODING = "decoding"


class Event(Enum):
    """What a unit said, or its end."""

    HELD = "held"  # the prompt is computed, its blocks can be fetched
    FETCHED = "fetched"
    NOT_FETCHED = "not fetched"  # the holder died, the lease ran out, or bytes were damaged
    DIED = "died"  # the unit that has the request now


def event_of(output: Output) -> Event | None:
    """What an output of a request on its way says of the hand-over; None: it is the client's."""
    if output.held is not None:
        return Event.HELD
    if output.is_fetched:
        return Event.FETCHED
    if output.refusal is not None and output.refusal.kind == TransferFailed.kind:
        return Event.NOT_FETCHED
    return None


class Act(Enum):
    """What is to be done, in this order."""

    FETCH = "fetch"  # send it to a decode unit, with where its blocks are
    RELEASE = "release"  # the holder lets go
    RECOMPUTE = "recompute"  # send it to a decode unit, which computes all its tokens again


STEPS: dict[tuple[Stage, Event], tuple[Stage, tuple[Act, ...]]] = {
    (Stage.PREFILLING, Event.HELD): (Stage.FETCHING, (Act.FETCH,)),
    (Stage.PREFILLING, Event.DIED): (Stage.DECODING, (Act.RECOMPUTE,)),
    (Stage.FETCHING, Event.FETCHED): (Stage.DECODING, (Act.RELEASE,)),
    (Stage.FETCHING, Event.NOT_FETCHED): (Stage.DECODING, (Act.RELEASE, Act.RECOMPUTE)),
    (Stage.FETCHING, Event.DIED): (Stage.FETCHING, (Act.FETCH,)),
    (Stage.DECODING, Event.DIED): (Stage.DECODING, (Act.RECOMPUTE,)),
}


@dataclass(slots=True)
class Handoff:
    """One request between two units."""

    stage: Stage = Stage.PREFILLING
    # The unit that computed the prompt, while it holds the blocks: name and generation, as a unit
    # that was started again holds nothing.
    holder: str | None = None
    held: Held | None = None
    num_setbacks: int = 0  # units that died with it, transfers that failed

    def on(self, event: Event) -> tuple[Act, ...]:
        """Take the step; what is to be done. Nothing where the event comes too late to matter."""
        step = STEPS.get((self.stage, event))
        if step is None:
            return ()
        self.stage, acts = step
        self.num_setbacks += event in (Event.DIED, Event.NOT_FETCHED)
        return acts

    @property
    def holding_unit(self) -> str | None:
        """The holder's name."""
        return None if self.holder is None else self.holder.rpartition("#")[0]

    @property
    def is_hopeless(self) -> bool:
        """It was set back too often."""
        return self.num_setbacks > MAX_SETBACKS
