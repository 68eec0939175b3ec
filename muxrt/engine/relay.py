"""Does what the state machine of a hand-over says, for the endpoint and the simulator alike."""

from collections.abc import Sequence
from itertools import count
from typing import Protocol

from muxrt.core import Output, Piece, Source
from muxrt.engine.handoff import LEASE_S, Act, Event, Handoff, event_of
from muxrt.engine.requests import Ledger, LiveRequest


class Reach(Protocol):
    """How units are spoken to, and clients; what is said to one unit comes in order."""

    def choose_decoder(self, request_id: int) -> str | None:
        """The unit that takes a prefilled request over; None: no unit is ready."""

    def identity(self, unit: str) -> str:
        """Name and generation of its present process."""

    def address(self, model: str, holder: str) -> bytes | None:
        """How K and V of `model` in that process are reached; None: it is gone."""

    def resume(self, request_id: int, unit: str, source: Source | None) -> None:
        """The unit gets the request with all that was generated so far; None = computes it."""

    def extend(self, request_id: int, unit: str, piece: Piece) -> None:
        """Tell a unit of a piece; with the last one, of what was generated so far."""

    def release(self, request_id: int, unit: str) -> None:
        """The unit frees everything of the request."""

    def give_up(self, request_id: int) -> None:
        """Nobody can serve it: let go of it and tell its client."""


class Relay:
    """Takes requests from unit to unit."""

    def __init__(self, ledger: Ledger, reach: Reach) -> None:
        self._ledger, self._reach = ledger, reach
        # What is said of one attempt must not be taken for the next one's: no number comes twice.
        self._attempts = count(1)

    def hear(self, handoff: Handoff, output: Output) -> bool:
        """Take note of an output of a request on its way; True if its client need not know."""
        if output.attempt and output.attempt != handoff.attempt:
            return True  # that one was given up
        event = event_of(output)
        if event is None:
            return False
        if output.held is not None:
            self._note(output.request_id, handoff, output.held)
        self.on(output.request_id, handoff, event)
        return True

    def _note(self, request_id: int, handoff: Handoff, piece: Piece) -> None:
        if piece.number == 0:
            handoff.holder = self._reach.identity(self._live(request_id).unit)
            handoff.pieces.clear()
        handoff.pieces.append(piece)

    def on(self, request_id: int, handoff: Handoff, event: Event) -> None:
        """Something happened to a request on its way: do what is to be done."""
        self._act(request_id, handoff, handoff.on(event))

    def _act(self, request_id: int, handoff: Handoff, acts: Sequence[Act]) -> None:
        for act in acts:
            match act:
                case Act.STREAM:
                    self._stream(request_id, handoff)
                case Act.EXTEND:
                    self._extend(request_id, handoff)
                case Act.DROP:
                    self._drop(request_id, handoff)
                case Act.FETCH:
                    self._resume(request_id, handoff, is_fetched=True)
                case Act.RELEASE:
                    self._release(request_id, handoff)
                case Act.RECOMPUTE:
                    self._resume(request_id, handoff, is_fetched=False)

    def let_go(self, request_id: int, handoff: Handoff) -> None:
        """Nobody needs it any more: heir and holder free what they have of it."""
        self._drop(request_id, handoff)
        self._release(request_id, handoff)

    # -- acts --------------------------------------------------------------------------------

    def _stream(self, request_id: int, handoff: Handoff) -> None:
        heir = self._reach.choose_decoder(request_id)
        source = self._source(request_id, handoff)
        is_alone = heir is None or heir == handoff.holding_unit
        if is_alone or source is None or handoff.is_hopeless:
            self.on(request_id, handoff, Event.NO_HEIR)
            return
        assert heir is not None
        handoff.heir = heir
        self._ledger.promise(request_id, heir)
        self._reach.resume(request_id, heir, source)

    def _extend(self, request_id: int, handoff: Handoff) -> None:
        heir, piece = handoff.heir, handoff.pieces[-1]
        assert heir is not None, "it is told of what comes"
        if piece.is_last:
            handoff.heir = None
            self._ledger.move(request_id, heir)
        self._reach.extend(request_id, heir, piece)

    def _drop(self, request_id: int, handoff: Handoff) -> None:
        if handoff.heir is not None:
            self._reach.release(request_id, handoff.heir)
            self._ledger.promise(request_id, None)
            handoff.heir = None

    def _release(self, request_id: int, handoff: Handoff) -> None:
        if handoff.holding_unit is not None:
            self._reach.release(request_id, handoff.holding_unit)
            handoff.holder = None

    def _resume(self, request_id: int, handoff: Handoff, is_fetched: bool) -> None:
        unit = self._reach.choose_decoder(request_id)
        if unit is None or handoff.is_hopeless:
            self._reach.give_up(request_id)
            return
        if unit == handoff.holding_unit:  # nobody else is there: it lets go and begins anew
            self._release(request_id, handoff)
        source = self._source(request_id, handoff)
        self._ledger.move(request_id, unit)
        self._reach.resume(request_id, unit, source if is_fetched else None)

    def _source(self, request_id: int, handoff: Handoff) -> Source | None:
        """Where the blocks are; None if nobody holds them any more. A new attempt in any case."""
        handoff.attempt = next(self._attempts)
        request = self._live(request_id).request
        if handoff.holder is None:
            return None
        address = self._reach.address(request.model, handoff.holder)
        if address is None:
            return None
        return Source(
            unit=handoff.holder,
            address=address,
            num_tokens=request.prompt_tokens,
            pieces=tuple(handoff.pieces),
            is_whole=handoff.pieces[-1].is_last,
            attempt=handoff.attempt,
            wait_s=LEASE_S,
        )

    def _live(self, request_id: int) -> LiveRequest:
        live = self._ledger.get(request_id)
        assert live is not None, "who is on the way is live"
        return live
