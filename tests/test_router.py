"""The ledger of live requests, and the choice between replicas that reads it."""

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from muxrt.core import Request
from muxrt.engine.requests import Ledger
from muxrt.engine.router import Replica, choose

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
