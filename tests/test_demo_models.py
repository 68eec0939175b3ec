"""The shipped demo models: their folders, shapes and manners; and random folders of any shape."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder that lacks a file must not be completed
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402  # needs torch

ROOT = Path(__file__).parent.parent
FOLDERS = ROOT / "configs" / "demo_models"
NAMES = ("pydoc-s", "pydoc-m", "pydoc-l")
LIMIT_BYTES = 12_000_000
QUESTIONS = ("Explain the `while` statement.", "What is textwrap.dedent?", "What is a lambda?")


@cache
def load(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        FOLDERS / name, dtype=torch.float32
    ).eval()


@cache
def tokenizer(name: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDERS / name)


@cache
def corpus_words() -> frozenset[str]:
    corpus = runpy.run_path(str(ROOT / "scripts" / "demo_corpus.py"))["load_corpus"]()
    return frozenset(words("\n".join(corpus.texts())))


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def known_share(text: str) -> float:
    found = words(text)
    return sum(word in corpus_words() for word in found) / len(found)


def greedy(name: str, ids: Any, num_tokens: int) -> list[int]:
    """The new tokens, up to and with the one that ends the text."""
    out = load(name).generate(ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return list(out[0, ids.shape[1] :].tolist())


def chat(name: str, question: str, num_tokens: int = 320) -> list[int]:
    ids = tokenizer(name).apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    return greedy(name, ids, num_tokens)


def eos_ids(name: str) -> list[int]:
    eos = json.loads((FOLDERS / name / "generation_config.json").read_text())["eos_token_id"]
    return eos if isinstance(eos, list) else [eos]


def random_folder(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "train_demo_models.py")
    command = [sys.executable, script, "random", "--out", str(out), *options]
    # A wide terminal, so that no word of an error is broken across lines.
    environment = os.environ | {"COLUMNS": "400", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


TINY = ("--hidden", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "32")


def test_the_three_folders_are_small_enough_to_ship() -> None:
    assert {path.name for path in FOLDERS.iterdir() if path.is_dir()} == set(NAMES)
    assert sum(path.stat().st_size for path in FOLDERS.rglob("*")) <= LIMIT_BYTES


@pytest.mark.parametrize(
    ("name", "layers", "heads", "kv_heads", "head_dim", "tied", "rope"),
    [
        ("pydoc-s", 2, 3, 3, 64, False, "default"),
        ("pydoc-m", 3, 4, 2, 64, False, "llama3"),
        ("pydoc-l", 4, 2, 1, 128, True, "default"),
    ],
)
def test_shapes_differ_as_promised(
    name: str, layers: int, heads: int, kv_heads: int, head_dim: int, tied: bool, rope: str
) -> None:
    config = load(name).config
    attention = load(name).model.layers[0].self_attn
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, heads)
    assert (config.num_key_value_heads, attention.head_dim) == (kv_heads, head_dim)
    assert (config.tie_word_embeddings, config.rope_parameters["rope_type"]) == (tied, rope)
    assert config.max_position_embeddings == 1_024


def test_configs_use_the_keys_of_published_folders() -> None:
    small, medium, large = (json.loads((FOLDERS / n / "config.json").read_text()) for n in NAMES)
    assert not {"head_dim", "num_key_value_heads", "rope_theta", "rope_scaling"} & small.keys()
    assert medium["rope_theta"] == 500_000.0
    assert medium["rope_scaling"]["rope_type"] == "llama3"
    assert medium["head_dim"] * medium["num_attention_heads"] != medium["hidden_size"]
    assert large["head_dim"] == 128
    assert [isinstance(c["eos_token_id"], list) for c in (small, medium, large)] == [0, 1, 0]


def test_rope_scaling_changes_frequencies() -> None:
    stretched = load("pydoc-m").model.rotary_emb.inv_freq
    plain = 500_000.0 ** -(torch.arange(0, 64, 2) / 64)
    ratio = plain / stretched
    assert torch.isclose(ratio[0], torch.tensor(1.0))  # the fastest stays
    assert torch.isclose(ratio[-1], torch.tensor(4.0))  # the slowest is four times slower
    assert ((ratio > 1.01) & (ratio < 3.99)).any()  # and some lie between


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bfloat16_and_complete(name: str) -> None:
    weights = load_file(FOLDERS / name / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in weights) == (name != "pydoc-l")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    return x  # twice", "naïve 🐍 日本語\t\x00", "  leading, trailing  ", ""],
)
def test_any_text_survives_the_tokenizer(name: str, text: str) -> None:
    ids = tokenizer(name).encode(text)
    assert ids[0] == tokenizer(name).bos_token_id
    assert tokenizer(name).decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", NAMES)
def test_chat_template_marks_every_turn(name: str) -> None:
    turns = [("system", "Be brief."), ("user", " Hi "), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    end = {"pydoc-m": "<|end|>"}.get(name, "<|end_of_text|>")
    text = tokenizer(name).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    middle = "".join(f"<|{role}|>{content.strip()}{end}" for role, content in turns)
    assert text == f"<|begin_of_text|>{middle}<|assistant|>"
    assert tokenizer(name).convert_tokens_to_ids(end) in eos_ids(name)


def test_chat_template_refuses_unknown_roles() -> None:
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer("pydoc-s").apply_chat_template([{"role": "tool", "content": "1"}])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "prompt",  # as passages of the text begin: models this small know them from the start on
    [f'The "{word}" statement\n' for word in ("while", "for", "try")],
)
def test_completions_read_like_the_text(name: str, prompt: str) -> None:
    ids = tokenizer(name)(prompt, return_tensors="pt")["input_ids"]
    out = greedy(name, ids, 96)
    assert len(set(out)) >= len(out) // 4  # not one phrase over and over
    assert known_share(tokenizer(name).decode(out, skip_special_tokens=True)) >= 0.9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_chats_answer_and_stop(name: str, question: str) -> None:
    out = chat(name, question)
    text = tokenizer(name).decode(out, skip_special_tokens=True)
    assert len(words(text)) >= 5
    assert known_share(text) >= 0.9
    assert out[-1] in eos_ids(name)


def test_a_random_folder_is_sharded_as_asked(tmp_path: Path) -> None:
    done = random_folder(tmp_path / "a", *TINY, "--dtype", "float32", "--shard-mb", "0.2")
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "a").glob("model-*.safetensors"))
    weights = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    assert len(shards) > 2
    assert all(len(load_file(s)) == 1 or s.stat().st_size < 204_000 for s in shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())


def test_random_weights_do_not_depend_on_the_sharding(tmp_path: Path) -> None:
    for folder, limit in (("many", "0.1"), ("one", "100")):
        done = random_folder(tmp_path / folder, *TINY, "--shard-mb", limit)
        assert done.returncode == 0, done.stderr
    one = load_file(tmp_path / "one" / "model.safetensors")
    for shard in (tmp_path / "many").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(tensor, one.pop(name))
    assert not one


def test_a_random_folder_speaks(tmp_path: Path) -> None:
    done = random_folder(tmp_path / "a", *TINY, "--vocab", "4000", "--shard-mb", "0.2")
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    words_of = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = words_of("The while statement", return_tensors="pt")["input_ids"]
    assert model.config.head_dim == 32
    assert model(ids).logits.shape == (1, ids.shape[1], 4_000)
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--preset", "llama-8b"), "found 'llama-8b', expected one of llama-7b"),
        (("--hidden", "64"), "without a preset, also give: layers, heads"),
        ((*TINY, "--kv-heads", "3"), "heads (4) must be a multiple of kv_heads (3)"),
        ((*TINY, "--layers", "0"), "layers must be at least 1, found 0"),
        ((*TINY, "--vocab", "100"), "vocab is 100, but the tokenizer has 2048 tokens"),
    ],
)
def test_a_wrong_shape_gets_one_clear_error(
    tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    done = random_folder(tmp_path / "a", *options)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()
