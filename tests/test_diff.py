"""Old and new placements: what stays, what moves, what that costs, whether it is worth it."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_world import demand, problem

from muxrt.config.placement import GIB, Lanes, Memory, Mesh, Scheduling, UnitModel, UnitSpec
from muxrt.planner.align import align
from muxrt.planner.diff import Diff, Fate, Move, diff
from muxrt.planner.moving import Cost, Speed, Terms, cost_of, decide
from muxrt.planner.workload import Problem

FOUR = problem([demand(name) for name in "abcd"], gpus=4)
SPEED = Speed(load_bytes_per_s=10.0, unit_start_s=2.0)


def unit(
    name: str,
    models: str,
    gpus: Sequence[int],
    *,
    node: int = 0,
    quota: float | None = None,
    lanes: str = "stream",
    policy: str = "adbs",
    traffic: float = 1.0,
) -> UnitSpec:
    return UnitSpec(
        name=name,
        models=tuple(UnitModel(name=model, quota=quota, traffic=traffic) for model in models),
        memory=Memory(kv_bytes=GIB, swap_bytes=7),
        mesh=Mesh(device="gpu", kind="a100-80g", node=node, gpus=tuple(gpus)),
        lanes=Lanes(kind=lanes),  # type: ignore[arg-type]
        scheduling=Scheduling(policy=policy),  # type: ignore[arg-type]
    )


def fates(found: Diff) -> dict[str, str]:
    return {one.name: one.fate.value for one in found.units}


def laid(old: Sequence[UnitSpec], new: Sequence[UnitSpec], given: Problem = FOUR) -> dict[str, str]:
    return fates(diff(old, align(given, old, new)))


# -- what differs ----------------------------------------------------------------------------


def test_the_same_is_kept_whatever_its_quotas_are() -> None:
    found = diff([unit("x", "ab", [0])], [unit("x", "ba", [0], quota=0.3, traffic=2.0)])
    assert fates(found) == {"x": "kept"} and found.is_empty and found.moves == ()


def test_units_are_told_apart_by_name() -> None:
    old = [unit("x", "a", [0]), unit("y", "b", [1]), unit("z", "c", [2])]
    new = [unit("x", "a", [0], lanes="mps"), unit("y", "b", [1]), unit("w", "ac", [2, 3])]
    found = diff(old, new)
    assert fates(found) == {"x": "changed", "y": "kept", "w": "added", "z": "removed"}
    assert found.moves == (Move("a", (), ("w",)), Move("c", ("z",), ("w",)))
    assert [one.name for one in found.of(Fate.ADDED, Fate.REMOVED)] == ["w", "z"]


# -- a plan over what is there ---------------------------------------------------------------


def test_units_that_hold_the_same_stay_where_they_are() -> None:
    old = [unit("first", "a", [0]), unit("second", "b", [1]), unit("third", "cd", [2, 3])]
    new = [unit("unit-0", "cd", [0, 1]), unit("unit-1", "b", [2]), unit("unit-2", "a", [3])]
    found = align(FOUR, old, new)
    assert sorted(one.name for one in found) == ["first", "second", "third"]
    assert {one.name: one.mesh for one in found} == {one.name: one.mesh for one in old}
    assert laid(old, new) == {"first": "kept", "second": "kept", "third": "kept"}


def test_what_is_new_goes_where_room_is_left() -> None:
    old = [unit("x", "a", [0]), unit("y", "b", [1]), unit("z", "cd", [2, 3])]
    new = [unit("unit-0", "bc", [0, 1]), unit("unit-1", "a", [2]), unit("unit-2", "d", [3])]
    found = {one.name: one for one in align(FOUR, old, new)}
    assert laid(old, new) == {"z": "changed", "x": "kept", "y": "changed"}
    assert found["z"].mesh.gpus == (2, 3) and [p.name for p in found["z"].models] == ["b", "c"]
    assert found["y"].mesh.gpus == (1,) and [p.name for p in found["y"].models] == ["d"]


def test_new_units_get_names_that_nobody_had() -> None:
    old = [unit("unit-0", "abcd", [0, 1, 2, 3])]
    new = [unit("unit-0", "ab", [0, 1]), unit("unit-1", "cd", [2, 3])]
    assert laid(old, new) == {"unit-1": "added", "unit-2": "added", "unit-0": "removed"}


def test_where_staying_leaves_no_room_in_one_piece_the_plan_goes_first() -> None:
    """`a` in the middle of the node would leave no two GPUs side by side for `bc`."""
    old = [unit("x", "a", [1]), unit("y", "d", [2]), unit("z", "b", [0]), unit("w", "c", [3])]
    new = [unit("unit-0", "bc", [0, 1]), unit("unit-1", "a", [2]), unit("unit-2", "d", [3])]
    found = align(FOUR, old, new)
    taken = [gpu for one in found for gpu in one.mesh.gpus or ()]
    assert sorted(taken) == [0, 1, 2, 3]


def test_what_a_plan_does_not_know_is_carried_over() -> None:
    old = [unit("x", "ab", [0, 1], policy="fcfs"), unit("y", "cd", [2, 3])]
    (found,) = align(FOUR, old, [unit("unit-0", "abc", [0, 1, 2, 3])])
    assert found.scheduling.policy == "fcfs" and found.memory.swap_bytes == 7


def test_a_unit_that_stays_is_tuned_anew_where_asked() -> None:
    old = [unit("x", "ab", [0, 1])]
    new = [unit("unit-0", "ab", [2, 3], lanes="green")]
    assert diff(old, align(FOUR, old, new)).is_empty
    retuned = align(FOUR, old, new, retune=True)
    assert fates(diff(old, retuned)) == {"x": "changed"}
    assert retuned[0].mesh == old[0].mesh and retuned[0].lanes.kind == "green"


def test_no_gpu_is_given_twice_and_none_across_nodes() -> None:
    two = problem([demand(name) for name in "abcd"], gpus=4, nodes=2)
    old = [unit("x", "a", [2, 3], node=1), unit("y", "b", [0])]
    new = [
        unit("unit-0", "c", [0, 1, 2, 3]),
        unit("unit-1", "a", [0, 1], node=1),
        unit("unit-2", "b", [2], node=1),
        unit("unit-3", "d", [3], node=1),
    ]
    found = align(two, old, new)
    taken = [(one.mesh.node, gpu) for one in found for gpu in one.mesh.gpus or ()]
    assert len(set(taken)) == len(taken) == 8
    assert laid(old, new, two)["x"] == "kept"


# -- what it costs ---------------------------------------------------------------------------


def weights(model: str, size: int) -> int:
    return {"a": 100, "b": 50, "c": 20}[model]


def test_a_node_loads_all_its_units_at_once() -> None:
    old = [unit("x", "a", [0]), unit("y", "b", [1], node=1)]
    new = [unit("x", "ab", [0]), unit("y", "b", [1], node=1), unit("w", "c", [2])]
    cost = cost_of(diff(old, new), weights, {"a": 3.0, "b": 1.0}, SPEED)
    assert cost.loaded_bytes == {"x": 150, "w": 20} and cost.total_bytes == 170
    assert cost.reduced_s == 170 / 10 + 2
    assert cost.lost_requests == 3.0 * cost.reduced_s, "only x is down"


def test_replicas_share_what_is_lost() -> None:
    old = [unit("x", "a", [0], traffic=1.0), unit("y", "a", [1], traffic=3.0)]
    cost = cost_of(diff(old, old[1:]), weights, {"a": 8.0}, SPEED)
    assert (cost.reduced_s, cost.lost_requests) == (0.0, 0.0), "nothing is loaded"
    moved = [old[0], unit("z", "a", [2])]
    cost = cost_of(diff(old, moved), weights, {"a": 8.0}, SPEED)
    assert cost.lost_requests == 8.0 * 0.75 * cost.reduced_s == 6.0 * 12


# -- whether it is worth it ------------------------------------------------------------------

CHANGED = diff([unit("x", "a", [0])], [unit("x", "b", [0])])


@pytest.mark.parametrize(
    ("gains", "lost", "is_worth", "said"),
    [
        ([1.0, 1.0], 40.0, True, "it earns 100 requests in 0.0277778 h"),
        ([1.0, 1.0], 60.0, False, "it does not earn 2 times over"),
        ([2.5, -0.5], 40.0, True, "it earns 100 requests"),
        ([1.0, -1.0], 0.0, False, "nothing that was found serves more"),
        ([0.1, 0.1], 0.0, False, "less than 2% of 10.00"),
    ],
)
def test_a_change_must_earn_its_cost(
    gains: list[float], lost: float, is_worth: bool, said: str
) -> None:
    found = decide(CHANGED, 10.0, gains, Cost({}, 1.0, lost), Terms(window_s=100.0))
    assert (found.is_worth, said in found.reason) == (is_worth, True), found.reason


def test_nothing_to_change_is_no_change() -> None:
    same = diff([unit("x", "a", [0])], [unit("x", "a", [0])])
    assert not decide(same, 1.0, [1.0], Cost({}, 0.0, 0.0), Terms(1.0)).is_worth


def test_names_are_of_the_old_placement_only_once() -> None:
    old = [unit("x", "a", [0]), unit("y", "a", [1])]
    new = [unit("unit-0", "a", [2]), unit("unit-1", "a", [3])]
    found = align(FOUR, old, new)
    assert sorted(one.name for one in found) == ["x", "y"]
    assert msgspec.structs.replace(found[0], name="") != msgspec.structs.replace(found[1], name="")


TWO_NODES = problem([demand(name) for name in "abcdef"], gpus=4, nodes=2)


@st.composite
def placements(draw: st.DrawFn) -> list[UnitSpec]:
    """Units of 1, 2 and 4 GPUs packed into two nodes as a plan packs them: the largest first."""
    free = [0, 0]
    units = []
    for size in sorted(draw(st.lists(st.sampled_from([1, 2, 4]), max_size=6)), reverse=True):
        node = next((n for n in (0, 1) if free[n] + size <= 4), None)
        if node is None:
            break
        models = draw(st.sets(st.sampled_from("abcdef"), min_size=1, max_size=2))
        gpus = range(free[node], free[node] + size)
        units.append(unit(f"unit-{len(units)}", "".join(sorted(models)), gpus, node=node))
        free[node] += size
    return units


def contents(units: Sequence[UnitSpec]) -> list[tuple[int, list[str]]]:
    return sorted((len(u.mesh.gpus or ()), sorted(p.name for p in u.models)) for u in units)


@given(old=placements(), new=placements(), retune=st.booleans())
def test_any_plan_can_be_laid_over_any_placement(
    old: list[UnitSpec], new: list[UnitSpec], retune: bool
) -> None:
    found = align(TWO_NODES, old, new, retune=retune)
    taken = [(one.mesh.node, gpu) for one in found for gpu in one.mesh.gpus or ()]
    assert len(taken) == len(set(taken)) and {gpu for _, gpu in taken} <= set(range(4))
    assert contents(found) == contents(new)
    assert len({one.name for one in found}) == len(found)
    again = align(TWO_NODES, found, new)
    assert diff(found, again).is_empty, "what is laid already stays"
