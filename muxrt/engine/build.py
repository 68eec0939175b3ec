"""From a placement to a running brain: the geometry of a unit, its quotas, its scheduler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from muxrt.config.model import ModelShape
from muxrt.config.placement import Mesh, ModelSpec, UnitSpec
from muxrt.core import Sequence
from muxrt.cost.latency import BatchShape, Latency, OnlineLatency, attention_work
from muxrt.cost.memory import num_params
from muxrt.engine.executor import Executor
from muxrt.engine.mover import Mover
from muxrt.engine.unit import Emit, Unit
from muxrt.errors import ConfigError
from muxrt.kvcache.block_pool import BlockPool
from muxrt.kvcache.host_blocks import HostBlocks
from muxrt.kvcache.layout import ArenaLayout, KvShape, plan_arena
from muxrt.sched.memory import Memory, Preempt
from muxrt.sched.policies import POLICIES
from muxrt.sched.queues import ModelQueue, ServedModel
from muxrt.sched.quota import Demand, initial_quotas
from muxrt.sched.residency import Habits, Residency, Resident, Room, State
from muxrt.sched.scheduler import Limits, Scheduler

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}
ONE_DEVICE = ("green", "mps", "stream")  # lanes that are parts of it, not cores of their own
# Until the first copy was measured: memcpy of a two-channel server, read and write.
HOST_COPY_BYTES_PER_S = 4e9


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """What follows from a unit's spec and its models' shapes; no memory is touched yet."""

    spec: UnitSpec
    arena: ArenaLayout
    num_blocks: int
    num_host_blocks: int
    models: dict[str, ServedModel]
    quotas: dict[str, int]
    kv_dtypes: dict[str, str]  # of K and V in the arena, by model
    demands: dict[str, Demand]
    # Where models may sleep; None = all are always awake, and nobody counts their weights.
    habits: dict[str, Habits] | None = None
    weight_bytes: int = 0  # of the models that are awake at the same time
    awake: tuple[str, ...] = ()  # at the start

    @property
    def num_spare_blocks(self) -> int:
        """Blocks at the end of the arena that exist while weights leave room for them."""
        return self.weight_bytes // self.arena.block_bytes

    def entitle(self, awake: frozenset[str]) -> dict[str, int]:
        """The quotas of all models while only these are awake."""
        demands = [demand for name, demand in self.demands.items() if name in awake]
        return dict.fromkeys(self.demands, 0) | initial_quotas(demands, self.num_blocks)

    def kv_tokens(self, model: str) -> int:
        """Tokens that the quota of a model holds."""
        layout = self.models[model].layout
        return self.quotas[model] // layout.blocks_per_group * layout.block_tokens

    @property
    def num_lanes(self) -> int:
        """Lanes for batches; the copy lane comes on top."""
        return self.spec.lanes.count


def weight_dtype(spec: ModelSpec, shape: ModelShape, device: str = "cpu") -> str:
    """The dtype that weights and activations have on the device."""
    if spec.dtype != "auto":
        return spec.dtype
    if device == "cpu" and shape.dtype == "float16":
        return "float32"  # no CPU computes in float16; float32 holds its values exactly
    return shape.dtype


def linear_dtype(spec: ModelSpec, shape: ModelShape, device: str = "cpu") -> str:
    """The dtype of the linear layers' weights."""
    return weight_dtype(spec, shape, device) if spec.weights == "auto" else spec.weights


def weight_bytes(spec: ModelSpec, shape: ModelShape, device: str = "cpu") -> int:
    """What the model's weights take, but for padding and scales."""
    tables = shape.vocab_size * shape.hidden_size
    linear = (num_params(shape) - tables) * DTYPE_BYTES[linear_dtype(spec, shape, device)]
    return linear + tables * DTYPE_BYTES[weight_dtype(spec, shape, device)]


def kv_dtype(spec: ModelSpec, shape: ModelShape, device: str = "cpu") -> str:
    """The dtype of K and V in the arena."""
    return weight_dtype(spec, shape, device) if spec.kv_dtype == "auto" else spec.kv_dtype


