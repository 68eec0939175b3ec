"""The ledger of live requests in the API process: who waits, who runs, and where."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from muxrt.core import Request


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request that was sent to a unit and has not ended."""

    request: Request
    unit: str
    output_tokens: int = 0
    heir: str | None = None  # the unit that is going to take it over, and makes room for it

    @property
    def is_queued(self) -> bool:
        """No token came yet: whether it waits or prefills, its client sees nothing."""
        return self.output_tokens == 0

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs so far: what it weighs on its unit, or soon will."""
        return self.request.prompt_tokens + self.output_tokens


@dataclass(slots=True)
class Load:
    """The live requests of one model in one unit, added up."""

    queued: int = 0
    running: int = 0
    tokens: int = 0  # prompts and outputs so far of all of them, and of those that are promised


class Ledger:
    """Every live request once, from `open` to `close`; counts are kept, not searched for."""

    def __init__(self) -> None:
        self._live: dict[int, LiveRequest] = {}
        self._loads: dict[tuple[str, str], Load] = {}  # by (model, unit)
        self._ids = count(1)

    def __len__(self) -> int:
        return len(self._live)

    def next_id(self) -> int:
        """An id that no request had before."""
        return next(self._ids)

    def open(self, request: Request, unit: str) -> None:
        """`request` goes to `unit` now."""
        assert request.id not in self._live, "an id is used once"
        self._live[request.id] = LiveRequest(request, unit)
        load = self._loads.setdefault((request.model, unit), Load())
        load.queued += 1
        load.tokens += request.prompt_tokens

    def get(self, request_id: int) -> LiveRequest | None:
        """The live request of that id; None once it ended."""
        return self._live.get(request_id)

    def add_tokens(self, request_id: int, num_tokens: int) -> None:
        """The request gave `num_tokens` more; late news of an ended one change nothing."""
        live = self._live.get(request_id)
        if live is None or not num_tokens:
            return
        load = self._loads[live.request.model, live.unit]
        if live.is_queued:
            load.queued -= 1
            load.running += 1
        live.output_tokens += num_tokens
        load.tokens += num_tokens
        if live.heir is not None:
            self._loads[live.request.model, live.heir].tokens += num_tokens

    def weigh(self, model: str, unit: str, num_tokens: int) -> None:
        """Requests of `model` that stream from `unit` gave `num_tokens` more, all together.

        Which ones is for `credit` to say, before any of them ends or moves.
        """
        self._loads[model, unit].tokens += num_tokens

    def credit(self, request_ids: Sequence[int], num_tokens: int) -> None:
        """Requests whose tokens were weighed gave `num_tokens` of them each."""
        live = self._live
        for request_id in request_ids:
            live[request_id].output_tokens += num_tokens

    def promise(self, request_id: int, heir: str | None) -> None:
        """`heir` takes the request over, once its prompt is computed; None: nobody does yet.

        Its tokens weigh on both units until it moves.
        """
        live = self._live.get(request_id)
        if live is None:
            return
        for unit, sign in ((live.heir, -1), (heir, 1)):
            if unit is not None:
                load = self._loads.setdefault((live.request.model, unit), Load())
                load.tokens += sign * live.num_tokens
        live.heir = heir

    def move(self, request_id: int, unit: str) -> None:
        """The request goes on in `unit`; what it gave so far still counts."""
        live = self.close(request_id)
        assert live is not None, "who has ended stays where it is"
        self.open(live.request, unit)
        self.add_tokens(request_id, live.output_tokens)

    def close(self, request_id: int) -> LiveRequest | None:
        """The request ended, however; None if it had already."""
        if request_id not in self._live:
            return None
        self.promise(request_id, None)
        live = self._live.pop(request_id)
        load = self._loads[live.request.model, live.unit]
        if live.is_queued:
            load.queued -= 1
        else:
            load.running -= 1
        load.tokens -= live.num_tokens
        return live

    def of_unit(self, unit: str) -> list[LiveRequest]:
        """What is lost if `unit` dies, oldest first."""
        return [live for live in self._live.values() if live.unit == unit]

    def promised_to(self, unit: str) -> list[LiveRequest]:
        """What `unit` was going to take over, oldest first."""
        return [live for live in self._live.values() if live.heir == unit]

    def load(self, model: str, unit: str) -> Load:
        """What `model` has live in `unit`; not to be changed."""
        return self._loads.get((model, unit)) or Load()

    def queued(self, model: str) -> int:
        """Requests of `model` without a first token, in all units."""
        return sum(load.queued for load in self._of_model(model))

    def running(self, model: str) -> int:
        """Requests of `model` that stream, in all units."""
        return sum(load.running for load in self._of_model(model))

    def _of_model(self, model: str) -> Iterable[Load]:
        return (load for (name, _), load in self._loads.items() if name == model)

    def check(self) -> bool:
        """The counts are those of the live requests. Costs time: for tests."""
        counted: dict[tuple[str, str], Load] = {key: Load() for key in self._loads}
        for request_id, live in self._live.items():
            assert request_id == live.request.id
            load = counted[live.request.model, live.unit]
            load.queued += live.is_queued
            load.running += not live.is_queued
            load.tokens += live.num_tokens
            if live.heir is not None:
                counted[live.request.model, live.heir].tokens += live.num_tokens
        assert counted == self._loads, "the ledger is off"
        return True
