"""How many bytes a model takes: weights, KV, activations, runtime."""

from dataclasses import dataclass, replace

from muxrt.config.model import ModelShape

MIB = 1 << 20
MAX_TP = 8  # GPUs of one node


def num_params(shape: ModelShape) -> int:
    """Weights of the whole model; tied embeddings count once."""
    tables = 1 if shape.tied_embeddings else 2
    ends = tables * shape.vocab_size * shape.hidden_size + shape.hidden_size
    return ends + shape.num_layers * (_attention_params(shape) + _mlp_params(shape))


def _attention_params(shape: ModelShape) -> int:
    """One layer's attention and the norm before it."""
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    weights = shape.hidden_size * (2 * q_width + 2 * kv_width)
    biases = shape.qkv_bias * (q_width + 2 * kv_width) + shape.output_bias * shape.hidden_size
    return weights + biases + shape.qk_norm * 2 * shape.head_dim + shape.hidden_size


def _mlp_params(shape: ModelShape) -> int:
    """One layer's gate, up and down projections and the norm before them."""
    weights = 3 * shape.hidden_size * shape.intermediate_size
    biases = shape.mlp_bias * (2 * shape.intermediate_size + shape.hidden_size)
    return weights + biases + shape.hidden_size


@dataclass(frozen=True, slots=True)
class MemoryRules:
    """What an engine takes beside weights and KV, on every GPU of a mesh.

    The defaults: a CUDA context, NCCL buffers and compiled kernels of one process are about 0.8 GB
    in MuxServe's engine (references: hao-ai-lab/MuxServe, muxsched/placement.py adds it per
    process); one process serves all models of a unit here. Activations follow from the shape.
    `headroom` is left for fragmentation.
    """

    dtype_bytes: int = 2
    runtime_bytes: int = 800 * MIB  # per process and GPU
    processes_per_unit: int = 1
    processes_per_model: int = 0
    prefill_tokens: int = 2048  # of one prefill batch
    max_sequences: int = 256
    activation_bytes: int | None = None  # per model, where somebody measured it; None = the shape's
    headroom: float = 0.02  # share of the GPU
    source: str = "shapes; runtime 800 MiB per process as in MuxServe"


# placement.py of hao-ai-lab/MuxServe: two processes of 0.8 GB and 6 GB of activations per model, 98
# %.
MUXSERVE_MEMORY = MemoryRules(
    runtime_bytes=800_000_000,
    processes_per_unit=0,
    processes_per_model=2,
    activation_bytes=6_000_000_000,
    source="MuxServe's planner: 1.6 GB of processes and 6 GB of activations per model and GPU",
)


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What one model takes on each GPU of a mesh."""

    weights: int
    activations: int
    runtime: int
    kv_per_token: int


def model_bytes(shape: ModelShape, tp: int, rules: MemoryRules) -> ModelBytes:
    """Bytes per GPU of a model on `tp` of them; the unit's own processes are not counted."""
    weights = -(-num_params(shape) * rules.dtype_bytes // tp)
    activations = rules.activation_bytes
    if activations is None:
        activations = activation_bytes(shape, tp, rules)
    runtime = rules.processes_per_model * rules.runtime_bytes
    return ModelBytes(weights, activations, runtime, kv_token_bytes(shape, tp, rules.dtype_bytes))


def cut(whole: ModelBytes, shape: ModelShape, tp: int) -> ModelBytes:
    """On each of `tp` devices, of a model that takes `whole` on one; activations stay as large."""
    heads = max(1, -(-shape.num_kv_heads // tp))
    kv_per_token = whole.kv_per_token // shape.num_kv_heads * heads
    return replace(whole, weights=-(-whole.weights // tp), kv_per_token=kv_per_token)


def kv_token_bytes(shape: ModelShape, tp: int, dtype_bytes: int) -> int:
    """K and V of one token on each of `tp` GPUs: of kv heads, at least one each."""
    heads = max(1, -(-shape.num_kv_heads // tp))
    return 2 * shape.num_layers * heads * shape.head_dim * dtype_bytes


def activation_bytes(shape: ModelShape, tp: int, rules: MemoryRules) -> int:
    """The largest set of tensors alive at once in a prefill, and the logits of a full decode.

    Per token: the residual stream twice, and the wider of Q, K, V with the attention's output, and
    gate with up; logits in float32.
    """
    q_width = shape.num_heads * shape.head_dim
    kv_width = shape.num_kv_heads * shape.head_dim
    wide = max(2 * q_width + 2 * kv_width, 2 * shape.intermediate_size) / tp
    per_token = (2 * shape.hidden_size + wide) * rules.dtype_bytes
    logits = rules.max_sequences * shape.vocab_size * 4
    return round(per_token * rules.prefill_tokens) + logits


def allowed_tps(shape: ModelShape, largest: int = MAX_TP) -> tuple[int, ...]:
    """Powers of two that divide the heads and the MLP, and share the kv heads out evenly."""
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= largest]
    return tuple(tp for tp in sizes if _divides(shape, tp))


def _divides(shape: ModelShape, tp: int) -> bool:
    kv_even = shape.num_kv_heads % tp == 0 or tp % shape.num_kv_heads == 0
    return shape.num_heads % tp == 0 and shape.intermediate_size % tp == 0 and kv_even
