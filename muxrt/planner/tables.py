"""Step times of one model on one mesh as tables, for estimates that ask a million times."""

from bisect import bisect_right
from dataclasses import dataclass

from muxrt.planner.meshes import Mesh
from muxrt.planner.workload import Demand, Problem

# Batches at which decodes are looked up, straight lines in between: four per doubling.
BATCHES = (0.0, *(2 ** (k / 4) for k in range(57)))


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    """One prefill of `batch` prompts: alone, and while decodes run beside it."""

    batch: int
    alone_s: float
    beside_s: float
    token_alone_s: float  # what one token more costs
    token_beside_s: float

    def moments(self, beside: float, variance: float) -> tuple[float, float]:
        """Mean and mean square, seconds, when decodes run beside it for that share of the time."""
        mean_s = self.alone_s + beside * (self.beside_s - self.alone_s)
        token_s = self.token_alone_s + beside * (self.token_beside_s - self.token_alone_s)
        return mean_s, mean_s**2 + token_s**2 * self.batch * variance


@dataclass(frozen=True, slots=True)
class Table:
    """One model on one mesh with one choice of lanes."""

    demand: Demand  # of any model that is alike: its rate does not count
    prefills: tuple[PrefillTimes, ...]  # of 1, 2, 4, ... prompts
    alone_s: tuple[float, ...]  # a decode step at BATCHES
    beside_s: tuple[float, ...]  # likewise, while a prefill runs
    sequence_bytes: float  # KV of a sequence that runs, per GPU
    square_bytes: float

    def decode_s(self, batch: float, beside: float) -> float:
        """One step, while a prefill runs beside it for that share of the time."""
        after = bisect_right(BATCHES, batch)
        if after == len(BATCHES):
            after -= 1  # beyond the table: on with the slope of its end
        low = after - 1
        weight = (batch - BATCHES[low]) / (BATCHES[after] - BATCHES[low])
        alone = self.alone_s
        alone_s = alone[low] + weight * (alone[after] - alone[low])
        if not beside:
            return alone_s
        shared = self.beside_s
        return alone_s + beside * (shared[low] + weight * (shared[after] - shared[low]) - alone_s)


class Tables:
    """The tables of a problem, made when asked for. Rates do not matter to them."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._kept: dict[tuple[int, Mesh, int | None], Table] = {}

    def of(self, model: str, mesh: Mesh, prefill_pct: int | None) -> Table:
        """The table of a model on a mesh; `prefill_pct` None means one lane."""
        key = (self._problem.likes[model], mesh, prefill_pct)
        if key not in self._kept:
            self._kept[key] = self._make(model, mesh, prefill_pct)
        return self._kept[key]

    def _make(self, model: str, mesh: Mesh, prefill_pct: int | None) -> Table:
        problem, demand = self._problem, self._problem.demands[model]
        engine = problem.engine
        slower = 1.0 if prefill_pct is None else 1 + engine.interference
        share = (prefill_pct or 100) / 100
        rest = 1.0 if prefill_pct is None else 1 - share
        whole = problem.steps(model, *mesh, 1.0)
        decode, context = problem.steps(model, *mesh, rest), demand.context
        sequence = problem.bytes(model, mesh[1]).kv_per_token * context
        spread = demand.output.variance / demand.output.mean**2
        return Table(
            demand,
            self._prefills(model, mesh, share, slower),
            tuple(whole.decode_s(b, b * context) + engine.control_s * b for b in BATCHES),
            tuple(slower * decode.decode_s(b, b * context) + engine.control_s * b for b in BATCHES),
            sequence,
            sequence**2 * (1 + spread),
        )

    def _prefills(
        self, model: str, mesh: Mesh, share: float, slower: float
    ) -> tuple[PrefillTimes, ...]:
        prompt = self._problem.demands[model].prompt
        alone = self._problem.steps(model, *mesh, 1.0)
        beside = self._problem.steps(model, *mesh, share)
        largest = max(1, int(self._problem.engine.memory.prefill_tokens / prompt.mean))
        sizes = [2**k for k in range(largest.bit_length()) if 2**k < largest] + [largest]
        found = []
        for size in sizes:
            tokens, squares = size * prompt.mean, size * prompt.mean_square
            alone_s, beside_s = (s.prefill_s(tokens, squares) for s in (alone, beside))
            more = (s.prefill_s(1.25 * tokens, 1.25 * squares) for s in (alone, beside))
            alone_token_s, beside_token_s = (
                (longer_s - base_s) / (0.25 * tokens)
                for longer_s, base_s in zip(more, (alone_s, beside_s), strict=True)
            )
            found.append(
                PrefillTimes(
                    size, alone_s, slower * beside_s, alone_token_s, slower * beside_token_s
                )
            )
        return tuple(found)
