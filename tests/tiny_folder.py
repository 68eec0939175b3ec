"""Hugging Face folders that a test makes in no time: a small tokenizer, random weights."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, USER = "<|bos|>", "<|eos|>", "<|user|>"
TEXT = (
    "the quick brown fox jumps over the lazy dog; a server serves many models to many people, "
    "and 42 of them ask: how are you? caf\u00e9, na\u00efve, \u4f60\u597d, \U0001f600 \n"
)
VOCAB_SIZE = 320
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('odd role') }}"
    "{% elif m.content == 'boom' %}{{ raise_exception('no explosives') }}{% endif %}"
    "<|user|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """A BPE over bytes, as LLaMA 3 has one; texts start with bos."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, USER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return core


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Pieces with a mark for spaces and 256 byte tokens, as LLaMA 2 has them."""
    words = ["\u2581the", "\u2581quick", "fox", "\u2581", "a", "b", "e", "\u00e9"]
    names = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {name: index for index, name in enumerate(names)}
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    core.add_special_tokens([BOS, EOS])
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    return core


def write_tokenizer(folder: Path, core: tokenizers.Tokenizer, **config: Any) -> None:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": {"content": BOS}, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | config))


def write_model(folder: Path, seed: int = 0, *, has_weights: bool = True) -> Path:
    """A whole folder that `muxrt` serves, or (without weights) that its API process reads."""
    core = byte_level()
    write_tokenizer(folder, core, chat_template=CHAT_TEMPLATE)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": core.token_to_id(BOS),
        "eos_token_id": core.token_to_id(EOS),
    }
    (folder / "config.json").write_text(json.dumps(config | SHAPE))
    if has_weights:
        _write_weights(folder / "model.safetensors", seed)
    return folder


def _write_weights(path: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = hidden // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Any:
        return torch.randn(size, generator=generator) * 0.5

    tensors = {
        "model.embed_tokens.weight": random(VOCAB_SIZE, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": random(*size) for name, size in sizes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden)
    save_file(tensors, path)
