"""The life of a request whose prompt one unit computes and whose answer another one generates.

The prefill unit computes the prompt and the first token. Its K and V can be fetched piece by piece
while they are computed (sched/transfers.py says when), or in one piece at the end. With the first
piece a decode unit is told: it takes the blocks of the whole prompt, when it has room, fetches what
there is, and goes on when it has the last one. Then the holder lets go. Whatever fails on the way
is fetched once more, whole, or computed again on the decode side, from the prompt and the tokens
that the client already has: a failure costs time, never a token. `STEPS` is all of it; what it says
is done by `engine/relay.py`, for the endpoint and the simulator alike.
"""

from dataclasses import dataclass, field
from enum import Enum

from muxrt.core import Output, Piece
from muxrt.errors import TransferFailed

# Held blocks are let go after so many seconds, and so long a decode unit with blocks waits for the
# next piece. Whoever comes later computes the prompt again.
LEASE_S = 30.0
# A request that was set back so often is given up: it may be what its units die of.
MAX_SETBACKS = 3


class Stage(Enum):
    """Where a request is on its way from one unit to another."""

    PREFILLING = "prefilling"
    STREAMING = "streaming"  # its decode unit, the heir, fetches what there is already
    FETCHING = "fetching"  # its decode unit has it; the prefill unit holds its blocks
    DECODING = "decoding"


class Event(Enum):
    """What a unit said, or its end."""

    FIRST = "first piece"  # several come; what was told of before is void
    PIECE = "piece"
    LAST = "last piece"  # the prompt is computed
    HELD = "held"  # the prompt is computed, all of it is one piece
    NOT_HELD = "not held"  # the prefill unit could not seal it, and let go
    FETCHED = "fetched"
    NOT_FETCHED = "not fetched"  # the holder died, a lease ran out, or bytes were damaged
    NO_HEIR = "no heir"  # nobody is there to take it over already
    HEIR_DIED = "heir died"
    DIED = "died"  # the unit that has the request now


class Act(Enum):
    """What is to be done, in this order."""

    STREAM = "stream"  # send it to a decode unit, the heir, with the pieces that there are
    EXTEND = "extend"  # tell the heir of the newest piece; with the last one it has the request
    DROP = "drop"  # the heir forgets it
    FETCH = "fetch"  # send it to a decode unit, with where its blocks are
    RELEASE = "release"  # the holder lets go
    RECOMPUTE = "recompute"  # send it to a decode unit, which computes all its tokens again


STEPS: dict[tuple[Stage, Event], tuple[Stage, tuple[Act, ...]]] = {
    (Stage.PREFILLING, Event.FIRST): (Stage.STREAMING, (Act.STREAM,)),
    (Stage.PREFILLING, Event.PIECE): (Stage.PREFILLING, ()),  # the heir failed; it is kept for LAST
    (Stage.PREFILLING, Event.LAST): (Stage.FETCHING, (Act.FETCH,)),
    (Stage.PREFILLING, Event.HELD): (Stage.FETCHING, (Act.FETCH,)),
    (Stage.PREFILLING, Event.NOT_HELD): (Stage.DECODING, (Act.RECOMPUTE,)),
    (Stage.PREFILLING, Event.DIED): (Stage.DECODING, (Act.RECOMPUTE,)),
    # It was preempted while it was computed, and begins anew.
    (Stage.STREAMING, Event.FIRST): (Stage.STREAMING, (Act.DROP, Act.STREAM)),
    (Stage.STREAMING, Event.HELD): (Stage.FETCHING, (Act.DROP, Act.FETCH)),
    (Stage.STREAMING, Event.PIECE): (Stage.STREAMING, (Act.EXTEND,)),
    (Stage.STREAMING, Event.LAST): (Stage.FETCHING, (Act.EXTEND,)),
    (Stage.STREAMING, Event.NO_HEIR): (Stage.PREFILLING, ()),
    (Stage.STREAMING, Event.NOT_FETCHED): (Stage.PREFILLING, (Act.DROP,)),
    (Stage.STREAMING, Event.HEIR_DIED): (Stage.PREFILLING, (Act.DROP,)),
    (Stage.STREAMING, Event.NOT_HELD): (Stage.DECODING, (Act.DROP, Act.RECOMPUTE)),
    (Stage.STREAMING, Event.DIED): (Stage.DECODING, (Act.DROP, Act.RECOMPUTE)),
    (Stage.FETCHING, Event.FETCHED): (Stage.DECODING, (Act.RELEASE,)),
    (Stage.FETCHING, Event.NOT_FETCHED): (Stage.DECODING, (Act.RELEASE, Act.RECOMPUTE)),
    (Stage.FETCHING, Event.DIED): (Stage.FETCHING, (Act.FETCH,)),
    (Stage.DECODING, Event.DIED): (Stage.DECODING, (Act.RECOMPUTE,)),
}

SETBACKS = (Event.DIED, Event.HEIR_DIED, Event.NOT_FETCHED)


def event_of(output: Output) -> Event | None:
    """What an output of a request on its way says of the hand-over; None: it is the client's."""
    piece = output.held
    if piece is not None:
        if piece.is_last:
            return Event.LAST if piece.number else Event.HELD
        return Event.PIECE if piece.number else Event.FIRST
    if output.is_fetched:
        return Event.FETCHED
    if output.refusal is None:
        return None
    if output.attempt:  # to fetch it: the decode unit refused it, or it failed there
        return Event.NOT_FETCHED
    return Event.NOT_HELD if output.refusal.kind == TransferFailed.kind else None


@dataclass(slots=True)
class Handoff:
    """One request between two units."""

    stage: Stage = Stage.PREFILLING
    # The unit that computes the prompt, while it holds the blocks: name and generation, as a unit
    # that was started again holds nothing.
    holder: str | None = None
    pieces: list[Piece] = field(default_factory=list)  # what there is to fetch
    heir: str | None = None  # the unit that fetches already
    attempt: int = 0  # the newest one to have it fetched or computed elsewhere
    num_setbacks: int = 0  # units that died with it, transfers that failed

    def on(self, event: Event) -> tuple[Act, ...]:
        """Take the step; what is to be done. Nothing where the event comes too late to matter."""
        step = STEPS.get((self.stage, event))
        if step is None:
            return ()
        self.stage, acts = step
        self.num_setbacks += event in SETBACKS
        return acts

    @property
    def holding_unit(self) -> str | None:
        """The holder's name."""
        return None if self.holder is None else self.holder.rpartition("#")[0]

    @property
    def is_hopeless(self) -> bool:
        """It was set back too often."""
        return self.num_setbacks > MAX_SETBACKS
