"""What a model is: the shape read from a Hugging Face `config.json`.

The four families differ in a few facts only; where a key is missing, the default is the one of
the family's own class in `transformers`, because that is what the publisher tested with.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from muxrt.errors import ConfigError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
RopeKind = Literal["linear", "llama3", "yarn"]

ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MAX_POSITIONS: dict[Family, int] = {
    "llama": 2048,
    "mistral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
}
DTYPES = ("float32", "bfloat16", "float16")
NUMBER = "a number > 0"
# What the attention kernels take: rows of a plane by fours, a kv head's queries in one tile.
HEAD_DIM_STEP, MAX_GROUP = 4, 64
MISTRAL_WINDOW = 4096  # what an absent `sliding_window` means to transformers
ROPE_KEYS: dict[RopeKind, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
}
ROPE_OPTIONAL: dict[RopeKind, tuple[str, ...]] = {
    "linear": (),
    "llama3": (),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings; `kind` is Hugging Face's `rope_type`."""

    kind: RopeKind
    factor: float
    # The rest of the published dict, checked at load; a shape must be a key of dicts.
    parameters: dict[str, Any] = field(hash=False)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only LLaMA-like transformer, from facts (never from its name)."""

    family: Family
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str  # of the published weights: "float32", "bfloat16", "float16"
    eos_token_ids: tuple[int, ...]  # config.json and generation_config.json together
    bos_token_id: int | None


def load_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`, from config.json and (if there) generation_config.json.

    Raises ConfigError (file, key, found, expected) for what is malformed or not supported.
    """
    config = _read(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = _read(generation_file) if generation_file.is_file() else None
    family = _family(config)
    _refuse_unsupported(config, family)
    num_heads = config.count("num_attention_heads")
    rope = _rope(config)
    return ModelShape(
        family=family,
        hidden_size=config.count("hidden_size"),
        num_layers=config.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, family, num_heads),
        head_dim=_head_dim(config, family, num_heads),
        intermediate_size=config.count("intermediate_size"),
        vocab_size=config.count("vocab_size"),
        max_positions=_max_positions(config, family),
        rms_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", config.number("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or _has_attention_bias(config, family),
        output_bias=_has_attention_bias(config, family),
        mlp_bias=family == "llama" and config.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        dtype=_dtype(config),
        eos_token_ids=_eos_token_ids(config, generation),
        bos_token_id=_first_token(config.tokens("bos_token_id")),
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    """A JSON object whose reads are checked; `prefix` leads the key in errors."""

    path: Path
    value: dict[str, Any]
    prefix: str = ""

    def fail(self, key: str, expected: str) -> NoReturn:
        found = repr(self.value[key]) if key in self.value else "nothing"
        raise ConfigError(
            f"{self.path}: {self.prefix}{key}: found {found[:200]}, expected {expected}"
        )

    def get(self, key: str) -> Any:
        return self.value.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        value = default if self.get(key) is None else self.value[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, "an integer > 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = default if self.get(key) is None else self.value[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            self.fail(key, NUMBER)
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, "true or false")
        return bool(value)

    def tokens(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or null."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) or item < 0 for item in ids):
            self.fail(key, "a token id, a list of token ids, or null")
        return tuple(ids)


def _read(path: Path) -> _Keys:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a Hugging Face model folder holds one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return _Keys(path, value)


def _family(config: _Keys) -> Family:
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        config.fail("model_type", f"one of {', '.join(ARCHITECTURES)}")
    # The same model_type serves classifiers and reward models too: their heads are not ours.
    names = config.get("architectures")
    if names is not None and names != [ARCHITECTURES[family]]:
        config.fail("architectures", f"{[ARCHITECTURES[family]]}")
    return cast(Family, family)


def _refuse_unsupported(config: _Keys, family: Family) -> None:
    if config.get("quantization_config") is not None:
        config.fail("quantization_config", "none: quantised checkpoints are not supported")
    if config.get("hidden_act") not in (None, "silu", "swish"):
        config.fail("hidden_act", "'silu'")
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        config.fail("partial_rotary_factor", "1: partial rotary embeddings are not supported")
    _refuse_sliding_window(config, family)


def _refuse_sliding_window(config: _Keys, family: Family) -> None:
    """A window that can never cut anything off is no window."""
    layers = config.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)
    ):
        config.fail("layer_types", "only 'full_attention': sliding windows are not supported")
    if family == "llama" or (family != "mistral" and not config.flag("use_sliding_window")):
        return
    # Qwen applies it from layer `max_window_layers` on; layer_types, where written, says it all.
    window = config.value.get("sliding_window", MISTRAL_WINDOW)
    first = config.get("max_window_layers") if family != "mistral" else 0
    num_layers = config.count("num_hidden_layers")
    if window is None or layers is not None or (isinstance(first, int) and first >= num_layers):
        return
    if not isinstance(window, int) or window < _max_positions(config, family):
        config.fail(
            "sliding_window",
            f"null or at least max_position_embeddings ({_max_positions(config, family)}):"
            " sliding windows are not supported",
        )


