"""A model's forward pass as a list of stages that a team runs with no Python in between.

The CPU's twin of a captured CUDA graph: recorded once for a largest batch, over buffers that stay
where they are, then run for every batch. Threads draw items of a stage from a counter and go on
when all are done; one that comes late, or loses its core, holds nobody up but with what it drew.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from muxrt.kernels.atomics import call_stage, fetch_add, load, pause, yield_core
from muxrt.kernels.jit import Stage, kernel
from muxrt.kernels.team import Team

Array = Any  # numba's view: a numpy array

ONE, TOKENS, TILES = range(3)  # what the number of items of a stage may grow with
FUNCTION, ARGS, DATA, ITEMS, COUNT, PER, CHUNK, FIELDS = range(8)  # of a stage in the list
SPACING = 8  # counters per cache line: threads must not fight for the same one
SHARES = 2  # a thread draws this part of its share of what is left: large pieces first
PATIENCE = 2000  # looks at a counter before the core is offered to others


@kernel()
def run_stages(
    begin: int, end: int, stages: Array, counts: Array, counters: Array, team_size: int
) -> None:
    """What each thread of a team does, whichever it is; counters are 0 at first."""
    for index in range(len(stages)):
        stage = stages[index]
        items = stage[ITEMS] * ((counts[stage[COUNT]] + stage[PER] - 1) // stage[PER])
        if team_size == 1:
            call_stage(stage[FUNCTION], 0, items, stage[ARGS], stage[DATA])
            continue
        drawn, done = 2 * index * SPACING, (2 * index + 1) * SPACING
        while True:
            left = items - load(counters, drawn)
            chunk = max(stage[CHUNK], left // (team_size * SHARES))
            first = fetch_add(counters, drawn, chunk)
            if first >= items:
                break
            last = min(first + chunk, items)
            call_stage(stage[FUNCTION], first, last, stage[ARGS], stage[DATA])
            fetch_add(counters, done, last - first)
        looks = 0
        while load(counters, done) < items:
            pause()
            looks += 1
            if looks % PATIENCE == 0:
                yield_core()


class Program:
    """Stages in order; `counts[TOKENS]` and the others say how large the batch is."""

    def __init__(self, team: Team) -> None:
        self.counts = np.ones(3, dtype=np.int64)
        self._team = team
        self._stages: list[tuple[int, ...]] = []
        self._table: npt.NDArray[np.int64] | None = None
        self._counters = np.zeros(0, dtype=np.int64)
        self._held: list[Any] = []  # what stages point into

    def add(
        self,
        stage: Stage,
        args: dict[str, Any],
        data: npt.NDArray[Any],
        items: int,
        count: int = ONE,
        chunk: int = 1,
        per: int = 1,
    ) -> None:
        """Append a stage of `items` for every `per` of `counts[count]`, begun ones included.

        They are handed out `chunk` at least at a time.

        An array among `args` becomes its address, and stays alive as long as the program; None
        becomes 0. Raises KeyError for a type of `data` the stage was not compiled for.
        """
        record = np.zeros(1, dtype=stage.record)
        for name, value in args.items():
            record[name] = self._address(value) if _is_array(value) else value or 0
        function = stage.address(data.dtype.name)
        fields = (function, self._address(record), self._address(data), items, count, per, chunk)
        self._stages.append(fields)
        self._table = None

    @property
    def num_stages(self) -> int:
        """Stages so far."""
        return len(self._stages)

    def run(self, first: int = 0, end: int | None = None) -> None:
        """Stages `first` to `end` (None: all from there on), on the whole team."""
        if self._table is None:
            self._table = np.array(self._stages, dtype=np.int64)
            self._counters = np.zeros(2 * len(self._stages) * SPACING, dtype=np.int64)
        size, stages = self._team.size, self._table[first:end]
        if size > 1:
            self._counters.fill(0)
        self._team.run(run_stages, size, stages, self.counts, self._counters, size)

    def _address(self, array: npt.NDArray[Any]) -> int:
        self._held.append(array)
        return int(array.ctypes.data)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)
