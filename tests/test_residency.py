"""Who sleeps so that who may wake: states, the least recently used, pins and minimum residency."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxrt.sched.residency import NEXT, Event, Habits, Residency, Resident, Room, State

IDLE = frozenset[str]()


def resident(
    name: str, state: State = State.AWAKE, used_s: float = 0.0, **habits: object
) -> Resident:
    return Resident(
        name, Habits(**{"num_bytes": 10, "floor_blocks": 1} | habits), state, 0.0, used_s
    )  # type: ignore[arg-type]


def decided(residency: Residency, now: float, busy: frozenset[str] = IDLE) -> dict[str, State]:
    return {one.name: one.state for one in residency.decide(now, busy.__contains__)}


def two_of_three(**habits: object) -> Residency:
    models = [
        resident("a", used_s=1.0, **habits),
        resident("b", used_s=2.0, **habits),
        resident("c", State.ASLEEP),
    ]
    return Residency(models, Room(num_bytes=25, blocks=10))


def test_what_is_no_transition_is_refused() -> None:
    asleep = resident("a", State.ASLEEP)
    with pytest.raises(KeyError):
        asleep.on(Event.SLEPT, 0.0)
    assert len(NEXT) == 5


def test_the_least_recently_used_makes_room() -> None:
    residency = two_of_three()
    residency.want("c", 3.0)
    assert decided(residency, 3.0) == {"a": State.DRAINING}
    assert decided(residency, 3.1) == {}
    residency.models["a"].on(Event.SLEPT, 3.2)
    assert decided(residency, 3.2) == {"c": State.WAKING}


def test_who_runs_sequences_leaves_after_who_is_idle() -> None:
    residency = two_of_three()
    residency.want("c", 3.0)
    assert decided(residency, 3.0, frozenset("a")) == {"b": State.DRAINING}


def test_nobody_leaves_before_its_minimum_residency() -> None:
    residency = two_of_three(min_residency_s=5.0)
    residency.want("c", 3.0)
    assert decided(residency, 3.0) == {}
    assert residency.next_s(3.0, IDLE.__contains__) == 5.0
    assert decided(residency, 5.0) == {"a": State.DRAINING}


def test_the_pinned_stay() -> None:
    residency = two_of_three(pin=True)
    residency.want("c", 3.0)
    assert decided(residency, 100.0) == {}
    assert residency.next_s(3.0, IDLE.__contains__) == float("inf")


def test_too_few_to_make_room_stay_awake() -> None:
    """Who is evicted for nothing would have to wake again."""
    models = [resident("a"), resident("b", pin=True), resident("big", State.ASLEEP, num_bytes=20)]
    residency = Residency(models, Room(25, 10))
    residency.want("big", 1.0)
    assert decided(residency, 1.0) == {}


def test_blocks_to_be_entitled_to_are_room_too() -> None:
    models = [resident("a"), resident("b", State.ASLEEP, floor_blocks=10)]
    residency = Residency(models, Room(100, 10))
    residency.want("b", 1.0)
    assert decided(residency, 1.0) == {"a": State.DRAINING}


def test_idle_for_too_long_is_asleep() -> None:
    residency = two_of_three(idle_timeout_s=4.0)
    assert decided(residency, 4.9) == {}
    assert residency.next_s(4.9, IDLE.__contains__) == 5.0
    assert decided(residency, 5.0, frozenset("a")) == {}
    assert decided(residency, 5.0) == {"a": State.DRAINING}


def test_wishes_come_true_in_order() -> None:
    models = [
        resident("a", pin=True),
        resident("large", State.ASLEEP, num_bytes=15),
        resident("small", State.ASLEEP, num_bytes=5),
    ]
    residency = Residency(models, Room(20, 10))
    residency.want("large", 1.0)
    residency.want("small", 2.0)
    assert decided(residency, 2.0) == {}
    residency.models["large"].wanted_s = None
    assert decided(residency, 2.0) == {"small": State.WAKING}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["want", "decide", "end"]))))
def test_there_is_never_more_awake_than_fits(steps: list[tuple[str, str]]) -> None:
    sizes = dict(zip("abcdef", (10, 10, 20, 30, 5, 5), strict=True))
    models = [
        resident(n, State.AWAKE if n == "a" else State.ASLEEP, num_bytes=s, pin=n == "a")
        for n, s in sizes.items()
    ]
    residency = Residency(models, Room(40, 4))
    for now, (name, what) in enumerate(steps):
        one = residency.models[name]
        if what == "want":
            residency.want(name, now)
        elif what == "decide":
            decided(residency, now)
        elif one.state is State.DRAINING:
            one.on(Event.SLEPT, now)
        elif one.state is State.WAKING:
            one.on(Event.LOADED, now)
        assert residency.check()