def _num_kv_heads(config: _Keys, family: Family, num_heads: int) -> int:
    default = 8 if family == "mistral" and "num_key_value_heads" not in config.value else num_heads
    num_kv_heads = config.count("num_key_value_heads", default)
    if num_heads % num_kv_heads or num_heads > MAX_GROUP * num_kv_heads:
        config.fail(
            "num_key_value_heads",
            f"a divisor of num_attention_heads ({num_heads}), at most {MAX_GROUP} times less",
        )
    return num_kv_heads


def _head_dim(config: _Keys, family: Family, num_heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = config.count("head_dim")
    elif family == "qwen3":
        head_dim = 128
    else:
        head_dim, rest = divmod(config.count("hidden_size"), num_heads)
        if rest:
            config.fail("hidden_size", f"a multiple of num_attention_heads ({num_heads})")
    if head_dim % HEAD_DIM_STEP:
        config.fail("head_dim", f"a multiple of {HEAD_DIM_STEP} (it is {head_dim})")
    return head_dim


def _has_attention_bias(config: _Keys, family: Family) -> bool:
    return family in ("llama", "qwen3") and config.flag("attention_bias")


def _max_positions(config: _Keys, family: Family) -> int:
    """Positions the model was trained for: what admission holds requests to."""
    return config.count("max_position_embeddings", MAX_POSITIONS[family])


def _dtype(config: _Keys) -> str:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(key)
    if dtype is None:
        return "float32"  # what transformers assumed when nobody wrote it
    if dtype not in DTYPES:
        config.fail(key, f"one of {', '.join(DTYPES)}")
    return cast(str, dtype)


def _rope(config: _Keys) -> _Keys:
    """`rope_parameters` (transformers 5) or `rope_scaling` (before), with its default `{}`."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    value = config.get(key)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        config.fail(key, "an object or null")
    return _Keys(config.path, value, f"{key}.")


def _rope_scaling(rope: _Keys) -> RopeScaling | None:
    key = "rope_type" if "rope_type" in rope.value or "type" not in rope.value else "type"
    kind = rope.get(key) or "default"
    if kind == "default":
        # transformers 5 nests one object per layer type where layers differ: not ours.
        if any(isinstance(value, dict) for value in rope.value.values()):
            raise ConfigError(
                f"{rope.path}: {rope.prefix[:-1]}: found one object per layer type, expected the"
                " parameters themselves: layers that differ are not supported"
            )
        return None
    if kind not in ROPE_KEYS:
        rope.fail(key, f"one of default, {', '.join(ROPE_KEYS)}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        rope.fail("partial_rotary_factor", "1: partial rotary embeddings are not supported")
    return RopeScaling(kind, rope.number("factor"), _rope_extras(rope, kind))


def _rope_extras(rope: _Keys, kind: RopeKind) -> dict[str, Any]:
    extras: dict[str, Any] = {key: rope.number(key) for key in ROPE_KEYS[kind]}
    extras |= {key: rope.number(key) for key in ROPE_OPTIONAL[kind] if rope.get(key) is not None}
    if kind == "yarn" and "truncate" in rope.value:
        extras["truncate"] = rope.flag("truncate")
    if kind == "llama3" and extras["high_freq_factor"] <= extras["low_freq_factor"]:
        rope.fail("high_freq_factor", f"more than low_freq_factor ({extras['low_freq_factor']})")
    return extras


def _eos_token_ids(config: _Keys, generation: _Keys | None) -> tuple[int, ...]:
    ids = config.tokens("eos_token_id")
    if generation is not None:
        ids += generation.tokens("eos_token_id")
    return tuple(dict.fromkeys(ids))  # without twins, in the order written


def _first_token(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
