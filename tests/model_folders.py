"""Model folders as far as `muxrt serve --check` reads them: no weights."""

import json
from pathlib import Path

SERVE_FILE = """\
models:
  - {name: small, path: small}
  - {name: large, path: large, rate_rps: 3}
units:
  - name: main
    memory: {kv_bytes: 24MiB}
    models: [{name: small}, {name: large}]
"""


def two_models(folder: Path) -> None:
    """The folders `small` and `large` of SERVE_FILE, of different shapes."""
    _model(folder / "small", layers=2, heads=3, kv_heads=3, head_dim=64)
    _model(folder / "large", layers=4, heads=2, kv_heads=1, head_dim=128)


def _model(folder: Path, *, layers: int, heads: int, kv_heads: int, head_dim: int) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 1000,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "bos_token_id": 1,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