def plan_unit(
    spec: UnitSpec,
    models: Mapping[str, ModelSpec],
    shapes: Mapping[str, ModelShape],
    weights: Mapping[str, int] | None = None,
) -> UnitPlan:
    """Lay out a unit's arena and split it into quotas.

    `weights` are the bytes that they take once loaded; None estimates them. Raises ConfigError if
    the models cannot share an arena, or if it cannot hold one sequence of maximum length of each
    that is awake.
    """
    names = [model.name for model in spec.models]
    memory = spec.memory
    kv_shapes = [_kv_shape(spec.mesh, models[name], shapes[name]) for name in names]
    arena = plan_arena(kv_shapes, memory.plane_tokens, memory.planes_per_block)
    served = {name: _served(spec, arena, models[name], shapes[name]) for name in names}
    num_blocks = memory.kv_bytes // arena.block_bytes
    demands = {demand.model: demand for demand in _demands(spec, models, served)}
    host = memory.swap_bytes // arena.block_bytes
    kv_dtypes = {name: kv_dtype(models[name], shapes[name], spec.mesh.device) for name in names}
    plan = UnitPlan(spec, arena, num_blocks, host, served, {}, kv_dtypes, demands)
    if may_sleep(spec, models):
        sizes = weights or {n: weight_bytes(models[n], shapes[n], spec.mesh.device) for n in names}
        plan = _with_sleepers(plan, models, sizes)
    awake = frozenset(plan.awake or names)
    return replace(plan, quotas=plan.entitle(awake))


def may_sleep(spec: UnitSpec, models: Mapping[str, ModelSpec]) -> bool:
    """Models of the unit may be put to sleep."""
    if spec.memory.weight_bytes is not None:
        return True
    return any(models[part.name].idle_timeout_s is not None for part in spec.models)


def _with_sleepers(
    plan: UnitPlan, models: Mapping[str, ModelSpec], sizes: Mapping[str, int]
) -> UnitPlan:
    """The plan with who is awake at the start: the pinned, then as many as fit, in order."""
    specs = [models[part.name] for part in plan.spec.models]
    habits = {
        spec.name: Habits(
            sizes[spec.name],
            plan.models[spec.name].floor_blocks,
            spec.pin,
            spec.idle_timeout_s,
            spec.min_residency_s,
            spec.wake_timeout_s,
        )
        for spec in specs
    }
    budget = plan.spec.memory.weight_bytes
    budget = sum(sizes[spec.name] for spec in specs) if budget is None else budget
    room, held, awake = Room(budget, plan.num_blocks), Room(0, 0), []
    for spec in sorted(specs, key=lambda spec: not spec.pin):
        own = Room(habits[spec.name].num_bytes, habits[spec.name].floor_blocks)
        taken = Room(held.num_bytes + own.num_bytes, held.blocks + own.blocks)
        if room.has(taken):
            held = taken
            awake.append(spec.name)
        elif spec.pin or not room.has(own):
            what = f"{spec.name} and those pinned before it" if spec.pin else spec.name
            raise ConfigError(_too_large(plan, what, taken if spec.pin else own, room))
    return replace(plan, habits=habits, weight_bytes=budget, awake=tuple(awake))


def _too_large(plan: UnitPlan, what: str, needed: Room, room: Room) -> str:
    """Why models can never be awake."""
    if needed.num_bytes > room.num_bytes:
        return (
            f"memory.weight_bytes of unit {plan.spec.name}: found {room.num_bytes}, expected at"
            f" least {needed.num_bytes}, what the weights of {what} take"
        )
    return (
        f"memory.kv_bytes of unit {plan.spec.name}: found {room.blocks} blocks, expected at least"
        f" {needed.blocks}, one sequence of maximum length of {what}"
    )


