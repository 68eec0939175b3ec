"""The process of a unit: `python -m muxrt.worker.process`, started by the API's supervisor."""

from importlib import import_module

from muxrt.engine.messages import UnitBoot
from muxrt.worker.boot import take_cores, with_split
from muxrt.worker.rank_processes import RankProcesses
from muxrt.worker.service import Opened, Tell, run


def open_unit(boot: UnitBoot, tell: Tell) -> Opened:
    """Start the other ranks of the unit's mesh, if any, then import torch and load.

    Raises MuxrtError with what is wrong.
    """
    ranks = None
    if boot.unit.mesh.tp > 1:
        unit = with_split(boot.unit, len(take_cores(boot.unit)))
        ranks = RankProcesses(unit.mesh, unit.lanes.count)
    opened: Opened = import_module("muxrt.worker.load").load_unit(boot, tell, ranks)
    return opened


if __name__ == "__main__":
    run(open_unit)
