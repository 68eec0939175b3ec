"""The process of a rank other than the first: `python -m muxrt.worker.rank`, started by rank 0."""

import ctypes
import logging
import os
import signal
from contextlib import ExitStack
from typing import NoReturn

import torch

from muxrt.core import Result, SlotOpen, Work
from muxrt.worker.collectives import open_store
from muxrt.worker.kv_storage import Segment
from muxrt.worker.load import load_device_model, load_model, take_device
from muxrt.worker.logs import log_to_stderr
from muxrt.worker.mesh import (
    Models,
    RankSetup,
    memory_bytes,
    open_beats,
    open_lanes,
    open_lines,
)
from muxrt.worker.process_lane import Give, main
from muxrt.worker.watch import Watch

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RankChild:
    """The rank in its own process: its part of each model, and as many lanes as rank 0."""

    def __init__(self, setup: RankSetup, give: Give) -> None:
        self._parent = os.getppid()
        _die_with_parent()
        os.sched_setaffinity(0, setup.cores)
        log_to_stderr(setup.name)
        self._stack = ExitStack()  # what lives as long as the process
        models = _load(setup)
        memory = Segment(memory_bytes(setup.plan), setup.memory)
        store = None if setup.port is None else open_store(setup.port)
        give(Result())  # loaded: rank 0 meets us as soon as all are
        lines = open_lines(setup, memory, store, self._stack)
        self._lanes = open_lanes(setup, models, lines, self._stack, self._end).lanes
        beats, timeout_s = open_beats(memory, setup.shard.size), setup.plan.spec.mesh.timeout_s
        self._watch = Watch(beats, setup.shard.rank, (0,), timeout_s, self._end_unit)

    def launch(self, work: Work) -> None:
        lane = self._lanes[work.lane]
        lane.collect()  # rank 0's results count; ours are dropped
        lane.launch(work)

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Nothing to do: the lanes of a process share what they know of slots."""

    def _end(self, error: Exception) -> NoReturn:
        log.error("event=rank_lost error=%s", error)
        os._exit(1)

    def _end_unit(self, rank: int, seconds: float) -> NoReturn:
        """Rank 0 stands still: its supervisor starts the unit again once it is gone."""
        log.error("event=unit_silent pid=%d seconds=%.1f", self._parent, seconds)
        if os.getppid() == self._parent:  # it is still itself, and not a stranger by its number
            os.kill(self._parent, signal.SIGKILL)
        os._exit(1)


def _load(setup: RankSetup) -> Models:
    """The rank's part of each model."""
    pairs = [(spec, setup.shapes[spec.name]) for spec in setup.models]
    name, tell, shard = setup.name, (lambda _: None), setup.shard
    if setup.device is None:
        return {spec.name: load_model(name, spec, shape, tell, shard) for spec, shape in pairs}
    device = torch.device(setup.device)
    take_device(device)
    return {
        spec.name: load_device_model(name, spec, shape, device, tell, shard)
        for spec, shape in pairs
    }


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, though it were stopped then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(RankSetup, RankChild)
