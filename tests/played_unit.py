"""A unit's process with the CPU in the place of its first GPU: `python -m tests.played_unit`."""

import torch

from muxrt.worker import load, process, service
from muxrt.worker.collectives import CPU

if __name__ == "__main__":
    torch.set_num_threads(1)
    load.take_gpu = lambda boot: CPU
    service.run(process.open_unit)
