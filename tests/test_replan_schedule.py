"""When a server replans: by the clock of a place, whatever is done to that clock."""

import inspect
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxrt.cli.replan import replan as command
from muxrt.config.document import Document
from muxrt.config.load import dump, load
from muxrt.config.replan import Replan, replan_problems
from muxrt.config.schema import convert
from muxrt.errors import ConfigError
from muxrt.server.planner_process import words
from muxrt.server.schedule import next_time

BERLIN = ZoneInfo("Europe/Berlin")


def after(replan: Replan, point: datetime, count: int = 1) -> list[str]:
    """The next times after a point, on the clock of the replan's zone."""
    found, now_s = [], point.timestamp()
    for _ in range(count):
        now_s = next_time(replan, now_s)
        found.append(f"{datetime.fromtimestamp(now_s, replan.zone):%m-%d %H:%M}")
    return found


def berlin(**options: str) -> Replan:
    return Replan(plan="p", timezone="Europe/Berlin", **options)


def test_every_night_at_four() -> None:
    replan = Replan(plan="plan.yaml")
    assert after(replan, datetime(2026, 3, 10, 3, 59, tzinfo=UTC), 2) == [
        "03-10 04:00",
        "03-11 04:00",
    ]
    assert after(replan, datetime(2026, 3, 10, 4, 0, tzinfo=UTC)) == ["03-11 04:00"]


def test_four_is_four_before_and_after_clocks_change() -> None:
    """On 2026-03-29 Berlin's clocks go from 2 to 3, on 2026-10-25 from 3 to 2."""
    assert after(berlin(), datetime(2026, 3, 28, 5, tzinfo=BERLIN), 2) == [
        "03-29 04:00",
        "03-30 04:00",
    ]
    assert after(berlin(), datetime(2026, 10, 24, 5, tzinfo=BERLIN), 2) == [
        "10-25 04:00",
        "10-26 04:00",
    ]


def test_a_time_that_is_left_out_is_later_and_one_that_comes_twice_is_once() -> None:
    half_past_two = berlin(at="02:30")
    spring = after(half_past_two, datetime(2026, 3, 28, 12, tzinfo=BERLIN), 2)
    assert spring == ["03-29 03:30", "03-30 02:30"]
    autumn = after(half_past_two, datetime(2026, 10, 24, 12, tzinfo=BERLIN), 2)
    assert autumn == ["10-25 02:30", "10-26 02:30"]


def test_parts_of_a_day_keep_their_distance() -> None:
    """From 04:00 to 04:00 there are 23 hours in March, and the last of four is not doubled."""
    six = berlin(every="6h")
    assert after(six, datetime(2026, 3, 28, 20, tzinfo=BERLIN), 5) == [
        "03-28 22:00",
        "03-29 04:00",
        "03-29 10:00",
        "03-29 16:00",
        "03-29 22:00",
    ]
    # The day that begins at 04:00 on the 24th has 25: the next one begins seven hours after 22:00.
    assert after(six, datetime(2026, 10, 24, 21, tzinfo=BERLIN), 3) == [
        "10-24 22:00",
        "10-25 04:00",
        "10-25 10:00",
    ]


def test_days_are_counted_alike_after_a_restart() -> None:
    """Whenever it is asked, every third day is the same one."""
    third = Replan(plan="p", every="72h")
    first = next_time(third, datetime(2026, 3, 10, tzinfo=UTC).timestamp())
    assert next_time(third, first - 1) == first and next_time(third, first - 2 * 86400) == first
    assert next_time(third, first) == first + 3 * 86400


