"""The event loop: total order, cancelling, no past."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxrt.sim.loop import ARRIVE, FINISH, PLAN, EventLoop


def test_equal_times_run_by_priority_then_first_come() -> None:
    loop, seen = EventLoop(), list[str]()
    for name, priority in [
        ("p1", PLAN),
        ("a1", ARRIVE),
        ("f1", FINISH),
        ("p2", PLAN),
        ("f2", FINISH),
    ]:
        loop.after(1.0, lambda name=name: seen.append(name), priority)  # type: ignore[misc]
    while loop.step():
        pass
    assert seen == ["f1", "f2", "a1", "p1", "p2"]


@given(st.permutations([(t, p) for t in (0.0, 1.0, 2.0) for p in (FINISH, ARRIVE, PLAN)]))
def test_the_order_does_not_depend_on_insertion(events: list[tuple[float, int]]) -> None:
    loop, seen = EventLoop(), list[tuple[float, int]]()
    for at_s, priority in events:
        loop.after(at_s, lambda e=(at_s, priority): seen.append(e), priority)  # type: ignore[misc]
    while loop.step():
        pass
    assert seen == sorted(events)


def test_a_cancelled_event_does_not_happen_and_does_not_move_time() -> None:
    loop = EventLoop()
    event = loop.after(5.0, lambda: pytest.fail("it was cancelled"))
    event.cancel()
    event.cancel()
    assert not loop.has_events
    assert not loop.step()
    assert loop.now_s == 0.0


def test_the_past_is_refused() -> None:
    with pytest.raises(ValueError, match="delay_s=-1"):
        EventLoop().after(-1, lambda: None)


def test_a_point_in_time_that_has_passed_means_now() -> None:
    loop = EventLoop()
    loop.after(2.0, lambda: None)
    loop.step()
    loop.at(1.0, lambda: None)
    assert loop.step()
    assert loop.now_s == 2.0
