"""The picture of a placement: what is drawn where, and that it stays readable."""

from dataclasses import replace
from pathlib import Path

import pytest
from planner_world import demand, group, problem

from muxrt.cli.plan_picture import (
    ALARM,
    MAX_GPUS,
    Block,
    Kind,
    Node,
    Note,
    apart_blocks,
    blocks,
    busiest,
    draw,
    folded,
    in_columns,
    nodes,
)
from muxrt.errors import ConfigError
from muxrt.planner.assign import to_placement
from muxrt.planner.draft import Draft
from muxrt.planner.phase_plan import to_placement as phases_to_placement
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.strategies.distserve import distserve
from muxrt.planner.workload import Problem


def drawn(given: Problem, draft: Draft) -> list[Node]:
    score = QueueingJudge(given)(draft)
    placement = to_placement(given, draft, score)
    return nodes(given, blocks(given, draft, score, placement.units))


def test_a_meshs_pieces_are_what_each_of_its_gpus_holds() -> None:
    given = problem([demand("a", 4.0), demand("b", 1.0, "llama-13b")], gpus=4)
    (node,) = drawn(given, (group(2, "a", "b"),))
    block, idle = node.blocks
    assert (block.gpus, idle.gpus, idle.unit) == ((0, 1), (2, 3), None)
    sizes = {piece.kind: piece.num_bytes for piece in block.pieces[2:]}
    assert [piece.model for piece in block.pieces[:2]] == ["a", "b"]
    assert block.pieces[0].num_bytes == given.bytes("a", 2).weights
    assert sum(piece.num_bytes for piece in block.pieces) == 80e9  # to scale: nothing is missing
    assert sizes[Kind.KV_USED] + sizes[Kind.KV_FREE] == given.kv_bytes(0, 2, ("a", "b"))
    assert 0 < sizes[Kind.KV_USED] < sizes[Kind.KV_FREE]


def test_notes_name_rates_and_warn_of_missed_slos() -> None:
    given = problem([demand("calm", 1.0), demand("torrent", 500.0)], gpus=2)
    (node,) = drawn(given, (group(1, "calm"), group(1, "torrent")))
    calm, torrent = node.blocks
    assert [note.text for note in calm.notes] == [
        "unit-0  tp 1, one lane",
        "calm  1.00/s, attainment 100%",
    ]
    assert calm.notes[1].colour != ALARM == torrent.notes[1].colour


def test_meshes_of_one_phase_are_drawn_to_scale() -> None:
    given = problem([demand("a", 20.0, "llama2-13b", prompt=700, output=200)], gpus=8)
    plan = distserve(given)
    units = phases_to_placement(given, plan).units
    (node,) = nodes(given, apart_blocks(given, plan, units))
    used = [block for block in node.blocks if block.unit is not None]
    assert {block.unit for block in used} == {unit.name for unit in units}
    in_use = {}
    for block in used:
        assert sum(piece.num_bytes for piece in block.pieces) == pytest.approx(80e9)
        assert block.pieces[0].num_bytes == given.bytes("a", len(block.gpus)).weights
        in_use[block.unit] = block.pieces[2].num_bytes
        assert block.pieces[2].num_bytes + block.pieces[3].num_bytes == pytest.approx(
            given.kv_bytes(0, len(block.gpus), ("a",))
        )
    # Answers are held for as long as they take, prompts only until they are handed over.
    assert in_use["a-decode-0"] > 2 * in_use["a-prefill-0"] > 0


def machine(number: int, rate_rps: float, gpus: int = 8) -> Node:
    given = problem([demand("a", rate_rps)], gpus=gpus)
    return replace(drawn(given, (group(gpus, "a"),))[0], number=number)


def test_the_busiest_nodes_are_drawn_in_order() -> None:
    every = [machine(number, 1.0 + number % 5) for number in range(12)]
    shown = busiest(every)
    assert sum(node.num_gpus for node in shown) == MAX_GPUS
    left_out = [node for node in every if node not in shown]
    assert len(left_out) == 4
    assert max(n.rate_rps for n in left_out) <= min(n.rate_rps for n in shown)
    assert [node.number for node in shown] == sorted(node.number for node in shown)


def test_one_node_that_is_too_large_is_drawn_all_the_same() -> None:
    block = Block(tuple(range(100)), 1, None, (), (Note("idle"),), ())
    assert len(busiest([Node(0, "x", (block,))])) == 1


def test_columns_are_about_as_high() -> None:
    few, many = [machine(0, 1.0), machine(1, 1.0)], [machine(n, 1.0) for n in range(4)]
    assert [len(column) for column in in_columns(few)] == [2]
    assert [len(column) for column in in_columns(many)] == [2, 2]
    uneven = [machine(0, 1.0), machine(1, 1.0), *(machine(n, 1.0, 4) for n in range(2, 6))]
    assert [len(column) for column in in_columns(uneven)] == [2, 4]


@pytest.mark.parametrize(
    ("lines", "room", "expected"),
    [
        (1, 40, ["u  one, two, three, four"]),
        (1, 20, ["u  one, two +2"]),
        (2, 14, ["u  one, two,", "three, four"]),
        (2, 11, ["u  one,", "two +2"]),
        (1, 3, ["u +4"]),
    ],
)
def test_names_are_folded_into_the_room_there_is(
    lines: int, room: int, expected: list[str]
) -> None:
    block = Block((0,), 1, "u", (), (Note("u"),), ("one", "two", "three", "four"))
    assert folded(block, lines, room) == expected


def test_a_unit_of_one_model_keeps_its_rate_on_one_line() -> None:
    block = Block((0,), 1, "u", (), (Note("u  tp 1"), Note("a  1.00/s, attainment 99%")), ("a",))
    assert folded(block, 1, 40) == ["u  a  1.00/s, 99%"]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_it_is_written(suffix: str, tmp_path: Path) -> None:
    given = problem([demand("a", 4.0), demand("b", 1.0)], gpus=2, nodes=40)
    draft = (group(1, "a"), group(2, "b"))
    score = QueueingJudge(given)(draft)
    path = tmp_path / f"p{suffix}"
    units = to_placement(given, draft, score).units
    draw(path, given, blocks(given, draft, score, units), score.goodput_rps)
    content = path.read_bytes()
    if suffix == ".svg":
        assert b"<svg" in content
    else:
        assert content.startswith(b"\x89PNG") and len(content) < 400_000


def test_a_picture_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    given = problem([demand("a", 4.0)], gpus=1)
    draft = (group(1, "a"),)
    score = QueueingJudge(given)(draft)
    path = tmp_path / "nowhere" / "p.png"
    units = to_placement(given, draft, score).units
    with pytest.raises(ConfigError, match=r"p.png: cannot be written: No such file or directory$"):
        draw(path, given, blocks(given, draft, score, units), score.goodput_rps)
