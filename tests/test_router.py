"""The ledger of live requests, and the choice between replicas that reads it."""

from collections import Counter
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from muxrt.core import Request
from muxrt.engine.requests import Ledger
from muxrt.engine.router import Ask, DistServe, Replica, choose

MODELS, UNITS = st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"])


def make(request_id: int, model: str = "a", prompt_tokens: int = 10) -> Request:
    return Request(request_id, model, prompt_tokens, 5, b"")


def test_no_replica_no_choice() -> None:
    assert choose([], Ledger()) is None


def test_the_least_pending_tokens_win() -> None:
    ledger = Ledger()
    ledger.open(make(ledger.next_id(), prompt_tokens=100), "x")
    ledger.open(make(ledger.next_id(), prompt_tokens=30), "y")
    ledger.open(make(ledger.next_id(), prompt_tokens=30), "y")
    replicas = [Replica("a", "x"), Replica("a", "y")]
    assert choose(replicas, ledger) == replicas[1]


def test_traffic_shares_weigh() -> None:
    ledger, counts = Ledger(), {"x": 0, "y": 0}
    replicas = [Replica("a", "x", traffic=3.0), Replica("a", "y", traffic=1.0)]
    for _ in range(40):
        chosen = choose(replicas, ledger)
        assert chosen is not None
        counts[chosen.unit] += 1
        ledger.open(make(ledger.next_id()), chosen.unit)
    assert counts == {"x": 30, "y": 10}


def test_equals_are_settled_by_name_whatever_the_order() -> None:
    replicas = [Replica("a", "y"), Replica("a", "x")]
    assert choose(replicas, Ledger()) == choose(replicas[::-1], Ledger()) == replicas[1]


def test_other_models_do_not_weigh() -> None:
    ledger = Ledger()
    ledger.open(make(ledger.next_id(), model="b", prompt_tokens=1000), "x")
    assert choose([Replica("a", "x"), Replica("a", "y")], ledger) == Replica("a", "x")


def test_a_request_queues_until_its_first_token() -> None:
    ledger = Ledger()
    ledger.open(make(1), "x")
    assert (ledger.queued("a"), ledger.running("a")) == (1, 0)
    ledger.add_tokens(1, 1)
    assert (ledger.queued("a"), ledger.running("a")) == (0, 1)
    ledger.close(1)
    assert (ledger.queued("a"), ledger.running("a"), len(ledger)) == (0, 0, 0)


def test_late_news_change_nothing() -> None:
    ledger = Ledger()
    ledger.open(make(1), "x")
    assert ledger.close(1) is not None
    assert ledger.close(1) is None
    ledger.add_tokens(1, 3)
    assert ledger.check()


class LedgerMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the counts are those of the live requests."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()

    @rule(target=live, model=MODELS, unit=UNITS, tokens=st.integers(1, 99))
    def open(self, model: str, unit: str, tokens: int) -> int:
        request_id = self.ledger.next_id()
        self.ledger.open(make(request_id, model, tokens), unit)
        return request_id

    @rule(request_id=live, tokens=st.integers(0, 3))
    def progress(self, request_id: int, tokens: int) -> None:
        self.ledger.add_tokens(request_id, tokens)

    @rule(request_id=live, heir=st.none() | UNITS)
    def promise(self, request_id: int, heir: str | None) -> None:
        self.ledger.promise(request_id, heir)

    @rule(request_id=live, unit=UNITS)
    def move(self, request_id: int, unit: str) -> None:
        if self.ledger.get(request_id) is not None:
            self.ledger.move(request_id, unit)
            assert all(live.request.id != request_id for live in self.ledger.promised_to(unit))

    @rule(request_id=consumes(live), twice=st.booleans())
    def close(self, request_id: int, twice: bool) -> None:
        self.ledger.close(request_id)
        if twice:
            self.ledger.close(request_id)

    @rule(unit=UNITS)
    def die(self, unit: str) -> None:
        for request in self.ledger.of_unit(unit):
            self.ledger.close(request.request.id)
        for request in self.ledger.promised_to(unit):
            self.ledger.promise(request.request.id, None)
        assert self.ledger.load("a", unit).tokens == 0

    @invariant()
    def adds_up(self) -> None:
        assert self.ledger.check()


TestLedger = LedgerMachine.TestCase


class Ways:
    """A mixed unit, and a pair that serves the same model apart; every tick a request comes."""

    def __init__(self, mixed_traffic: float = 1.0) -> None:
        self.ledger = Ledger()
        self.replicas = [
            Replica("a", "m", mixed_traffic),
            Replica("a", "p", role="prefill"),
            Replica("a", "d", role="decode"),
        ]
        self.router = DistServe(self.ledger, lambda model: self.replicas)
        self.starts = Counter[str]()

    def tick(self, prompt_tokens: int = 10, num_tokens: int = 20) -> None:
        """Everybody gets a token; prompts are computed at once, and answers end."""
        for unit in ("m", "p", "d"):
            for live in self.ledger.of_unit(unit):
                self.ledger.add_tokens(live.request.id, 1)
                if live.output_tokens >= num_tokens:
                    self.ledger.close(live.request.id)
                elif unit == "p":
                    decoder = self.router.decoder(live.request.id)
                    assert decoder is not None
                    self.ledger.move(live.request.id, decoder.unit)
        route = self.router.route(Ask("a", prompt_tokens))
        assert route is not None and route.is_handed_over == (route.replica.unit == "p")
        self.starts[route.replica.unit] += 1
        self.ledger.open(make(self.ledger.next_id(), "a", prompt_tokens), route.replica.unit)


@pytest.mark.parametrize("traffic", [1.0, 3.0])
def test_a_model_in_both_ways_has_its_traffic_shared_as_planned(traffic: float) -> None:
    """Compared by unit, the prefill unit got nearly all: its sequences leave after their prompt."""
    ways, random = Ways(traffic), Random(0)
    for _ in range(2000):
        ways.tick(random.randint(50, 150), 20)
    assert ways.starts.keys() == {"m", "p"}
    assert abs(ways.starts["m"] / ways.starts["p"] - traffic) < 0.15 * traffic


def test_who_is_in_trouble_gets_less_in_either_way() -> None:
    ways = Ways()
    for _ in range(100):
        ways.ledger.open(make(ways.ledger.next_id()), "d")  # they are not decoded: it stands still
    ways.tick()
    assert ways.starts == {"m": 1}
    for _ in range(200):
        ways.ledger.open(make(ways.ledger.next_id()), "m")
    ways.tick()
    assert ways.starts == {"m": 1, "p": 1}


def test_without_a_unit_that_decodes_the_others_are_alike() -> None:
    ledger, replicas = Ledger(), [Replica("a", "m"), Replica("a", "p", role="prefill")]
    router = DistServe(ledger, lambda model: replicas)
    ledger.open(make(ledger.next_id()), "m")
    route = router.route(Ask("a", 10))
    assert route is not None and route.replica.unit == "p" and not route.is_handed_over
    near = router.route(Ask("a", 10, near="m"))
    assert near is not None and near.replica.unit == "m"
