"""configs/replan.yaml as it is shipped: its models get the cores that their traffic takes."""

import os
import time
from pathlib import Path

import pytest
from msgspec.structs import replace
from real_server import real_server
from test_replan_apply import KEY
from test_server_replan import ask, asking, metric, until

from muxrt.cli.check import check_file
from muxrt.config.load import load
from muxrt.config.serve import ApiKeys, Endpoint, ServeConfig
from muxrt.server.traffic_files import Entry, add_history

FILE = Path(__file__).parent.parent / "configs" / "replan.yaml"
MODELS = ("pydoc-s", "pydoc-m", "pydoc-l")

pytestmark = pytest.mark.skipif(
    not {0, 1} <= os.sched_getaffinity(0), reason="its units are on cores 0 and 1"
)


def test_it_is_read_and_replans_every_night(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUXRT_ADMIN_KEY", KEY)
    config = check_file(FILE).config
    assert config.replan is not None and config.admin is not None and config.traffic is not None
    assert (config.replan.every_s, config.replan.at_minutes) == (86400, 240)


def moved(folder: Path) -> ServeConfig:
    """With what it writes in `folder`, and an hour ahead instead of a day, so that it is quick."""
    config, keys = load(FILE), folder / "admin.keys"
    keys.write_text(KEY)
    assert config.replan is not None and config.admin is not None and config.traffic is not None
    source = ApiKeys(file=str(keys))
    return replace(
        config,
        endpoint=Endpoint(port=0),
        admin=replace(config.admin, keys=source, journal=str(folder / "journal")),
        traffic=replace(config.traffic, path=str(folder / "log")),
        replan=replace(config.replan, window="1h", scenarios=1),
    )


def skewed(log: Path) -> None:
    """A day and an hour in which everybody asked for pydoc-l, 600 requests in a row."""
    now_s, entries = time.time(), []
    for model, many in (("pydoc-s", 20), ("pydoc-m", 20), ("pydoc-l", 600)):
        tokens = 100 * many, 60 * many
        entries += [
            Entry(now_s - 4 * number - 1, model, *tokens, 0.1, 0.01, 200, "unit-1", None, many)
            for number in range(25 * 900)
        ]
    add_history(log, entries)


def test_a_model_that_all_ask_for_gets_both_cores(tmp_path: Path) -> None:
    skewed(tmp_path / "log")
    with real_server(moved(tmp_path)) as server:
        units = server.server.supervisor.units

        def homes(model: str) -> int:
            return sum(
                part.name == model
                for unit in units.values()
                if unit.is_routed
                for part in unit.spec.models
            )

        assert [homes(model) for model in MODELS] == [1, 1, 1]
        with asking(server, MODELS) as clients:
            assert ask(server, body=b"")[0] == 202
            last = until(lambda: ask(server)[1]["last"], 280)
            assert last["outcome"] == "applied", last
            count = clients.answered
            until(lambda: clients.answered >= count + 2 * len(MODELS))
        assert not clients.errors
        assert homes("pydoc-l") == 2 and homes("pydoc-s") >= 1 and homes("pydoc-m") >= 1
        assert metric(server, 'muxrt_replans_total{outcome="applied"}') == 1
        assert last["goodput_rps"]["after"] > 1.2 * last["goodput_rps"]["before"]
