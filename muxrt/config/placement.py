"""Who lives where: the ONE schema of hand-written YAML, planner, server and simulator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from muxrt.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20

Name = Annotated[str, Meta(min_length=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]
Percent = Annotated[int, Meta(ge=1, le=100)]
Role = Literal["mixed", "prefill", "decode"]


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Targets: time to first token and time per output token after it, seconds."""

    ttft_s: Positive
    tpot_s: Positive


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A transformer by its sizes, for plans without a model folder."""

    hidden_size: Count
    num_layers: Count
    num_heads: Count
    intermediate_size: Count
    num_kv_heads: Count | None = None  # None = num_heads
    head_dim: Count | None = None  # None = hidden_size / num_heads
    vocab_size: Count = 32000
    max_positions: Count = 4096
    tied_embeddings: bool = False


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model that the endpoint serves, or that is planned: exactly one of path, preset, sizes."""

    name: Name
    path: Name | None = None  # Hugging Face folder; relative paths are relative to the YAML
    preset: Name | None = None  # a published shape (config/presets.py); no weights, so for plans
    sizes: Sizes | None = None  # likewise
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights and activations
    kv_dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"  # auto = dtype
    # Of the linear layers; auto = dtype. int8 is made while loading: weight-only, a scale per
    # output feature (docs/decisions.md has its error).
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    max_model_len: Count | None = None  # None = the model's own maximum
    rate_rps: Positive = 1.0  # expected popularity; first quotas go by rate x KV need
    slo: Slo | None = None
    queue_timeout_s: Positive | None = None  # first token by then, or 429; None = wait
    max_queue: Index = 256  # requests waiting for this model; beyond it 429
    # Where weights may leave the device (docs/models-at-run-time.md):
    idle_timeout_s: Positive | None = None  # asleep after so long without a request; None = never
    pin: bool = False  # always awake
    min_residency_s: NotNegative = 5.0  # once awake, so long at least
    wake_timeout_s: Positive = 30.0  # requests wait so long for it to wake, then 503

    def refusing_late(self, slo: Slo | None = None) -> "ModelSpec":
        """Itself with a first token that is late refused, where it says nothing of that itself.

        `slo` goes before its own; without any nobody is late.
        """
        target = slo or self.slo
        if self.queue_timeout_s is not None or target is None:
            return self
        return msgspec.structs.replace(self, queue_timeout_s=target.ttft_s)

    @property
    def folder(self) -> Path:
        """Where its weights are. Raises ConfigError where it has none."""
        if self.path is None:
            raise ConfigError(f"{self.name} has no path: nothing to read weights from")
        return Path(self.path)


