"""Which replica of a model takes a request, and which one takes it over once it is prefilled."""

from collections.abc import Iterable
from dataclasses import dataclass

from muxrt.config.placement import Role
from muxrt.engine.requests import Ledger


@dataclass(frozen=True, slots=True)
class Replica:
    """A model in a unit that is ready to serve it."""

    model: str
    unit: str
    traffic: float = 1.0  # its share among the model's replicas, relative to the others'
    role: Role = "mixed"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request starts, and whether another unit is to take it over after its prompt."""

    replica: Replica
    is_handed_over: bool = False


def choose(replicas: Iterable[Replica], ledger: Ledger) -> Replica | None:
    """The replica with the fewest pending tokens for its share of the traffic; None of none.

    Between equals the one with fewer requests, then the first by name: a choice can be repeated.
    """

    def pressure(replica: Replica) -> tuple[float, float, str]:
        load = ledger.load(replica.model, replica.unit)
        requests = load.queued + load.running
        return (load.tokens / replica.traffic, requests / replica.traffic, replica.unit)

    return min(replicas, key=pressure, default=None)


def choose_route(replicas: Iterable[Replica], ledger: Ledger) -> Route | None:
    """Where a new request goes: to the shortest queue of those that prefill; None of none.

    From a unit for prefills it is handed over if somebody is there to take it. Where nobody
    prefills any more, those that decode do both: they can, only slower.
    """
    ready = list(replicas)
    first = choose([r for r in ready if r.role != "decode"] or ready, ledger)
    if first is None:
        return None
    return Route(first, first.role == "prefill" and any(r.role == "decode" for r in ready))


def choose_decoder(replicas: Iterable[Replica], ledger: Ledger) -> Replica | None:
    """Who takes a prefilled request over: the shortest queue of those that decode.

    Of none, anybody: all of them can decode. None of none at all.
    """
    ready = list(replicas)
    return choose([r for r in ready if r.role == "decode"] or ready, ledger)
