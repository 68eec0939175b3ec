"""When decode steps are captured, replayed and dropped; buckets."""

from collections.abc import Callable

import pytest

pytest.importorskip("torch")

from muxrt.worker.graphs import Key, Steps, batch_bucket, context_bucket
from tests.played_graphs import Repeated


class Counted:
    """A step that says how often it was launched."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self) -> None:
        self.runs += 1


def key(number: int) -> Key:
    return Key("model", "all", number, 1024)


class World:
    """Steps whose graphs take `graph_bytes` each."""

    def __init__(
        self, budget_bytes: int, graph_bytes: int = 100, agree: Callable[[int], int] = int
    ) -> None:
        self.used_bytes = 0
        self.made: list[Repeated] = []
        self._graph_bytes = graph_bytes
        self.steps = Steps(budget_bytes, self._new_graph, lambda: self.used_bytes, agree)

    def _new_graph(self) -> Repeated:
        world = self

        class Graph(Repeated):
            def capture(self, run) -> None:  # type: ignore[no-untyped-def]
                super().capture(run)
                world.used_bytes += world._graph_bytes

        self.made.append(Graph())
        return self.made[-1]

    def launch(self, number: int) -> Counted:
        step = self.steps.get(key(number), Counted)
        self.steps.prepare(key(number))
        self.steps.launch(key(number))
        assert isinstance(step, Counted)
        return step


def test_a_step_runs_once_then_is_captured_then_replayed() -> None:
    world = World(1000)
    steps = [world.launch(1) for _ in range(4)]
    assert steps[0] is steps[3] and steps[0].runs == 5  # the first time twice
    assert [graph.replays for graph in world.made] == [3]
    assert world.steps.num_bytes == 100


def test_the_least_recently_used_graph_goes_first() -> None:
    world = World(200)
    for number in (1, 2):
        world.launch(number)
        world.launch(number)
    world.launch(1)
    world.launch(3)
    world.launch(3)  # captured: 2 must go
    assert world.steps.num_bytes == 200
    before = len(world.made)
    world.launch(1)
    assert len(world.made) == before, "1 was used after 2 and is still there"
    world.launch(2)
    assert len(world.made) == before, "what was dropped runs once before it is captured again"
    world.launch(2)
    assert len(world.made) == before + 1


def test_a_graph_larger_than_the_budget_is_kept_until_the_next() -> None:
    world = World(50)
    for number in (1, 2):
        for _ in range(3):
            world.launch(number)
    assert [graph.replays for graph in world.made] == [2, 2]
    assert world.steps.num_bytes == 100


def test_ranks_drop_the_same_graphs_whatever_they_take_on_each() -> None:
    worlds = [World(250, size, agree=lambda _: 100) for size in (70, 130)]
    for world in worlds:
        for number in (1, 2, 1, 2, 3, 3):
            world.launch(number)
        assert [graph.replays for graph in world.made] == [1, 1, 1]
        assert world.steps.num_bytes == 200
        world.launch(1)
        assert len(world.made) == 3, "it was dropped, and runs once before it is captured again"


def test_without_a_budget_nothing_is_captured() -> None:
    world = World(0)
    assert [world.launch(1) for _ in range(3)][-1].runs == 4
    assert not world.made


def test_a_launch_gives_the_graph_that_the_device_may_still_replay() -> None:
    world = World(1000)
    world.steps.get(key(1), Counted)
    prepared = [world.steps.prepare(key(1)), world.steps.launch(key(1)) is None]
    prepared += [world.steps.prepare(key(1)), world.steps.launch(key(1)) is world.made[0]]
    assert all(prepared)
    assert not world.steps.prepare(key(1)), "nothing is left to prepare"


def test_buckets_hold_the_batch_and_waste_little() -> None:
    sizes = [batch_bucket(number) for number in range(1, 1025)]
    for number, size in enumerate(sizes, 1):
        assert size >= number and batch_bucket(size) == size
        assert size - number <= max(3, number // 4 + 7)
    assert sorted(set(sizes[:64])) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert len(set(sizes[:256])) == 23
    assert [context_bucket(n) for n in (1, 1024, 1025, 4096, 5000)] == [
        1024,
        1024,
        2048,
        4096,
        8192,
    ]