@given(
    now_s=st.floats(1.7e9, 2e9),
    every=st.sampled_from(["10s", "15min", "1h", "6h", "24h", "48h", "7d"]),
    hour=st.integers(0, 23),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe", "America/New_York"]),
)
def test_it_is_always_ahead_and_never_far(now_s: float, every: str, hour: int, zone: str) -> None:
    replan = Replan(plan="p", every=every, at=f"{hour}:05", timezone=zone)
    due_s = next_time(replan, now_s)
    assert now_s < due_s <= now_s + replan.every_s + 3600
    assert next_time(replan, due_s - 1e-3) == due_s, "nothing comes between"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"every": "5h"}, "replan.every: found '5h', expected a part of a day such as 6h"),
        ({"every": "36h"}, "replan.every: found '36h'"),
        ({"every": "0h"}, "replan.every: found '0h'"),
        ({"window": "5min"}, "replan.window: found '5min', expected 15min to 7d"),
        ({"timezone": "Mars/Olympus"}, "replan.timezone: found 'Mars/Olympus', expected UTC"),
        ({"timezone": "../etc"}, "replan.timezone: found '../etc'"),
        ({"timeout": "0s"}, "replan.timeout: found '0s'"),
    ],
)
def test_a_schedule_that_is_none_is_named(given: dict[str, str], said: str) -> None:
    problems = [problem.message for problem in replan_problems(Replan(plan="p", **given))]
    assert len(problems) == 1 and problems[0].startswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"at": 240}, 'at: found 240, expected a time of day in quotes, such as "04:00"'),
        ({"at": "24:00"}, "at: found '24:00', expected a time of day in quotes"),
        ({"every": 24}, "every: found 24, expected a duration such as 24h, 90min or 30s"),
        ({"every": "daily"}, "every: found 'daily', expected a duration such as 24h"),
        ({"quantile": 1}, "quantile: found 1, expected a number"),
    ],
)
def test_values_of_the_wrong_kind_are_named(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(Document("f", {"plan": "p", **given}), Replan)
    assert said in error.value.message


SERVE = """\
models:
  - {name: a, path: a, slo: {ttft_s: 4, tpot_s: 0.5}}
units:
  - {name: left, models: [{name: a}], memory: {kv_bytes: 64MiB},
     mesh: {kind: core, node: 0, gpus: [0]}}
traffic: {path: log}
admin: {keys: {env: ADMIN}}
replan: {plan: plan.yaml, every: 12h, at: "02:30"}
"""


def test_a_file_with_replan_is_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(SERVE)
    found = load(tmp_path / "serve.yaml")
    assert found.replan is not None and found.replan.plan == str(tmp_path / "plan.yaml")
    assert (found.replan.every_s, found.replan.at_minutes) == (43200, 150)
    (tmp_path / "again.yaml").write_text(dump(found))
    assert load(tmp_path / "again.yaml") == found


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("traffic: {path: log}\n", "", "found no log to plan by, expected traffic: {path: FOLDER}"),
        (
            "admin: {keys: {env: ADMIN}}\n",
            "",
            "found no admin, expected admin: {keys: {env: NAME}}",
        ),
        (", slo: {ttft_s: 4, tpot_s: 0.5}", "", "a has no slo, expected one to plan by"),
        ("12h", "5h", "replan.every: found '5h'"),
        ("models: [{name: a}]", "exchanges: true, models: [{name: a}]", "found roles and replan"),
    ],
)
def test_what_a_replan_needs_is_asked_for(
    tmp_path: Path, line: str, instead: str, said: str
) -> None:
    assert line in SERVE
    (tmp_path / "serve.yaml").write_text(SERVE.replace(line, instead))
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "serve.yaml")
    assert said in error.value.message and "serve.yaml:" in error.value.message


def test_terms_that_nobody_states_are_those_of_the_command() -> None:
    asked = words(Replan(plan="p"), Path("log"), Path("served"))
    options = dict(word[2:].split("=") for word in asked if "=" in word)
    known = {
        n.replace("_", "-"): p.default for n, p in inspect.signature(command).parameters.items()
    }
    assert options.pop("traffic") == "log" and options.pop("plan") == "p"
    assert len(options) >= 8
    assert options == {name: str(known[name]) for name in options}
