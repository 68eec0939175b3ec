"""Decode steps that are captured as CUDA graphs: one per model, batch bucket and share of SMs.

A graph keeps the SMs of the stream it was captured on, whatever stream it is replayed on: hence one
per share. A step runs as it is the first time, which compiles its kernels, and is captured the
second time. A batch is padded to its bucket in either case, so that both launch the same.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

log = logging.getLogger(__name__)

FEWEST_TOKENS = 1024  # of the smallest context bucket
# Sequences from which on buckets are this far apart; below the first they are powers of two.
STEPS = ((8, 8), (64, 16), (256, 32))


class Key(NamedTuple):
    """What a decode step is for."""

    model: str
    share: str
    sequences: int
    tokens: int  # of the longest sequence at most


def batch_bucket(sequences: int) -> int:
    """How many sequences a batch is padded to."""
    apart = next((apart for first, apart in reversed(STEPS) if sequences > first), None)
    if apart is None:
        return 1 << (sequences - 1).bit_length()
    return -(-sequences // apart) * apart


def context_bucket(tokens: int) -> int:
    """The longest sequence that a step is made for, where the longest there is has `tokens`."""
    return max(FEWEST_TOKENS, 1 << (tokens - 1).bit_length())


class Step(Protocol):
    """Work on buffers that stay where they are; done twice is as done once."""

    def run(self) -> None:
        """Launch it on the current stream; nothing is read back."""


class Graph(Protocol):
    """A recording of work on the device."""

    def capture(self, run: Callable[[], None]) -> None:
        """Record what `run` launches on the current stream; nothing of it is done."""

    def replay(self) -> None:
        """Launch all of it on the current stream."""


class CudaGraph:
    """torch's; graphs of one lane share a pool of memory, for one runs after the other."""

    def __init__(self, pool: Any) -> None:
        """`pool`: of `torch.cuda.graph_pool_handle`."""
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, run: Callable[[], None]) -> None:
        # Of this thread alone: what other lanes do meanwhile is allowed.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


class Steps:
    """The decode steps of one lane, used by its thread alone."""

    def __init__(
        self,
        budget_bytes: int,
        new_graph: Callable[[], Graph],
        used_bytes: Callable[[], int],
        agree: Callable[[int], int] = int,
    ) -> None:
        """Graphs may take `budget_bytes`; `used_bytes` tells how much all memory now is.

        `agree` makes one size of those that a graph has on several ranks: a step is an exchange
        between them, so all must capture, drop and run the same ones.
        """
        self._budget_bytes = budget_bytes
        self._new_graph = new_graph
        self._used_bytes = used_bytes
        self._agree = agree
        self._has_run: set[Key] = set()
        self._steps: dict[Key, Step] = {}
        self._graphs: OrderedDict[Key, tuple[Graph, int]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Step]) -> Step:
        """The step of that key, which `make` makes if it is new."""
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = make()
        return step

    def prepare(self, key: Key) -> bool:
        """What must go before a launch and is not to be timed: True if there was something.

        The first time the step runs, to no effect but that its kernels are compiled: it is launched
        again. The second time it is captured.
        """
        step = self._steps[key]
        if key not in self._has_run:
            self._has_run.add(key)
            step.run()
            return True
        if not self._budget_bytes or key in self._graphs:
            return False
        self._capture(key, step)
        return True

    def launch(self, key: Key) -> Graph | None:
        """Launch the step as its buffers say; its graph, to be kept until the device is done."""
        if key not in self._graphs:
            self._steps[key].run()
            return None
        self._graphs.move_to_end(key)
        graph, _ = self._graphs[key]
        graph.replay()
        return graph

    @property
    def num_bytes(self) -> int:
        """What the graphs take."""
        return sum(size for _, size in self._graphs.values())

    def _capture(self, key: Key, step: Step) -> None:
        graph, before = self._new_graph(), self._used_bytes()
        graph.capture(step.run)
        self._graphs[key] = (graph, self._agree(max(0, self._used_bytes() - before)))
        log.info("event=graph_captured key=%s bytes=%d", key, self._graphs[key][1])
        # The newest stays even if it alone is too large: the next one takes its place.
        while self.num_bytes > self._budget_bytes and len(self._graphs) > 1:
            forgotten, _ = self._graphs.popitem(last=False)
            # Its buffers too: as a key that is new, it runs once before it is captured again.
            del self._steps[forgotten]
            self._has_run.discard(forgotten)
            log.info("event=graph_dropped key=%s", forgotten)
