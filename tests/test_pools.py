"""Splitwise's routing: both units at once, pools that borrow, marks that keep them at it."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from muxrt.config.placement import Role
from muxrt.config.routing import Routing
from muxrt.core import Request
from muxrt.engine.pools import Splitwise
from muxrt.engine.requests import Ledger
from muxrt.engine.router import Ask, Replica, Route, Switch

# Batches of 100 tokens: a prompt queue is long above 400 tokens and short at 100. 1,000 tokens of
# KV: a decode queue is long above 900 and short at 700.
BATCH, KV = 100, 1000


@dataclass
class World:
    """Units of one model, and requests that go through them when they are told to."""

    replicas: list[Replica]
    routing: Routing = field(default_factory=lambda: Routing(policy="splitwise"))
    ledger: Ledger = field(default_factory=Ledger)
    dead: set[str] = field(default_factory=set)
    switches: list[Switch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.router = Splitwise(self.routing, self.ledger, self.ready, self.switches.append)

    def ready(self, model: str) -> list[Replica]:
        return [replica for replica in self.replicas if replica.unit not in self.dead]

    def ask(self, tokens: int, *, has_answer: bool = True, near: str | None = None) -> int:
        """A request comes; its id."""
        route = self.router.route(Ask("a", tokens, has_answer, near))
        assert route is not None
        request_id = self.ledger.next_id()
        self.ledger.open(
            Request(request_id, "a", tokens, 9, b""), route.replica.unit, route.decoder
        )
        return request_id

    def where(self, request_id: int) -> tuple[str, str | None]:
        """Its unit and its decoder."""
        live = self.ledger.get(request_id)
        assert live is not None
        return live.unit, live.decoder

    def prefilled(self, request_id: int) -> None:
        """Its first token is here, and it goes to its decoder."""
        self.ledger.add_tokens(request_id, 1)
        unit, decoder = self.where(request_id)
        if decoder not in (None, unit):
            chosen = self.router.decoder(request_id)
            assert chosen is not None
            self.ledger.move(request_id, chosen.unit)
        self.router.settle()

    def ended(self, request_id: int) -> None:
        self.ledger.close(request_id)
        self.router.settle()

    def borrowed(self) -> set[str]:
        return {r.unit for r in self.replicas if self.router.is_borrowed("a", r.unit)}


def replica(unit: str, role: Role) -> Replica:
    return Replica("a", unit, 1.0, role, BATCH, KV)


def world(units: str = "p0 p1 d0 d1", **routing: object) -> World:
    """Units by the first letter of their names: p, d or m."""
    roles: dict[str, Role] = {"p": "prefill", "d": "decode", "m": "mixed"}
    return World(
        [replica(unit, roles[unit[0]]) for unit in units.split()],
        Routing(policy="splitwise", **routing),  # type: ignore[arg-type]
    )


def test_both_units_are_chosen_at_once_by_their_shortest_queues() -> None:
    here = world()
    found = [here.where(here.ask(tokens)) for tokens in (50, 60, 70, 10)]
    # Promised tokens count: without them every answer would go to d0.
    assert found == [("p0", "d0"), ("p1", "d1"), ("p0", "d0"), ("p1", "d1")]
    assert here.ledger.check() and not here.switches


def test_a_request_of_one_token_has_no_decoder() -> None:
    here = world()
    assert here.where(here.ask(50, has_answer=False)) == ("p0", None)


def test_a_long_prompt_queue_borrows_the_decode_unit_that_holds_least() -> None:
    here = world("p0 d0 d1")
    answer = here.ask(30)
    here.prefilled(answer)  # d0 holds 31 tokens
    for _ in range(4):
        here.ask(100)
    assert not here.switches
    # Promises: d1 200, d0 231. d0 has 31 more: d1 is the one.
    assert here.where(here.ask(100)) == ("d1", "d1")
    assert here.switches == [Switch("a", "d1", "decode", "mixed")]


def test_a_borrowed_unit_goes_home_when_its_prompts_are_done_and_the_queue_is_short() -> None:
    here = world("p0 d0")
    ids = [here.ask(100) for _ in range(4)]
    foreign = here.ask(100)
    assert here.borrowed() == {"d0"}
    here.prefilled(foreign)
    assert here.borrowed() == {"d0"}, "the queue of p0 is still above the low mark"
    for request_id in ids[:2]:
        here.prefilled(request_id)
    assert here.borrowed() == {"d0"}
    here.prefilled(ids[2])  # 100 tokens wait
    assert here.borrowed() == set()
    assert [s.after for s in here.switches] == ["mixed", "decode"]


def test_foreign_work_is_drained_before_it_goes_home() -> None:
    here = world("p0 d0")
    ids = [here.ask(100) for _ in range(4)]
    foreign = here.ask(100)
    for request_id in ids:
        here.prefilled(request_id)
    assert here.borrowed() == {"d0"}, "it has a prompt to compute"
    # But it gets no more of them.
    assert here.where(here.ask(100))[0] == "p0"
    here.prefilled(foreign)
    assert here.borrowed() == set()


def test_between_the_marks_nothing_changes() -> None:
    here = world("p0 d0")
    ids = [here.ask(100) for _ in range(4)]
    here.ended(here.ask(100))  # borrowed, and nothing foreign is left
    assert here.borrowed() == {"d0"}
    for request_id in ids[:2]:
        here.prefilled(request_id)
    # 200 tokens wait at p0, none at d0: below the high mark, above the low one.
    assert here.where(here.ask(100))[0] == "d0"
    here.prefilled(ids[2])
    assert here.borrowed() == {"d0"}, "p0 alone would have two batches"
    later = world("p0 d0")
    for _ in range(2):
        later.ask(100)
    assert later.where(later.ask(100))[0] == "p0", "it was never above the high mark"


def test_one_burst_is_one_switch_there_and_one_back() -> None:
    here = world("p0 d0")
    live = []
    for _ in range(60):
        live.append(here.ask(100))
        if len(live) > 5:
            here.prefilled(live[0])
            here.ended(live.pop(0))
    for request_id in live:
        here.prefilled(request_id)
        here.ended(request_id)
    assert [s.after for s in here.switches] == ["mixed", "decode"]


def test_mixed_units_are_looked_at_before_one_is_borrowed() -> None:
    here = world("p0 d0 m0")
    found = [here.where(here.ask(100)) for _ in range(8)]
    assert found[:4] == [("p0", "d0")] * 4
    assert found[4:] == [("m0", "m0")] * 4
    assert not here.switches
    assert here.where(here.ask(100)) == ("d0", "d0")


def full_memory() -> tuple[World, list[int], int]:
    """A decode unit above its high mark, and a request whose answer went to a prefill unit."""
    here = world("p0 p1 d0")
    ids = [here.ask(290) for _ in range(2)]
    for request_id in ids:
        here.prefilled(request_id)
    ids.append(here.ask(290))
    here.prefilled(ids[-1])
    assert [here.where(i) for i in ids] == [("d0", "d0")] * 3
    late = here.ask(100)
    assert here.where(late) == ("p0", "p0")
    assert here.switches == [Switch("a", "p0", "prefill", "mixed")]
    here.prefilled(late)
    return here, ids, late


def test_full_memory_borrows_a_prefill_unit_for_answers() -> None:
    here, ids, late = full_memory()
    here.ended(late)
    assert here.borrowed() == {"p0"}, "d0 is still above its low mark"
    here.ended(ids[0])
    assert here.borrowed() == set()


def test_an_answer_is_foreign_to_a_prefill_unit_until_it_ends() -> None:
    here, ids, late = full_memory()
    for request_id in ids:
        here.ended(request_id)
    assert here.borrowed() == {"p0"}
    here.ended(late)
    assert here.borrowed() == set()


def test_a_decode_unit_without_memory_is_not_borrowed_for_prompts() -> None:
    here = world("p0 d0")
    for _ in range(2):
        here.prefilled(here.ask(400))
    ids = [here.ask(390), here.ask(100)]
    assert [here.where(i)[0] for i in ids] == ["p0", "p0"]
    assert here.borrowed() == {"p0"}  # for the second one's answer


def test_without_borrowing_queues_just_grow() -> None:
    here = world("p0 d0", borrow=False)
    assert {here.where(here.ask(300)) for _ in range(9)} == {("p0", "d0")}
    assert not here.switches


def test_who_does_both_never_hands_over() -> None:
    # In the simulator two full units each held what the other was to fetch, until leases ran out.
    here = world("m0 m1")
    for unit, tokens in (("m0", 900), ("m1", 960)):
        request_id = here.ledger.next_id()
        here.ledger.open(Request(request_id, "a", tokens, 9, b""), unit, unit)
        here.ledger.add_tokens(request_id, 1)
    here.ledger.open(Request(here.ledger.next_id(), "a", 20, 9, b""), "m0", "m0")
    assert here.where(here.ask(100)) == ("m1", "m1")  # m0 holds less, m1 has no prompt


@pytest.mark.parametrize("borrow", [True, False])
def test_a_pool_without_a_living_unit_is_stood_in_for(borrow: bool) -> None:
    here = world("p0 d0", borrow=borrow)
    here.dead = {"p0"}
    one = here.ask(50)
    assert here.where(one) == ("d0", "d0") and here.borrowed() == {"d0"}
    here.prefilled(one)
    assert here.borrowed() == {"d0"}, "nobody else is there"
    here.dead = set()
    assert here.borrowed() == set()
    here.dead = {"d0"}
    assert here.where(here.ask(50)) == ("p0", "p0")
    here.dead = {"p0", "d0"}
    assert here.router.route(Ask("a", 50)) is None


def test_a_chosen_decoder_that_died_is_chosen_anew() -> None:
    here = world()
    one = here.ask(50)
    assert here.where(one) == ("p0", "d0")
    here.dead = {"d0"}
    here.prefilled(one)
    assert here.where(one) == ("d1", "d1")
    here.dead = {"d0", "d1"}
    last = here.router.decoder(one)
    assert last is not None and here.borrowed() == {last.unit} <= {"p0", "p1"}
    here.dead = {r.unit for r in here.replicas}
    assert here.router.decoder(one) is None


def test_a_chosen_decoder_stays_chosen_whatever_comes() -> None:
    here = world()
    one = here.ask(50)
    for _ in range(3):
        here.ledger.open(Request(here.ledger.next_id(), "a", 200, 9, b""), "d0")
    chosen = here.router.decoder(one)
    assert chosen is not None and chosen.unit == "d0"


def test_who_has_the_prompt_is_preferred_while_it_has_room() -> None:
    here = world()
    here.ask(10)
    assert here.where(here.ask(10, near="p0"))[0] == "p0"
    for _ in range(4):
        here.ask(95, near="p0")
    assert here.where(here.ask(95, near="p0"))[0] == "p1"


def test_models_borrow_apart() -> None:
    here = world("p0 d0")
    for _ in range(5):
        here.ask(100)
    assert here.router.is_borrowed("a", "d0") and not here.router.is_borrowed("b", "d0")


def test_traffic_shares_weigh() -> None:
    here = world("p0 p1 d0")
    here.replicas[0] = replace(here.replicas[0], traffic=3.0)
    found = [here.where(here.ask(10))[0] for _ in range(40)]
    assert (found.count("p0"), found.count("p1")) == (30, 10)


class PoolMachine(RuleBasedStateMachine):
    """Whatever comes in whatever order, units that are borrowed have a reason, and all go home."""

    def __init__(self) -> None:
        super().__init__()
        self.here = world("p0 p1 d0 d1 m0")
        self.queued: list[int] = []
        self.running: list[int] = []

    @rule(tokens=st.integers(1, 250), has_answer=st.booleans())
    def come(self, tokens: int, has_answer: bool) -> None:
        route = self.here.router.route(Ask("a", tokens, has_answer))
        if route is None:
            assert len(self.here.dead) == 5
            return
        assert route.replica.unit not in self.here.dead
        assert (route.decoder is None) != has_answer
        assert route.is_handed_over == (route.decoder not in (None, route.replica.unit))
        if route.is_handed_over:
            # Two that hold sequences for each other would wait for ever.
            assert route.replica.role == "prefill"
            assert not self.here.router.is_borrowed("a", route.replica.unit)
        self.open(tokens, route)

    def open(self, tokens: int, route: Route) -> None:
        request_id = self.here.ledger.next_id()
        request = Request(request_id, "a", tokens, 9, b"")
        self.here.ledger.open(request, route.replica.unit, route.decoder)
        self.queued.append(request_id)

    @precondition(lambda self: self.queued and len(self.here.dead) < 5)
    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        request_id = self.queued.pop(data.draw(st.integers(0, len(self.queued) - 1)))
        self.here.prefilled(request_id)
        self.running.append(request_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.here.ended(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @rule(unit=st.sampled_from(["p0", "p1", "d0", "d1", "m0"]))
    def die_or_live(self, unit: str) -> None:
        self.here.dead ^= {unit}
        for live in self.here.ledger.of_unit(unit) if unit in self.here.dead else []:
            self.here.ledger.close(live.request.id)
            for ids in (self.queued, self.running):
                if live.request.id in ids:
                    ids.remove(live.request.id)
        self.here.router.settle()

    @invariant()
    def adds_up(self) -> None:
        assert self.here.ledger.check()
        borrowed = self.here.borrowed()
        homes = {r.unit: r.role for r in self.here.replicas}
        now: dict[str, str] = dict(homes)
        for switch in self.here.switches:
            assert now[switch.unit] == switch.before != switch.after
            now[switch.unit] = switch.after
        assert {unit for unit in homes if now[unit] != homes[unit]} == borrowed

    def teardown(self) -> None:
        self.here.dead = set()
        for request_id in [*self.queued, *self.running]:
            self.here.ended(request_id)
        assert self.here.borrowed() == set(), "a unit did not go home"


TestPools = PoolMachine.TestCase