def _kv_shape(mesh: Mesh, spec: ModelSpec, shape: ModelShape) -> KvShape:
    """Of all ranks of the mesh together, each of which has room for as many kv heads."""
    dtype_bytes = DTYPE_BYTES[kv_dtype(spec, shape, mesh.device)]
    kv_heads = -(-shape.num_kv_heads // mesh.tp) * mesh.tp
    return KvShape(spec.name, shape.num_layers, kv_heads, shape.head_dim, dtype_bytes)


def _served(unit: UnitSpec, arena: ArenaLayout, spec: ModelSpec, shape: ModelShape) -> ServedModel:
    length = spec.max_model_len or shape.max_positions
    if length > shape.max_positions:
        raise ConfigError(
            f"max_model_len of {spec.name} is {length}, but the model has only"
            f" {shape.max_positions} positions"
        )
    max_sequences = unit.scheduling.max_sequences
    is_one_device = unit.lanes.kind in ONE_DEVICE
    layout = arena.models[spec.name]
    return ServedModel(spec.name, layout, length, max_sequences, spec.slo, is_one_device)


def _demands(
    unit: UnitSpec, models: Mapping[str, ModelSpec], served: Mapping[str, ServedModel]
) -> list[Demand]:
    return [
        Demand(
            part.name,
            served[part.name].floor_blocks,
            models[part.name].rate_rps * part.traffic * _blocks_per_token(served[part.name]),
            part.quota,
        )
        for part in unit.models
    ]


def _blocks_per_token(model: ServedModel) -> float:
    return model.layout.blocks_per_group / model.layout.block_tokens


def build_unit(
    plan: UnitPlan,
    executor: Executor,
    now: Callable[[], float],
    emit: Emit,
    latency: Latency | None = None,
) -> Unit:
    """The brain of a unit, ready for requests.

    Raises ConfigError where its policy needs targets that a model does not have.
    """
    knobs = plan.spec.scheduling
    latency = latency or OnlineLatency()
    queues = {name: ModelQueue(model) for name, model in plan.models.items()}
    pool = BlockPool({name: m.layout.blocks_per_group for name, m in plan.models.items()})
    pool.grow(range(plan.num_blocks))
    for name, blocks in plan.quotas.items():
        pool.accounts[name].quota = blocks
    choose = PreemptChooser(plan, latency).choose
    memory = Memory(pool, queues, HostBlocks(plan.num_host_blocks), choose, knobs.borrow)
    policy = POLICIES[knobs.policy](knobs.quota_period_s, plan.models)
    depth, stream_tokens = plan.spec.lanes.depth, knobs.stream_tokens
    limits = Limits(plan.num_lanes, depth, knobs.prefill_tokens, stream_tokens)
    scheduler = Scheduler(queues, memory, policy, latency, limits)
    adapt_period_s = knobs.quota_period_s if knobs.borrow else 0.0
    mover = _make_mover(plan, scheduler, now())
    return Unit(plan.spec.name, scheduler, executor, now, emit, adapt_period_s, mover)


def _make_mover(plan: UnitPlan, scheduler: Scheduler, now: float) -> Mover | None:
    """Who puts models to sleep and wakes them; None where all are always awake."""
    if plan.habits is None:
        return None
    residents = [Resident(name, habits, used_s=now) for name, habits in plan.habits.items()]
    for resident in residents:
        if resident.name in plan.awake:
            resident.state = State.AWAKE
    residency = Residency(residents, Room(plan.weight_bytes, plan.num_blocks))
    return Mover(residency, scheduler, plan.arena.block_bytes, plan.entitle)


class PreemptChooser:
    """Swap or recompute, whichever is predicted to cost less."""

    def __init__(self, plan: UnitPlan, latency: Latency) -> None:
        self._forced = plan.spec.scheduling.preempt
        self._block_bytes = plan.arena.block_bytes
        self._latency = latency

    def choose(self, sequence: Sequence) -> Preempt:
        """How `sequence` should give its blocks back."""
        if self._forced != "auto":
            return Preempt(self._forced)
        tokens = sequence.num_tokens
        recompute_s = self._latency.predict(
            sequence.request.model, BatchShape(tokens, attention_work(0, tokens))
        )
        num_blocks = sum(group.num_blocks for group in sequence.groups)
        swap_s = 2 * num_blocks * self._block_bytes / HOST_COPY_BYTES_PER_S
        if recompute_s is not None and recompute_s < swap_s:
            return Preempt.RECOMPUTE
        return Preempt.SWAP
