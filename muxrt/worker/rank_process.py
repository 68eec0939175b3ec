"""The process of a rank other than the first, as rank 0 starts it (worker/rank_processes.py).

`python -m muxrt.worker.rank_process ORDERS_FD RESULTS_FD MEMORY_FD RANK MESH PARENT_PID`: it beats,
and watches rank 0, before it imports what takes long.
"""

import ctypes
import logging
import os
import signal
import sys
from functools import partial
from importlib import import_module
from typing import NoReturn

import msgspec

from muxrt.config.placement import Mesh
from muxrt.worker.watch import Beats, Watch

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    memory, rank = (int(argument) for argument in sys.argv[3:5])
    mesh = msgspec.json.decode(sys.argv[5], type=Mesh)
    parent = int(sys.argv[6])
    _die_with_parent()
    if os.getppid() != parent:
        os._exit(0)  # it ended before the kernel knew whom this process goes with
    watch = Watch(Beats(memory, mesh.tp), rank, (0,), mesh, partial(_end_unit, parent))
    import_module("muxrt.worker.rank").run(watch)


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, though it were stopped then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_unit(parent: int, rank: int, seconds: float) -> NoReturn:
    """Rank 0 stands still: its supervisor starts the unit again once it is gone."""
    log.error("event=unit_silent rank=%d pid=%d seconds=%.1f", rank, parent, seconds)
    if os.getppid() == parent:  # it is still itself, and not a stranger by its number
        os.kill(parent, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
