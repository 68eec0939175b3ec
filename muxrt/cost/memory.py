"""How many bytes a model's weights take, from its shape alone."""

from muxrt.config.model import ModelShape


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
