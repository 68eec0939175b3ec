"""Splitwise's cluster-level scheduler: pools of units that borrow from each other.

ISCA 2024, section 4 (cluster-level scheduling). Units that prefill are the prompt pool, those that
decode the token pool, those that do both the mixed pool. A request gets its prompt unit and its
token unit at once, each by the shortest queue of its pool; where that is too long, by that of the
mixed pool; where that is, too, a unit of the other pool is borrowed: it is mixed until its foreign
work is drained.

What is ours:

* *Two marks instead of one.* A pool is *helped* from when its shortest queue would go above the
  high mark until it could do all the work alone and be below the low mark. Meanwhile requests go to
  the shortest queue of pool and mixed units together; after it who was borrowed gets no more
  foreign work. The paper has one threshold: a unit would come and go with every request that
  passes it.
* *Marks in units' own terms*: prefill batches that wait, and the share of KV memory that is held or
  promised. The paper says tokens for both; its simulator takes 8,192 prompt tokens, which are
  four of its batches, and the whole memory with the length of the answer known.
* *A borrowed or mixed unit keeps what it prefilled.* In the paper the token unit is chosen whatever
  the prompt unit: then two mixed units may be full of sequences that the other one is to fetch.
* A borrowed unit goes home when its foreign work is done, as the paper has it; its simulator waits
  until the unit is idle.
"""

from collections.abc import Iterable, Sequence

from muxrt.config.placement import Role
from muxrt.config.routing import Routing
from muxrt.core import Phase
from muxrt.engine.requests import Ledger
from muxrt.engine.router import (
    Ask,
    DistServe,
    OnSwitch,
    Ready,
    Replica,
    Route,
    Router,
    Switch,
)

HOME: dict[Phase, Role] = {Phase.PREFILL: "prefill", Phase.DECODE: "decode"}
FOREIGN: dict[Role, Phase] = {
    "decode": Phase.PREFILL,
    "prefill": Phase.DECODE,
}  # by the role of who is borrowed


def make_router(
    routing: Routing, ledger: Ledger, ready: Ready, on_switch: OnSwitch = lambda switch: None
) -> Router:
    """The policy that `routing` names."""
    if routing.policy == "splitwise":
        return Splitwise(routing, ledger, ready, on_switch)
    return DistServe(ledger, ready)


