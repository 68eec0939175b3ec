"""What a rank other than the first does in its process (worker/rank_process.py)."""

import logging
import os
from contextlib import ExitStack
from functools import partial
from typing import NoReturn

import torch

from muxrt.core import Result, SlotOpen, Work
from muxrt.worker.collectives import open_store
from muxrt.worker.kv_storage import Segment
from muxrt.worker.load import load_device_model, load_model, take_device
from muxrt.worker.logs import log_to_stderr
from muxrt.worker.mesh import Models, RankSetup, memory_bytes, open_lanes, open_lines
from muxrt.worker.process_lane import Give, main
from muxrt.worker.watch import Watch

log = logging.getLogger(__name__)


class RankChild:
    """The rank in its own process: its part of each model, and as many lanes as rank 0."""

    def __init__(self, setup: RankSetup, give: Give, watch: Watch) -> None:
        os.sched_setaffinity(0, setup.cores)
        log_to_stderr(setup.name)
        self._stack = ExitStack()  # what lives as long as the process
        models = _load(setup)
        memory = Segment(memory_bytes(setup.plan), setup.memory)
        store = None if setup.port is None else open_store(setup.port)
        give(Result())  # loaded: rank 0 meets us as soon as all are
        lines = open_lines(setup, memory, store, self._stack)
        self._lanes = open_lanes(setup, models, lines, self._stack, self._end).lanes
        watch.loaded()

    def launch(self, work: Work) -> None:
        lane = self._lanes[work.lane]
        lane.collect()  # rank 0's results count; ours are dropped
        lane.launch(work)

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Nothing to do: the lanes of a process share what they know of slots."""

    def _end(self, error: Exception) -> NoReturn:
        log.error("event=rank_lost error=%s", error)
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


def run(watch: Watch) -> None:
    """Load what rank 0 says, and run its works."""
    main(RankSetup, partial(RankChild, watch=watch))
