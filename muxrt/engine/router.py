"""Which units serve a request: one that computes its prompt, and one that generates its answer.

A policy (`Router`) is asked when a request comes, when its prompt is done, and when a unit died;
endpoint (server/dispatch.py) and simulator (sim/group.py) ask the same one. `DistServe` is here,
`Splitwise` with its pools in engine/pools.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from muxrt.config.placement import Role, UnitSpec
from muxrt.engine.requests import Ledger


@dataclass(frozen=True, slots=True)
class Replica:
    """A model in a unit that is ready to serve it."""

    model: str
    unit: str
    # Its share, relative to the others': of those that prefill and mixed ones of the requests, of
    # those that decode of the answers.
    traffic: float = 1.0
    role: Role = "mixed"  # as configured
    batch_tokens: int = 512  # of one prefill batch
    kv_tokens: int = 0  # that its quota holds

    @classmethod
    def of(cls, unit: UnitSpec, model: str, kv_tokens: int) -> "Replica":
        """The model in that unit, as its placement has it."""
        part = next(part for part in unit.models if part.name == model)
        batch_tokens = unit.scheduling.prefill_tokens
        return cls(model, unit.name, part.traffic, part.role, batch_tokens, kv_tokens)


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be known of a request that wants units."""

    model: str
    prompt_tokens: int
    has_answer: bool = True  # beyond the one token that comes with its prompt
    near: str | None = None  # a unit that has its prompt already, and is to be preferred


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request starts, and whether another unit is to take it over after its prompt."""

    replica: Replica
    is_handed_over: bool = False
    decoder: str | None = None  # the unit that generates its answer, where that is decided


@dataclass(frozen=True, slots=True)
class Switch:
    """A unit does from now on what it did not do before for a model, or no longer."""

    model: str
    unit: str
    before: Role
    after: Role


# Replicas of a model that are ready now, with all that they generated so far in the ledger.
Ready = Callable[[str], Sequence[Replica]]
OnSwitch = Callable[[Switch], None]


class Router(Protocol):
    """A routing policy for all models of an endpoint."""

    def route(self, ask: Ask) -> Route | None:
        """Where a new request goes; None if nobody is ready."""

    def decoder(self, request_id: int) -> Replica | None:
        """Who goes on with a live request that has a token; None if nobody is ready."""

    def settle(self) -> None:
        """Requests moved on, ended or were lost: who was borrowed may go home."""

    def is_borrowed(self, model: str, unit: str) -> bool:
        """The unit does both phases for the model now, though it is configured for one."""

    def rehome(self, model: str, unit: str) -> None:
        """The unit gets another role for the model: what it was borrowed for is no matter."""


class DistServe:
    """Each phase to its shortest queue, the second one when it begins (OSDI 2024, section 4.3).

    A request goes to the prefill unit with the fewest pending tokens; who decodes it is chosen when
    its prompt is done, among all that decode then, and fetches it when it has room.

    Ours: a model may be colocated in other units beside that. Units of one role are compared by
    their tokens; a mixed unit, which has sequences from their first token to their last, with all
    units that serve the model apart, together (`_Way`).
    """

    def __init__(self, ledger: Ledger, ready: Ready) -> None:
        self._ledger = ledger
        self._ready = ready

    def route(self, ask: Ask) -> Route | None:
        """To the shortest queue of those that prefill; None if nobody is ready.

        From a unit for prefills it is handed over if somebody is there to take it. Where nobody
        prefills any more, those that decode do both: they can, only slower.
        """
        ready = self._ready(ask.model)
        if not ready:
            return None
        has_decoders = any(r.role == "decode" for r in ready)
        starts = [r for r in ready if r.role != "decode"] or ready
        near = next((r for r in starts if r.unit == ask.near), None)
        if near is None and has_decoders and {r.role for r in starts} == {"prefill", "mixed"}:
            ways = _ways(ready)
            starts = min(ways, key=lambda way: way.pressure(self._ledger, ask)).starts
        first = near or choose(starts, self._ledger)
        assert first is not None, "some start there"
        is_handed_over = ask.has_answer and first.role == "prefill" and has_decoders
        return Route(first, is_handed_over)

    def decoder(self, request_id: int) -> Replica | None:
        """The shortest queue of those that decode; of none, anybody: all of them can."""
        live = self._ledger.get(request_id)
        assert live is not None, "who has ended needs nobody"
        ready = self._ready(live.request.model)
        decoders = [r for r in ready if r.role == "decode"] or ready
        # A unit that decodes since a moment ago may hold it: it would have to compute it again.
        others = [r for r in decoders if r.unit != live.unit]
        return choose(others or decoders, self._ledger)

    def settle(self) -> None:
        """Nobody is ever borrowed."""

    def is_borrowed(self, model: str, unit: str) -> bool:
        """Nobody is."""
        return False

    def rehome(self, model: str, unit: str) -> None:
        """Nobody is borrowed: there is nothing to forget."""


@dataclass(frozen=True, slots=True)
class _Way:
    """Units that serve requests from the first token to the last: a mixed one, or all others."""

    starts: list[Replica]  # requests begin in one of them
    units: list[Replica]

    def pressure(self, ledger: Ledger, ask: Ask) -> tuple[float, float, str]:
        """Tokens for its share of the traffic, with half of the new prompt.

        With none of it a small share gets too much, with all of it too little: as with seats in a
        parliament (Sainte-Lague).
        """
        loads = [ledger.load(replica.model, replica.unit) for replica in self.units]
        traffic = sum(replica.traffic for replica in self.starts)
        tokens = sum(load.tokens for load in loads) + ask.prompt_tokens / 2
        requests = sum(load.queued + load.running for load in loads)
        return (tokens / traffic, requests / traffic, self.starts[0].unit)


def _ways(ready: Sequence[Replica]) -> list[_Way]:
    mixed = [_Way([replica], [replica]) for replica in ready if replica.role == "mixed"]
    starts = [replica for replica in ready if replica.role == "prefill"]
    return [*mixed, _Way(starts, [replica for replica in ready if replica.role != "mixed"])]


def choose(replicas: Iterable[Replica], ledger: Ledger) -> Replica | None:
    """The replica with the fewest pending tokens for its share of the traffic; None of none.

    Between equals the one with fewer requests, then the first by name: a choice can be repeated.
    """

    def pressure(replica: Replica) -> tuple[float, float, str]:
        load = ledger.load(replica.model, replica.unit)
        requests = load.queued + load.running
        tokens = load.tokens + load.promised_tokens
        return (tokens / replica.traffic, requests / replica.traffic, replica.unit)

    return min(replicas, key=pressure, default=None)