class Mesh(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The devices of one unit; on a CPU a set of cores. Tensor parallel over all `gpus`.

    On a CPU `gpus` are as many equal parts of the cores, one for each rank. With `pp` > 1 they are
    so many pipeline stages of equal length, tensor parallel inside each: the first `len(gpus) / pp`
    GPUs are the first stage. That can be planned and simulated only.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    cores: tuple[Index, ...] | None = None  # as taskset numbers them; None = every core allowed
    kind: Name | None = None  # of its GPUs
    node: Index | None = None  # the machine they are in
    gpus: tuple[Index, ...] | None = None  # as that machine numbers them
    pp: Count = 1  # pipeline stages
    nodes: tuple[Index, ...] | None = None  # the machine of each stage, instead of `node`
    # How ranks on cores add up: memory that all have mapped, or torch.distributed's gloo.
    # GPUs exchange by NCCL.
    exchange: Literal["shared", "gloo"] = "shared"
    timeout_s: Positive = 5.0  # a rank that does not move for so long takes the unit down
    load_timeout_s: Positive = 30.0  # likewise, while it imports, reads weights and opens its lanes

    @property
    def tp(self) -> int:
        """Devices that a layer is cut over: the ranks of a tensor-parallel mesh."""
        return max(1, len(self.gpus or ()) // self.pp)


class Lanes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the mesh's compute is shared out."""

    kind: Literal["cores", "processes", "green", "mps", "stream"] = "cores"
    sm_pct: tuple[Percent, ...] | None = None  # of a GPU's SMs: prefill lane, decode lanes
    split: tuple[Count, ...] | None = None  # cores per lane; None = two equal lanes
    depth: Count = 2  # works a lane may have in flight (2 hides the control path behind the device)

    @property
    def count(self) -> int:
        """Lanes for batches; the copy lane comes on top."""
        return len(self.split or self.sm_pct or (1,))


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Explicit byte budgets; nothing is probed."""

    kv_bytes: Count  # of all ranks of the mesh together, as all budgets here
    # Of the weights that are awake at the same time; what they leave of it is K and V's, too.
    # None = all models are always awake, unless one has an idle_timeout_s.
    weight_bytes: Count | None = None
    swap_bytes: Index = 0  # host memory for preempted sequences; 0 = recompute only
    graph_bytes: Index = 2 * GIB  # of a GPU, for CUDA graphs of decode steps; 0 = none
    planes_per_block: Count | None = None  # None = the largest power of two <= 16 wasting <= 1 %
    plane_tokens: Count = 16  # tokens per plane of the model with the widest head row


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the planner expects of a model in a unit; nobody is held to it."""

    rate_rps: NotNegative  # its share of the model's requests
    goodput_rps: NotNegative
    attainment: Annotated[float, Meta(ge=0, le=1)]
    ttft_s: NotNegative  # mean
    tpot_s: NotNegative  # mean


class UnitModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model in a unit."""

    name: Name
    # What the unit does for it: where others do "decode", one that does "prefill" hands every
    # sequence over after its first token.
    role: Role = "mixed"
    quota: Share | None = None  # share of the unit's blocks; None = by rate x KV need
    traffic: Positive = 1.0  # weight among the model's replicas of that role
    sm_pct: tuple[Percent, ...] | None = None  # its own prefill and decode share (MuxServe)
    expected: Expected | None = None


class Scheduling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Knobs of the unit's scheduler."""

    policy: Literal["fcfs", "round-robin", "adbs", "slo"] = "adbs"
    prefill_tokens: Count = 512  # token budget of one prefill batch; longer prompts go in chunks
    # A prompt with so many tokens to compute moves to its decode unit while it is computed, a
    # shorter one afterwards (docs/disaggregation.md, "What a hand-over costs").
    stream_tokens: Count = 256
    max_sequences: Count = 256  # per model: sequences with a slot (running or preempted)
    quota_period_s: NotNegative = 2.0  # 0 = quotas never move
    borrow: bool = True  # false = quotas are walls (spatial partitioning), and they never move
    prefix_reuse: bool = True
    preempt: Literal["auto", "swap", "recompute"] = "auto"


class UnitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A mesh, the models colocated on it, and how they share it."""

    name: Name
    models: tuple[UnitModel, ...]
    memory: Memory
    mesh: Mesh = Mesh()
    lanes: Lanes = Lanes()
    scheduling: Scheduling = Scheduling()
    # How units with roles read each other's K and V: memory that processes of one machine share,
    # NIXL (pip install muxrt[nixl]), which also goes from machine to machine, or torch.distributed
    # where NIXL is missing.
    transfer: Literal["gloo", "nixl", "shared"] = "shared"
    exchanges: bool = False  # it does though it is mixed; `exchanging` says so where it has to

    @property
    def has_roles(self) -> bool:
        """Other units fetch sequences from it, or it from them."""
        return self.exchanges or any(model.role != "mixed" for model in self.models)

    @property
    def lasting(self) -> "UnitSpec":
        """Itself without what moves or may be set while it runs, its models by name.

        What is left differs where a unit has to start anew. Quotas move by themselves, unless
        `quota_period_s` is 0; shares of traffic are the router's; expectations are for people.
        """
        own: dict[str, float | None] = {"traffic": 1.0, "expected": None}
        if self.scheduling.quota_period_s:
            own["quota"] = None
        by_name = sorted(self.models, key=lambda part: (part.name, part.role))
        models = tuple(msgspec.structs.replace(part, **own) for part in by_name)
        return msgspec.structs.replace(self, models=models)


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All units."""

    units: tuple[UnitSpec, ...]


def exchanging(units: Sequence[UnitSpec]) -> tuple[UnitSpec, ...]:
    """`units`, where those that are mixed for a model that others have roles for exchange, too."""
    apart = {part.name for unit in units for part in unit.models if part.role != "mixed"}
    return tuple(
        msgspec.structs.replace(unit, exchanges=True)
        if any(part.name in apart for part in unit.models)
        else unit
        for unit in units
    )
