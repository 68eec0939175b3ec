"""Transfers that share links: cases by hand, and what must hold in all of them."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_world import unit

from muxrt.core import Copy, CopyKind, Result, Work
from muxrt.sim.copies import HOST_LINK_BYTES_PER_S, NODE_LINKS, CopyLane, host_path
from muxrt.sim.links import Link, Links, LinkTransfer
from muxrt.sim.loop import EventLoop

TEN = Link("ten", 10.0)
FOUR = Link("four", 4.0)
LATE = Link("late", 10.0, latency_s=0.5)


class Bench:
    """Links that note when transfers end."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.links = Links(self.loop)
        self.ends: dict[str, float] = {}
        self.sent: dict[str, LinkTransfer] = {}

    def send(self, name: str, num_bytes: float, *path: Link, at_s: float = 0.0) -> None:
        def ended() -> None:
            self.ends[name] = self.loop.now_s

        def start() -> None:
            self.sent[name] = self.links.send(path, num_bytes, ended)

        self.loop.at(at_s, start)

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        self.loop.at(at_s, action)

    def run(self) -> dict[str, float]:
        while self.loop.step():
            pass
        return self.ends


def test_alone_bytes_take_bandwidth_and_latency() -> None:
    bench = Bench()
    bench.send("a", 20, TEN)
    bench.send("b", 20, LATE)
    bench.send("c", 20, LATE, FOUR)  # as fast as its slowest link
    bench.send("d", 0, LATE)
    # b and d begin together: d has nothing to send, so that b soon has the rest of what c leaves.
    # c has 4 bytes/s of LATE, b the other 6: 20 / 6 s; c then cannot go faster.
    assert bench.run() == pytest.approx({"a": 2.0, "b": 20 / 6 + 0.5, "c": 5.0 + 0.5, "d": 0.5})


def test_two_share_a_link_and_the_rest_goes_faster() -> None:
    bench = Bench()
    bench.send("a", 30, TEN)
    bench.send("b", 10, TEN, at_s=1.0)
    # a: 10 bytes alone; then 5/s each until b has its 10 at 3 s; 10 are left of a: 1 s alone.
    assert bench.run() == pytest.approx({"a": 4.0, "b": 3.0})


def test_what_one_cannot_use_goes_to_the_others() -> None:
    # a is held to 2/s by FOUR beside c; b gets the 8/s that a leaves of TEN.
    bench = Bench()
    bench.send("a", 4, TEN, FOUR)
    bench.send("b", 16, TEN)
    bench.send("c", 4, FOUR)
    assert bench.run() == pytest.approx({"a": 2.0, "b": 2.0, "c": 2.0})


def test_a_cancelled_transfer_leaves_its_share() -> None:
    bench = Bench()
    bench.send("a", 20, TEN)
    bench.send("b", 20, TEN)
    bench.at(1.0, lambda: bench.links.cancel(bench.sent["b"]))
    bench.at(9.0, lambda: bench.links.cancel(bench.sent["a"]))  # too late
    assert bench.run() == pytest.approx({"a": 2.5})  # 5 of a in the first second, 15 at 10/s


def test_a_transfer_is_cancelled_while_its_last_byte_travels() -> None:
    bench = Bench()
    bench.send("a", 10, LATE)
    bench.at(1.25, lambda: bench.links.cancel(bench.sent["a"]))
    assert bench.run() == {}


def test_what_cannot_be_sent_is_refused() -> None:
    links = Links(EventLoop())
    with pytest.raises(ValueError, match="found 1 bytes over 0 links"):
        links.send([], 1, lambda: None)
    with pytest.raises(ValueError, match="found -1 bytes over 1 links"):
        links.send([TEN], -1, lambda: None)
    with pytest.raises(ValueError, match="link no: found 0 bytes/s"):
        Link("no", 0)


