"""A rank's process whose graphs are played: `python -m tests.played_rank`, started by rank 0."""

import os

import torch

from muxrt.worker import device_mesh, rank_process
from tests.played_graphs import playing

GRAPH_BYTES = "PLAYED_GRAPH_BYTES"  # a variable of its environment

if __name__ == "__main__":
    torch.set_num_threads(1)
    device_mesh.open_steps = playing(int(os.environ[GRAPH_BYTES]))
    rank_process.main()
