"""The tables of `muxrt plan`: whole numbers and names at any width."""

from io import StringIO

import pytest
from planner_world import demand, group, problem
from rich.console import Console

from muxrt.cli.plan_tables import print_headline, print_second_best, print_units
from muxrt.planner.assign import to_placement
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, Group, Part
from muxrt.planner.explain import SecondBest
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.workload import Problem

LONG = "an-organisation/a-model-with-a-long-name-instruct-v0.3"


def printed(given: Problem, draft: Draft, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    judge = QueueingJudge(given)
    score = judge(draft)
    placement = to_placement(given, draft, score)
    print_headline(console, given, draft, score)
    print_units(console, given, Capacity(given, judge), draft, score, placement)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def busy() -> tuple[Problem, Draft]:
    given = problem([demand("a", 123.45), demand("b", 6.0), demand("c", 0.5)], gpus=4)
    shared = Group(0, 2, (Part("a", 0.5), Part("b"), Part("c")), 30)
    return given, (shared, Group(0, 2, (Part("a", 0.5),)))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_nothing_is_cut_off(width: int) -> None:
    text = printed(*busy(), width)
    assert "…" not in text and max(len(line) for line in text.splitlines()) <= width
    for word in ("unit-0", "0:0-1", "30 / 70", "one", "a (50%)", "61.73", "attain-", "head-"):
        assert word in text


def test_at_80_columns_units_and_models_have_tables_of_their_own() -> None:
    narrow, wide = (printed(*busy(), width).count("\n unit ") for width in (80, 120))
    assert (narrow, wide) == (2, 1)


def test_numbers_stand_under_each_other() -> None:
    lines = printed(*busy(), 120).splitlines()
    ends = [
        line.index(rate) + len(rate)
        for rate in ("61.73", "6.00", "0.50")
        for line in lines
        if f" {rate} " in line
    ]
    assert len(ends) == 4 and len(set(ends)) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_name_is_folded_not_cut(width: int) -> None:
    given = problem([demand(LONG, 2.0)], gpus=1)
    text = printed(given, (group(1, LONG),), width)
    assert "…" not in text and "2.00" in text
    # What is left of a name goes on below it, in the same column.
    pieces = [word for line in text.splitlines() for word in line.split() if word in LONG]
    assert "".join(pieces).count(LONG) == 1


def test_second_best_places_are_listed() -> None:
    console = Console(file=StringIO(), width=80)
    print_second_best(
        console,
        [SecondBest("a", ("b", LONG), 1.25, 10.5), SecondBest("z", None, 3.0, 6.0)],
    )
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "…" not in text and "10.50" in text and "nowhere else" in text
    assert max(map(len, text.splitlines())) <= 80
    print_second_best(console, [])
    assert console.file.getvalue() == text  # asked for nothing, it says nothing