LINKS = [TEN, FOUR, LATE, Link("seven", 7.0, 0.25)]
transfers = st.lists(
    st.tuples(
        st.floats(0, 5),
        st.floats(0.1, 100),
        st.lists(st.sampled_from(LINKS), min_size=1, max_size=4),
        st.one_of(st.none(), st.floats(0, 20)),  # when it is cancelled
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(transfers)
def test_bytes_are_conserved_and_no_link_is_outrun(
    asked: list[tuple[float, float, list[Link], float | None]],
) -> None:
    bench = Bench()
    carried = dict.fromkeys(LINKS, 0.0)  # bytes
    since_s = 0.0

    def account() -> None:
        """What moved since the last event, by the rates that held; no link is over its limit."""
        nonlocal since_s
        elapsed_s, since_s = bench.loop.now_s - since_s, bench.loop.now_s
        for link in LINKS:
            rate = sum(t.rate for t in bench.links._sending if link in t.path)
            assert rate <= link.bytes_per_s * (1 + 1e-9)
            carried[link] += rates[link] * elapsed_s
            rates[link] = rate
        for transfer in bench.links._sending:
            # Max-min: each has a link that is full, on which nobody has more.
            assert any(
                rates[link] >= link.bytes_per_s * (1 - 1e-9)
                and all(
                    other.rate <= transfer.rate * (1 + 1e-9)
                    for other in bench.links._sending
                    if link in other.path
                )
                for link in transfer.path
            )

    rates = dict.fromkeys(LINKS, 0.0)
    for number, (at_s, num_bytes, path, _) in enumerate(asked):
        bench.send(str(number), num_bytes, *path, at_s=at_s)
    for number, (at_s, *_, cancel_s) in enumerate(asked):
        if cancel_s is not None:
            bench.at(at_s + cancel_s, lambda n=number: bench.links.cancel(bench.sent[str(n)]))  # type: ignore[misc]
    while bench.loop.step():
        account()
    for number, (at_s, num_bytes, path, cancel_s) in enumerate(asked):
        if cancel_s is not None:
            continue
        latency_s = sum(link.latency_s for link in set(path))
        slowest = min(link.bytes_per_s for link in path)
        took_s = bench.ends[str(number)] - at_s
        assert took_s >= (num_bytes / slowest + latency_s) * (1 - 1e-6)
    for link in LINKS:
        wanted = sum(num for _, num, path, cancel in asked if link in path and cancel is None)
        most = sum(num for _, num, path, _ in asked if link in path)
        assert wanted * (1 - 1e-6) <= carried[link] <= most * (1 + 1e-6)


# -- copies --------------------------------------------------------------------------------------

MIB = 1 << 20


class Lanes:
    """Copy lanes of units on one node, and when their copies end."""

    def __init__(self, *gpus: int) -> None:
        self.loop = EventLoop()
        links = Links(self.loop)
        self.lanes = [
            CopyLane(self.loop, links, unit("a", name=f"u{n}", gpus=range(size)), MIB)
            for n, size in enumerate(gpus)
        ]
        self.ends: dict[int, tuple[float, float]] = {}

    def copy(self, lane: int, number: int, kind: CopyKind = CopyKind.SWAP_OUT) -> None:
        """Of 1,000 blocks."""
        ids = b"\0" * 4000

        def done(work: Work, result: Result) -> None:
            self.ends[work.id] = (self.loop.now_s, result.elapsed_s)

        self.lanes[lane].launch(Copy(number, 1, "a", kind, 0, ids, ids), done)

    def run(self) -> dict[int, tuple[float, float]]:
        while self.loop.step():
            pass
        return self.ends


ALONE_S = 1000 * MIB / HOST_LINK_BYTES_PER_S


def test_a_unit_copies_one_after_the_other_over_the_links_of_its_gpus() -> None:
    node = Lanes(2)
    node.copy(0, 1)
    node.copy(0, 2, CopyKind.SWAP_IN)
    each_s = ALONE_S / 2
    assert node.run() == {
        1: pytest.approx((each_s, each_s)),
        2: pytest.approx((2 * each_s, each_s)),
    }


def test_copies_of_a_node_contend_for_its_links() -> None:
    assert NODE_LINKS == 4
    node = Lanes(4, 4, 1)
    node.copy(0, 1)
    node.copy(1, 2)
    node.copy(2, 3, CopyKind.SWAP_IN)  # the other direction is another link
    node.run()
    # Each of the two could have all four links alone; together half of them.
    assert node.ends[1][0] == node.ends[2][0] == pytest.approx(2 * ALONE_S / 4)
    assert node.ends[3][0] == pytest.approx(ALONE_S)


def test_units_on_other_nodes_do_not_contend() -> None:
    here, there = unit("a", gpus=[0]), unit("b", gpus=[0], name="v")
    assert host_path(here, CopyKind.SWAP_IN)[1] == host_path(there, CopyKind.SWAP_IN)[1]
    assert host_path(here, CopyKind.SWAP_IN)[1] != host_path(here, CopyKind.SWAP_OUT)[1]
    assert host_path(here, CopyKind.SWAP_IN)[0] != host_path(there, CopyKind.SWAP_IN)[0]


def test_nothing_comes_of_a_lane_that_stopped() -> None:
    node = Lanes(1, 1)
    node.copy(0, 1)
    node.copy(0, 2)
    node.copy(1, 3)
    node.lanes[0].stop()
    assert list(node.run()) == [3]
