"""config.json as it is published, and as it must be refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muxrt.config.model import ModelShape, RopeScaling, load_shape
from muxrt.errors import ConfigError

# The keys that matter of published files.
LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3_1_8B = LLAMA_2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
MISTRAL_7B = LLAMA_2_7B | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
QWEN_2_5 = LLAMA_2_7B | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
}
QWEN_3 = LLAMA_2_7B | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN_2_WINDOW = QWEN_2_5 | {"use_sliding_window": True, "sliding_window": 4096}

SHAPE = ModelShape(
    family="llama",
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=32000,
    max_positions=4096,
    rms_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    dtype="float16",
    eos_token_ids=(2,),
    bos_token_id=1,
)
LLAMA3_SCALING = RopeScaling(
    "llama3",
    8.0,
    {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0},
)


def write(folder: Path, config: object, generation: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA_2_7B, {}),
        (
            LLAMA_3_1_8B,
            {
                "num_kv_heads": 8,
                "intermediate_size": 14336,
                "vocab_size": 128256,
                "max_positions": 131072,
                "rope_theta": 500000.0,
                "rope_scaling": LLAMA3_SCALING,
                "dtype": "bfloat16",
                "eos_token_ids": (128001, 128008, 128009),
                "bos_token_id": 128000,
            },
        ),
        (
            MISTRAL_7B,
            {
                "family": "mistral",
                "num_kv_heads": 8,
                "intermediate_size": 14336,
                "max_positions": 32768,
                "rope_theta": 1e6,
            },
        ),
        (
            QWEN_2_5,
            {
                "family": "qwen2",
                "hidden_size": 896,
                "num_heads": 14,
                "num_kv_heads": 2,
                "num_layers": 24,
                "head_dim": 64,
                "max_positions": 32768,
                "rope_theta": 1e6,
                "tied_embeddings": True,
                "qkv_bias": True,
            },
        ),
        (
            QWEN_3,
            {
                "family": "qwen3",
                "hidden_size": 1024,
                "num_heads": 16,
                "num_kv_heads": 8,
                "qk_norm": True,
            },
        ),
    ],
    ids=["llama 2", "llama 3.1", "mistral", "qwen 2.5", "qwen 3"],
)
def test_published_configs(tmp_path: Path, config: dict[str, Any], changes: dict[str, Any]) -> None:
    assert load_shape(write(tmp_path, config)) == replace(SHAPE, **changes)


def test_the_first_llama_wrote_little(tmp_path: Path) -> None:
    absent = ("num_key_value_heads", "max_position_embeddings", "rope_scaling", "torch_dtype")
    config = {key: value for key, value in LLAMA_2_7B.items() if key not in absent}
    expected = replace(SHAPE, max_positions=2048, dtype="float32")
    assert load_shape(write(tmp_path, config)) == expected


def test_rope_parameters_of_transformers_5(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA_3_1_8B.items() if not key.startswith("rope")}
    config |= {"rope_parameters": LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": 500000.0}}
    shape = load_shape(write(tmp_path, config))
    assert (shape.rope_theta, shape.rope_scaling) == (500000.0, LLAMA3_SCALING)


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], {"eos_token_id": [5, 7]}, (2, 5, 7)),
        (None, {"eos_token_id": 9}, (9,)),
        (None, {}, ()),
        (2, {"temperature": 0.6}, (2,)),
    ],
)
def test_both_files_name_end_tokens(
    tmp_path: Path, eos: object, generation: object, expected: tuple[int, ...]
) -> None:
    write(tmp_path, LLAMA_2_7B | {"eos_token_id": eos}, generation)
    assert load_shape(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    "config",
    [
        QWEN_2_WINDOW | {"sliding_window": 32768},
        QWEN_2_WINDOW | {"max_window_layers": 24},
        QWEN_2_WINDOW | {"layer_types": ["full_attention"] * 24},
        MISTRAL_7B | {"sliding_window": 32768},
    ],
)
def test_a_window_that_never_cuts_is_none(tmp_path: Path, config: dict[str, Any]) -> None:
    load_shape(write(tmp_path, config))


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def scaled(**parameters: object) -> dict[str, Any]:
    return LLAMA_2_7B | {"rope_scaling": parameters}


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        (LLAMA_2_7B | {"model_type": "gpt2"}, "model_type: found 'gpt2'", "one of llama, mistral"),
        (without(LLAMA_2_7B, "model_type"), "model_type: found nothing", "llama"),
        (
            LLAMA_2_7B | {"architectures": ["LlamaForSequenceClassification"]},
            "architectures",
            "LlamaForCausalLM",
        ),
        (without(LLAMA_2_7B, "hidden_size"), "hidden_size: found nothing", "integer > 0"),
        (LLAMA_2_7B | {"num_hidden_layers": "32"}, "num_hidden_layers: found '32'", "integer"),
        (LLAMA_2_7B | {"vocab_size": True}, "vocab_size: found True", "integer"),
        (LLAMA_2_7B | {"rms_norm_eps": -1}, "rms_norm_eps", "a number > 0"),
        (LLAMA_2_7B | {"num_key_value_heads": 5}, "num_key_value_heads: found 5", "divisor of"),
        (LLAMA_2_7B | {"hidden_size": 4098}, "hidden_size: found 4098", "a multiple of"),
        (LLAMA_2_7B | {"head_dim": 63}, "head_dim: found 63", "a multiple of 4"),
        (LLAMA_2_7B | {"tie_word_embeddings": 1}, "tie_word_embeddings: found 1", "true or false"),
        (LLAMA_2_7B | {"eos_token_id": "</s>"}, "eos_token_id", "a token id, a list"),
        (LLAMA_2_7B | {"torch_dtype": "int8"}, "torch_dtype: found 'int8'", "one of float32"),
        (LLAMA_2_7B | {"hidden_act": "gelu"}, "hidden_act: found 'gelu'", "'silu'"),
        (LLAMA_2_7B | {"quantization_config": {"bits": 4}}, "quantization_config", "not supported"),
        (LLAMA_2_7B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "not supported"),
        (MISTRAL_7B | {"sliding_window": 4096}, "sliding_window: found 4096", "at least"),
        (
            without(MISTRAL_7B, "sliding_window"),
            "sliding_window: found nothing",
            "null or at least",
        ),
        (QWEN_2_WINDOW, "sliding_window: found 4096", "not supported"),
        (
            QWEN_2_5 | {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types",
            "'full_attention'",
        ),
        (LLAMA_2_7B | {"rope_scaling": 4.0}, "rope_scaling: found 4.0", "an object or null"),
        (scaled(type="dynamic", factor=2.0), "rope_scaling.type: found 'dynamic'", "one of"),
        (scaled(rope_type="longrope"), "rope_scaling.rope_type: found 'longrope'", "llama3"),
        (scaled(rope_type="linear"), "rope_scaling.factor: found nothing", "a number > 0"),
        (
            LLAMA_3_1_8B
            | {"rope_scaling": without(LLAMA_3_1_8B["rope_scaling"], "low_freq_factor")},
            "rope_scaling.low_freq_factor: found nothing",
            "a number > 0",
        ),
        (
            LLAMA_3_1_8B
            | {"rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"low_freq_factor": 4.0}},
            "rope_scaling.high_freq_factor",
            "more than low_freq_factor",
        ),
        (
            LLAMA_2_7B | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters",
            "layers that differ are not supported",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_clear_error(tmp_path: Path, config: dict[str, Any], key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_shape(write(tmp_path, config))
    message = caught.value.message
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert key in message and expected in message.partition("expected")[2], message


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff"])
def test_a_file_that_is_not_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="config.json"):
        load_shape(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json: no such file"):
        load_shape(tmp_path)


def test_an_error_in_generation_config_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, LLAMA_2_7B, {"eos_token_id": "x"})
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id"):
        load_shape(tmp_path)
