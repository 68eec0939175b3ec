"""How a mesh starts: the other ranks first, and each beats before it loads."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from time import monotonic_ns
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

from real_server import real_config
from test_worker_process import children

from muxrt.config.placement import Mesh
from muxrt.core import Result
from muxrt.engine.messages import Loading, UnitBoot
from muxrt.errors import MuxrtError
from muxrt.worker import process
from muxrt.worker.collectives import RankLost
from muxrt.worker.load import load_unit
from muxrt.worker.rank import RankChild
from muxrt.worker.rank_processes import RankProcesses
from muxrt.worker.watch import BEATS_BYTES, Beats, Watch

HEAVY = ("torch", "numba", "safetensors", "scipy")
LOADING = """
import sys
import {module}
print(*(name for name in {heavy} if name in sys.modules))
"""

two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")


@pytest.mark.parametrize("module", ["muxrt.worker.process", "muxrt.worker.rank_process"])
def test_what_starts_ranks_and_beats_imports_nothing_heavy(module: str) -> None:
    code = LOADING.format(module=module, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@two_cores
def test_the_other_ranks_are_started_before_the_first_one_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = os.sched_getaffinity(0)
    config = real_config(tmp_path, {"cut": ["a"]})
    unit = msgspec.structs.replace(config.units[0], mesh=Mesh(gpus=(0, 1)))
    boot = UnitBoot(unit=unit, models=config.models, endpoint="", identity="cut#1")
    at_import: list[list[int]] = []
    told: list[Loading] = []

    def import_it(name: str) -> Any:
        at_import.append(children(os.getpid()))
        return import_module(name)

    monkeypatch.setattr(process, "import_module", import_it)
    before = children(os.getpid())
    try:
        opened = process.open_unit(boot, told.append)
        try:
            (started,) = [set(found) - set(before) for found in at_import]
            assert len(started) == 1
            # The same process is the rank that took part in the warm-up.
            assert set(children(os.getpid())) - set(before) == started
            assert told[-1].stage == "warm-up"
        finally:
            opened.executor.close()
    finally:
        os.sched_setaffinity(0, cores)
    assert children(os.getpid()) == before


@two_cores
def test_a_rank_that_ended_is_noticed_while_the_first_one_reads(tmp_path: Path) -> None:
    """Not only once rank 0 has read everything and waits for the others."""
    cores = os.sched_getaffinity(0)
    ranks = RankProcesses(Mesh(gpus=(0, 1)), num_lanes=1)
    try:
        ranks.check()
        told: list[str] = []

        def tell(loading: Loading) -> None:
            if not told:
                ranks.piped[1].process.kill()
                ranks.piped[1].process.wait()
            told.append(loading.model)

        config = real_config(tmp_path, {"cut": ["a", "b"]})
        unit = msgspec.structs.replace(config.units[0], mesh=Mesh(gpus=(0, 1)))
        boot = UnitBoot(unit=unit, models=config.models, endpoint="", identity="cut#1")
        with pytest.raises(MuxrtError, match=r"rank 1 \(process \d+\) ended with status -9"):
            load_unit(boot, tell, ranks)
        assert set(told) == {"a"}, "it went on reading"
    finally:
        os.sched_setaffinity(0, cores)
        ranks.close()


def test_a_rank_whose_exchange_failed_says_so_and_stays() -> None:
    """Its watch may have to end rank 0, which stands still; were it gone, nobody would."""
    child, given = RankChild.__new__(RankChild), list[Result]()
    child._give = given.append
    child._complain(RankLost("[0] did not come within 2 s"))
    assert [result.error for result in given] == ["[0] did not come within 2 s"]


def test_who_loads_may_stand_still_for_longer() -> None:
    """Of four ranks: 1 serves, 2 loads, 3 has not begun to beat."""
    mesh = Mesh(gpus=(0, 1, 2, 3), timeout_s=5.0, load_timeout_s=30.0)
    fd = os.memfd_create("beats")
    os.ftruncate(fd, BEATS_BYTES)
    beats, silent = Beats(fd, 4), list[int]()
    watch = Watch(beats, 0, (1, 2, 3), mesh, lambda rank, seconds: silent.append(rank))
    try:
        assert beats.allowed_ns(0) == 30e9
        watch.loaded()
        assert beats.allowed_ns(0) == 5e9
        now_ns = monotonic_ns()
        beats.allow(1, round(5e9))
        beats.allow(2, round(30e9))
        for rank in (1, 2):
            beats.beat(rank, now_ns)
        expected = {4: [], 6: [1], 29: [1], 31: [1, 2, 3]}
        for seconds, ranks in expected.items():
            watch._look(now_ns + round(seconds * 1e9), since_ns=now_ns)
            assert silent == ranks  # each is told of once
    finally:
        watch.close()
        os.close(fd)
