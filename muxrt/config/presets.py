"""Shapes of models without their folder: published ones by name, others by their sizes."""

from difflib import get_close_matches
from pathlib import Path

from muxrt.config.document import Key, KeyedError
from muxrt.config.model import Family, ModelShape, load_shape
from muxrt.config.placement import ModelSpec, Sizes
from muxrt.errors import ConfigError


def shape_of_sizes(sizes: Sizes, family: Family = "llama") -> ModelShape:
    """A model of these sizes, with the family's usual rest."""
    return ModelShape(
        family=family,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads or sizes.num_heads,
        head_dim=sizes.head_dim or sizes.hidden_size // sizes.num_heads,
        intermediate_size=sizes.intermediate_size,
        vocab_size=sizes.vocab_size,
        max_positions=sizes.max_positions,
        rms_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied_embeddings=sizes.tied_embeddings,
        qkv_bias=family == "qwen2",
        output_bias=False,
        mlp_bias=False,
        qk_norm=family == "qwen3",
        dtype="float16",
        eos_token_ids=(),
        bos_token_id=None,
    )


def _shape(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    *,
    num_kv_heads: int | None = None,
    vocab_size: int = 32000,
    max_positions: int = 2048,
    family: Family = "llama",
) -> ModelShape:
    sizes = Sizes(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        max_positions=max_positions,
    )
    return shape_of_sizes(sizes, family)


# From each model's config.json. LLaMA 1: arXiv 2302.13971 table 2 (the "30B" of the field has
# 32.5e9 parameters and 52 heads, which 8 does not divide).
PRESETS: dict[str, ModelShape] = {
    "llama-7b": _shape(4096, 32, 32, 11008),
    "llama-13b": _shape(5120, 40, 40, 13824),
    "llama-30b": _shape(6656, 60, 52, 17920),
    "llama-65b": _shape(8192, 80, 64, 22016),
    "llama2-7b": _shape(4096, 32, 32, 11008, max_positions=4096),
    "llama2-13b": _shape(5120, 40, 40, 13824, max_positions=4096),
    "llama2-70b": _shape(8192, 80, 64, 28672, num_kv_heads=8, max_positions=4096),
    "llama3-8b": _shape(4096, 32, 32, 14336, num_kv_heads=8, vocab_size=128256, max_positions=8192),
    "llama3-70b": _shape(
        8192, 80, 64, 28672, num_kv_heads=8, vocab_size=128256, max_positions=8192
    ),
    "mistral-7b": _shape(
        4096, 32, 32, 14336, num_kv_heads=8, max_positions=32768, family="mistral"
    ),
    "qwen2.5-7b": _shape(
        3584, 28, 28, 18944, num_kv_heads=4, vocab_size=152064, max_positions=32768, family="qwen2"
    ),
    "qwen2.5-32b": _shape(
        5120, 64, 40, 27648, num_kv_heads=8, vocab_size=152064, max_positions=32768, family="qwen2"
    ),
}


def preset(name: str) -> ModelShape:
    """The shape called `name`. Raises ConfigError with the known names."""
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"found {name!r}, expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


def model_shape(model: ModelSpec, at: Key) -> ModelShape:
    """The shape of a model, from whichever of path, preset and sizes its spec has.

    Raises `KeyedError` under the key `at` of the spec.
    """
    try:
        if model.preset is not None:
            return preset(model.preset)
        if model.path is not None:
            return load_shape(Path(model.path))
    except ConfigError as error:
        key = "path" if model.preset is None else "preset"
        raise KeyedError((*at, key), error.message) from None
    if model.sizes is None:
        raise KeyedError(at, "found none of path, preset and sizes, expected exactly one of them")
    head_dim = model.sizes.head_dim or model.sizes.hidden_size / model.sizes.num_heads
    if head_dim != int(head_dim):
        raise KeyedError(
            (*at, "sizes", "num_heads"),
            f"found {model.sizes.num_heads}, expected a divisor of hidden_size"
            f" ({model.sizes.hidden_size}), or head_dim beside it",
        )
    return shape_of_sizes(model.sizes)
