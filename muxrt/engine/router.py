"""Which replica of a model takes a request."""

from collections.abc import Iterable
from dataclasses import dataclass

from muxrt.engine.requests import Ledger


@dataclass(frozen=True, slots=True)
class Replica:
    """A model in a unit that is ready to serve it."""

    model: str
    unit: str
    traffic: float = 1.0  # its share among the model's replicas, relative to the others'


def choose(replicas: Iterable[Replica], ledger: Ledger) -> Replica | None:
    """The replica with the fewest pending tokens for its share of the traffic; None of none.

    Between equals the one with fewer requests, then the first by name: a choice can be repeated.
    """

    def pressure(replica: Replica) -> tuple[float, float, str]:
        load = ledger.load(replica.model, replica.unit)
        requests = load.queued + load.running
        return (load.tokens / replica.traffic, requests / replica.traffic, replica.unit)

    return min(replicas, key=pressure, default=None)