class Splitwise:
    """Both units of a request are chosen when it comes; pools borrow units from each other."""

    def __init__(self, routing: Routing, ledger: Ledger, ready: Ready, on_switch: OnSwitch) -> None:
        """`on_switch` is told of every unit that is borrowed, and of its way home."""
        self._routing = routing
        self._ledger = ledger
        self._ready = ready
        self._on_switch = on_switch
        self._borrowed: dict[tuple[str, str], Role] = {}  # by model and unit: its home
        self._helped: set[tuple[str, Phase]] = set()  # pools, by model

    # -- the policy --------------------------------------------------------------------------

    def route(self, ask: Ask) -> Route | None:
        """Prompt unit and token unit of a new request; None if nobody is ready."""
        self.settle()
        ready = self._ready(ask.model)
        if not ready:
            return None
        prompt = self._place(Phase.PREFILL, ask, ready)
        if not ask.has_answer:
            return Route(prompt)
        # Two units that hold sequences for each other would both wait for room for ever.
        if self._role(prompt) != "prefill":
            return Route(prompt, False, prompt.unit)
        answer = self._place(Phase.DECODE, ask, ready)
        return Route(prompt, answer.unit != prompt.unit, answer.unit)

    def decoder(self, request_id: int) -> Replica | None:
        """The unit that was chosen when it came, or another one if that died since."""
        live = self._ledger.get(request_id)
        assert live is not None, "who has ended needs nobody"
        ready = self._ready(live.request.model)
        chosen = next((replica for replica in ready if replica.unit == live.decoder), None)
        # One that was switched to prefills since holds sequences for others.
        if chosen is not None and self._role(chosen) == "prefill":
            chosen = None
        if chosen is not None or not ready:
            return chosen
        return self._place(Phase.DECODE, Ask(live.request.model, live.num_tokens), ready)

    def settle(self) -> None:
        """Pools that are out of trouble are helped no more; who has no foreign work goes home."""
        for model, phase in [*self._helped]:
            if self._is_calm(model, phase):
                self._helped.discard((model, phase))
        for (model, unit), home in [*self._borrowed.items()]:
            if (model, FOREIGN[home]) in self._helped or self._foreign(model, unit):
                continue
            del self._borrowed[model, unit]
            self._on_switch(Switch(model, unit, "mixed", home))

    def is_borrowed(self, model: str, unit: str) -> bool:
        """It does both phases for the model now, though it is configured for one."""
        self.settle()
        return (model, unit) in self._borrowed

    def rehome(self, model: str, unit: str) -> None:
        """It has another home now; whether pools need help is found out anew."""
        self._borrowed.pop((model, unit), None)
        self._helped -= {(model, phase) for phase in HOME}

    # -- pools -------------------------------------------------------------------------------

    def _place(self, phase: Phase, ask: Ask, ready: Sequence[Replica]) -> Replica:
        """Who does `phase` of a request, out of `ready`, which is not empty."""
        home, key = HOME[phase], (ask.model, phase)
        own = [replica for replica in ready if self._role(replica) == home]
        able = self._with_room(own, phase, ask)
        if able and key not in self._helped:
            return self._shortest(able, phase, ask.near)
        mixed = [replica for replica in ready if self._role(replica) == "mixed"]
        if own:
            self._helped.add(key)
        if able := [*able, *self._with_room(mixed, phase, ask)]:
            return self._shortest(able, phase, ask.near)
        others = [replica for replica in ready if replica not in own and replica not in mixed]
        is_needed = not own and not mixed
        if is_needed or self._routing.borrow:
            lent = self._borrow(others, phase, ask, is_needed)
            if lent is not None:
                return lent
        return self._shortest([*own, *mixed], phase, ask.near)

    def _borrow(
        self, others: list[Replica], phase: Phase, ask: Ask, is_needed: bool
    ) -> Replica | None:
        """The unit of the other pool that holds the least, if one has room or `is_needed`."""
        able = self._with_room(others, phase, ask) or (others if is_needed else [])
        if not able:
            return None
        lent = self._shortest(able, Phase.DECODE)
        self._helped.add((ask.model, phase))
        self._borrowed[lent.model, lent.unit] = lent.role
        self._on_switch(Switch(lent.model, lent.unit, lent.role, "mixed"))
        return lent

    def _role(self, replica: Replica) -> Role:
        """What it does now."""
        return "mixed" if (replica.model, replica.unit) in self._borrowed else replica.role

    def _foreign(self, model: str, unit: str) -> int:
        """Requests that a borrowed unit has of the other phase.

        Prompts of a unit that decodes: what it is handed has a token. Answers of one that prefills.
        """
        load = self._ledger.load(model, unit)
        return load.queued if self._borrowed[model, unit] == "decode" else load.answers

    # -- queues ------------------------------------------------------------------------------

    def _shortest(
        self, replicas: Iterable[Replica], phase: Phase, near: str | None = None
    ) -> Replica:
        """The shortest queue of `phase`, or `near`; equals are settled by what is held, by name."""

        def pressure(replica: Replica) -> tuple[bool, float, float, str]:
            held = self._held(replica) / replica.traffic
            queue = self._queue(replica, phase) / replica.traffic
            return (replica.unit != near, queue, held, replica.unit)

        return min(replicas, key=pressure)

    def _queue(self, replica: Replica, phase: Phase) -> int:
        """Tokens that wait to be prefilled, or are there for decodes."""
        if phase is Phase.DECODE:
            return self._held(replica)
        return self._ledger.load(replica.model, replica.unit).queued_tokens

    def _held(self, replica: Replica) -> int:
        """Tokens that take the unit's memory now, or will: those promised to it included."""
        load = self._ledger.load(replica.model, replica.unit)
        return load.tokens + load.promised_tokens

    def _with_room(self, replicas: Iterable[Replica], phase: Phase, ask: Ask) -> list[Replica]:
        return [replica for replica in replicas if self._has_room(replica, phase, ask)]

    def _has_room(self, replica: Replica, phase: Phase, ask: Ask) -> bool:
        """The request would not lift the unit above its high mark.

        A unit that decodes has none for a prompt either where its memory is full.
        """
        held = self._held(replica)
        fits = not held or held + ask.prompt_tokens <= self._routing.borrow_kv * replica.kv_tokens
        if phase is Phase.DECODE:
            return fits
        waiting = self._queue(replica, Phase.PREFILL)
        most = self._routing.borrow_batches * replica.batch_tokens
        is_short = not waiting or waiting + ask.prompt_tokens <= most
        return is_short and (fits or self._role(replica) == "prefill")

    def _is_calm(self, model: str, phase: Phase) -> bool:
        """The pool alone could do all of the phase's work and be below its low marks."""
        ready, routing = self._ready(model), self._routing
        own = [replica for replica in ready if replica.role == HOME[phase]]
        if phase is Phase.PREFILL:
            work = sum(self._queue(replica, phase) for replica in ready)
            most = routing.return_batches * sum(replica.batch_tokens for replica in own)
        else:
            work = sum(self._answering(replica) for replica in ready)
            most = routing.return_kv * sum(replica.kv_tokens for replica in own)
        return bool(own) and work <= most

    def _answering(self, replica: Replica) -> int:
        """Tokens of answers that the unit generates, or will."""
        load = self._ledger.load(replica.model, replica.unit)
        queued = 0 if replica.role == "decode" else load.queued_tokens
        return load.tokens - queued + load.promised_tokens
