"""Step times of models on meshes as rows of arrays, for estimates that ask a million times."""

import numpy as np

from muxrt.planner.meshes import Mesh
from muxrt.planner.station import BATCHES, Floats, Times
from muxrt.planner.workload import Problem

MAX_SIZES = 16  # of prefills: 1, 2, 4, ... prompts
FIRST_ROWS = 32


class Tables:
    """The tables of a problem, made when asked for. Rates do not matter to them."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rows: dict[tuple[int, Mesh, int | None], int] = {}
        self.times = _empty(FIRST_ROWS)

    def row(self, model: str, mesh: Mesh, prefill_pct: int | None) -> int:
        """The row of `times` of a model on a mesh; `prefill_pct` None means one lane."""
        key = (self._problem.likes[model], mesh, prefill_pct)
        if key not in self._rows:
            if len(self._rows) == len(self.times.facts):
                self.times = _doubled(self.times)
            self._rows[key] = len(self._rows)
            self._fill(self._rows[key], model, mesh, prefill_pct)
        return self._rows[key]

    def _fill(self, row: int, model: str, mesh: Mesh, prefill_pct: int | None) -> None:
        problem, demand = self._problem, self._problem.demands[model]
        engine = problem.engine
        slower = 1.0 if prefill_pct is None else 1 + engine.interference
        share = (prefill_pct or 100) / 100
        rest = 1.0 if prefill_pct is None else 1 - share
        whole = problem.steps(model, *mesh, 1.0)
        decode, context = problem.steps(model, *mesh, rest), demand.context
        is_split_cpu = prefill_pct is not None and problem.pools[mesh[0]].is_cpu
        aside = problem.steps(model, *mesh, share)
        times = self.times
        for column, b in enumerate(BATCHES.tolist()):
            control_s = engine.control_s * b
            if is_split_cpu:  # a lane keeps its cores: the batch is dealt to all lanes
                part = max(min(b, 1.0), b * rest)
                alone_s = (slower if b > 1 else 1.0) * decode.decode_s(part, part * context)
            else:
                alone_s = whole.decode_s(b, b * context)
            times.alone_s[row, column] = alone_s + control_s
            times.beside_s[row, column] = slower * decode.decode_s(b, b * context) + control_s
            times.aside_s[row, column] = slower * aside.decode_s(b, b * context) + control_s
        prefills = self._prefills(model, mesh, share, slower)
        times.prefill[row, : len(prefills)] = prefills
        sequence = problem.bytes(model, mesh[1]).kv_per_token * context
        spread = demand.output.variance / demand.output.mean**2
        times.facts[row] = (
            demand.slo.ttft_s,
            demand.slo.tpot_s,
            demand.output.mean,
            demand.prompt.variance,
            sequence,
            sequence**2 * (1 + spread),
            len(prefills),
        )

    def _prefills(
        self, model: str, mesh: Mesh, share: float, slower: float
    ) -> list[tuple[float, ...]]:
        """Prefills of 1, 2, 4, ... prompts, up to the budget of tokens of one batch."""
        prompt = self._problem.demands[model].prompt
        beside = self._problem.steps(model, *mesh, share)
        is_cpu = self._problem.pools[mesh[0]].is_cpu  # a lane never has more than its cores
        alone = beside if is_cpu else self._problem.steps(model, *mesh, 1.0)
        largest = max(1, int(self._problem.engine.memory.prefill_tokens / prompt.mean))
        sizes = [2**k for k in range(MAX_SIZES - 1) if 2**k < largest] + [largest]
        found: list[tuple[float, ...]] = []
        for size in sizes:
            tokens, squares = size * prompt.mean, size * prompt.mean_square
            alone_s, beside_s = (s.mean_prefill_s(tokens, squares) for s in (alone, beside))
            alone_token_s, beside_token_s = (
                (s.mean_prefill_s(1.25 * tokens, 1.25 * squares) - base_s) / (0.25 * tokens)
                for s, base_s in ((alone, alone_s), (beside, beside_s))
            )
            found.append((size, alone_s, slower * beside_s, alone_token_s, slower * beside_token_s))
        return found


def _empty(rows: int) -> Times:
    def zeros(*shape: int) -> Floats:
        return np.zeros((rows, *shape))

    alone_s, beside_s, aside_s = (zeros(len(BATCHES)) for _ in range(3))
    return Times(zeros(MAX_SIZES, 5), alone_s, beside_s, aside_s, zeros(7))


def _doubled(times: Times) -> Times:
    return Times(*(np.concatenate([array, np.zeros_like(array)]) for array in times))
