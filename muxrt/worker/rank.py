"""What a rank other than the first does in its process (worker/rank_process.py)."""

import logging
import os
from contextlib import ExitStack
from functools import partial

import torch

from muxrt.core import Result, SlotOpen, Work
from muxrt.engine.messages import Loading
from muxrt.worker.collectives import open_store
from muxrt.worker.host_weights import HostWeights
from muxrt.worker.kv_storage import Segment
from muxrt.worker.load import load_device_model, load_models, load_sleepers, take_device
from muxrt.worker.logs import log_to_stderr
from muxrt.worker.mesh import Models, RankSetup, memory_bytes, open_lanes, open_lines
from muxrt.worker.process_lane import Give, main
from muxrt.worker.watch import Watch

log = logging.getLogger(__name__)


class RankChild:
    """The rank in its own process: its part of each model, and as many lanes as rank 0."""

    def __init__(self, setup: RankSetup, give: Give, watch: Watch) -> None:
        self._give = give
        os.sched_setaffinity(0, setup.cores)
        log_to_stderr(setup.name)
        self._stack = ExitStack()  # what lives as long as the process
        models, sleepers = load_rank(setup)
        memory = Segment(memory_bytes(setup.plan), setup.memory)
        store = None if setup.port is None else open_store(setup.port)
        give(Result())  # loaded: rank 0 meets us as soon as all are
        lines = open_lines(setup, memory, store, self._stack)
        opened = open_lanes(setup, models, lines, self._stack, self._complain, sleepers)
        self._lanes = opened.lanes
        watch.loaded()

    def launch(self, work: Work) -> None:
        lane = self._lanes[work.lane]
        lane.collect()  # rank 0's results count; ours are dropped
        lane.launch(work)

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        """Nothing to do: the lanes of a process share what they know of slots."""

    def _complain(self, error: Exception) -> None:
        """The mesh is broken: rank 0 ends it. We stay: if it stands still, our watch has to."""
        log.error("event=rank_lost error=%s", error)
        self._give(Result(error=str(error)))


def run(watch: Watch) -> None:
    """Load what rank 0 says, and run its works."""
    main(RankSetup, partial(RankChild, watch=watch))


def load_rank(setup: RankSetup) -> tuple[Models, dict[str, HostWeights]]:
    """The rank's part of each model; of those that may sleep, asleep, their weights, too."""
    name, specs, shapes, shard = setup.name, setup.models, setup.shapes, setup.shard
    if setup.device is not None:
        device = torch.device(setup.device)
        take_device(device)
        return {
            spec.name: load_device_model(name, spec, shapes[spec.name], device, _silent, shard)
            for spec in specs
        }, {}
    if setup.plan.habits is not None:
        return load_sleepers(name, specs, shapes, _silent, shard)
    return load_models(name, specs, shapes, _silent, shard), {}


def _silent(loading: Loading) -> None:
    """Rank 0 alone tells how far it is."""
