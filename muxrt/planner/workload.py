"""What is planned: the demand for each model, a cluster, and what steps and bytes cost on it."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import floor

from muxrt.config.cluster import Cluster, GpuKind, NodeGroup
from muxrt.config.model import ModelShape
from muxrt.config.placement import Slo
from muxrt.cost.memory import MemoryRules, ModelBytes, allowed_tps, cut, model_bytes
from muxrt.cost.model import CostModel
from muxrt.cost.steps import Steps


@dataclass(frozen=True, slots=True)
class Lengths:
    """Moments of a distribution of lengths, tokens."""

    mean: float
    mean_square: float

    @property
    def variance(self) -> float:
        return max(0.0, self.mean_square - self.mean**2)


@dataclass(frozen=True, slots=True)
class Demand:
    """The traffic of one model, and its targets."""

    model: str
    shape: ModelShape
    rate_rps: float
    prompt: Lengths
    output: Lengths
    slo: Slo
    max_tokens: int  # of one sequence: what its memory must at least hold
    # On one device of a CPU, by its own dtypes; None: by the engine's rules.
    held: ModelBytes | None = None

    @property
    def context(self) -> float:
        """Mean KV tokens of a sequence that decodes; long answers are met more often."""
        return self.prompt.mean + self.output.mean_square / (2 * self.output.mean)


@dataclass(frozen=True, slots=True)
class Engine:
    """What the engine costs beside the steps."""

    memory: MemoryRules = field(default_factory=MemoryRules)
    control_s: float = 0.0  # per sequence and decode step
    interference: float = 0.1  # how much slower a step is beside another one: an assumption


# Prefill lanes that are tried, per cent of the SMs; None: in turns on one lane.
PREFILL_PCTS = (None, 30, 50, 70)
CPU_PCTS = (25, 50, 75)  # rounded to whole cores


@dataclass(frozen=True, slots=True)
class Pool:
    """Identical nodes: GPUs are counts, not positions."""

    index: int
    gpu: GpuKind
    gpus_per_node: int
    num_nodes: int
    most_ranks: int = 1  # of a mesh of cores: as many as some model was measured on

    @property
    def num_gpus(self) -> int:
        return self.gpus_per_node * self.num_nodes

    def widest(self, largest_tp: int) -> int:
        """GPUs of the largest mesh."""
        largest = min(self.gpus_per_node, largest_tp)
        return min(largest, self.most_ranks) if self.is_cpu else largest

    @property
    def is_cpu(self) -> bool:
        """Its "GPUs" are sets of cores: lanes are whole cores, and a rank has one set."""
        return self.gpu.device == "cpu"

    @property
    def prefill_pcts(self) -> tuple[int | None, ...]:
        """Prefill lanes worth trying, per cent of the SMs; None: in turns on one lane."""
        if not self.is_cpu:
            return PREFILL_PCTS
        cores = self.gpu.sms
        lanes = sorted({round(cores * pct / 100) for pct in CPU_PCTS} - {0, cores})
        return (None, *(round(100 * lane / cores) for lane in lanes))


class Problem:
    """Everything that a strategy may ask; answers are kept, so asking again is cheap."""

    def __init__(
        self,
        cluster: Cluster,
        demands: list[Demand],
        cost: CostModel,
        engine: Engine | None = None,
        largest_tp: int = 8,
    ) -> None:
        self.cluster = cluster
        self.demands = {demand.model: demand for demand in demands}
        self.cost = cost
        self.engine = engine or Engine()
        self.largest_tp = largest_tp
        self.pools = tuple(self._pool(index, group) for index, group in enumerate(cluster.nodes))
        self._steps: dict[tuple[ModelShape, int, int, float], Steps] = {}
        self._bytes: dict[tuple[str, int], ModelBytes] = {}
        self._tps: dict[tuple[str, int], tuple[int, ...]] = {}
        self._kv_bytes: dict[tuple[int, int, tuple[str, ...]], int] = {}
        self.likes = _likes(self.demands)

    def _pool(self, index: int, group: NodeGroup) -> Pool:
        kind, most_ranks = self.cluster.kind(group.gpu), 1
        if kind.device == "cpu":
            shapes = [demand.shape for demand in self.demands.values()]
            most_ranks = max(max(self.cost.profiled_tps(s, kind), default=1) for s in shapes)
        return Pool(index, kind, group.gpus, group.count, most_ranks)

    @property
    def num_gpus(self) -> int:
        return sum(pool.num_gpus for pool in self.pools)

    def scaled(self, factors: dict[str, float]) -> "Problem":
        """The same problem with rates multiplied, 1 where `factors` says nothing."""
        demands = [
            replace(demand, rate_rps=demand.rate_rps * factors.get(name, 1.0))
            for name, demand in self.demands.items()
        ]
        other = Problem(self.cluster, demands, self.cost, self.engine, self.largest_tp)
        other._steps, other._bytes = self._steps, self._bytes
        return other

    def part(self, cluster: Cluster, models: Collection[str]) -> "Problem":
        """Some of the models, on other nodes of the same kinds."""
        demands = [demand for name, demand in self.demands.items() if name in models]
        other = Problem(cluster, demands, self.cost, self.engine, self.largest_tp)
        other._bytes = self._bytes
        return other

    def steps(self, model: str, pool: int, tp: int, share: float) -> Steps:
        """Step times of a model on `tp` GPUs of a pool at a share of their SMs."""
        shape = self.demands[model].shape
        key = (shape, pool, tp, share)
        if key not in self._steps:
            self._steps[key] = self.cost.steps(shape, tp, self.pools[pool].gpu).at(share)
        return self._steps[key]

    def bytes(self, model: str, tp: int) -> ModelBytes:
        """What a model takes on each of `tp` GPUs."""
        key = (model, tp)
        if key not in self._bytes:
            demand = self.demands[model]
            self._bytes[key] = (
                cut(demand.held, demand.shape, tp)
                if demand.held is not None
                else model_bytes(demand.shape, tp, self.engine.memory)
            )
        return self._bytes[key]

    def tps(self, model: str, pool: int) -> tuple[int, ...]:
        """Degrees that divide the model and fit a node; whether memory suffices is not asked."""
        key = (model, pool)
        if key not in self._tps:
            self._tps[key] = self._find_tps(self.demands[model].shape, self.pools[pool])
        return self._tps[key]

    def _find_tps(self, shape: ModelShape, pool: Pool) -> tuple[int, ...]:
        largest = pool.widest(self.largest_tp)
        if not pool.is_cpu:
            return allowed_tps(shape, largest)
        # What ranks of cores exchange is in no data sheet.
        measured = self.cost.profiled_tps(shape, pool.gpu) or {1}
        return tuple(tp for tp in sorted(measured) if tp <= largest)

    def usable_bytes(self, pool: int) -> int:
        """Bytes of one GPU but for the headroom."""
        return floor(self.pools[pool].gpu.memory_bytes * (1 - self.engine.memory.headroom))

    def kv_bytes(self, pool: int, tp: int, models: tuple[str, ...]) -> int:
        """What is left for KV on each GPU when these models share it; negative: it does not fit."""
        key = (pool, tp, models)
        if key not in self._kv_bytes:
            self._kv_bytes[key] = self._kv_room(pool, tp, models)
        return self._kv_bytes[key]

    def _kv_room(self, pool: int, tp: int, models: tuple[str, ...]) -> int:
        rules = self.engine.memory
        parts = [self.bytes(model, tp) for model in models]
        activations = sorted((part.activations for part in parts), reverse=True)
        if rules.activation_bytes is None:
            activations = activations[:2]  # a prefill and a decode lane: two forward passes at most
        fixed = rules.processes_per_unit * rules.runtime_bytes
        held = sum(part.weights + part.runtime for part in parts) + sum(activations)
        return self.usable_bytes(pool) - fixed - held

    def fits(self, pool: int, tp: int, models: tuple[str, ...]) -> bool:
        """Weights, activations and one longest sequence of each model fit; tp suits them all."""
        if any(tp not in self.tps(model, pool) for model in models):
            return False
        longest = (self.bytes(m, tp).kv_per_token * self.demands[m].max_tokens for m in models)
        return self.kv_bytes(pool, tp, models) >= sum(longest)


def _likes(demands: dict[str, Demand]) -> dict[str, int]:
    """A number per model; those that differ in name and rate only share it."""
    numbers: dict[tuple[object, ...], int] = {}
    found = {}
    for name, d in demands.items():
        key = (d.shape, d.prompt, d.output, d.slo, d.max_tokens, d.held)
        found[name] = numbers.setdefault(key, len(numbers))
    return found
