"""Folders that cannot be loaded: one clear error each, and nothing is unpickled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from world_models import publish

from muxrt.errors import ConfigError
from muxrt.models.llama import Llama

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish(tmp_path, "llama")
    return tmp_path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    publish(tmp_path, "llama", max_shard_size="100KB")
    return tmp_path


def load(folder: Path) -> Llama:
    return Llama.load(folder, "auto")


def fails(folder: Path, *facts: str) -> None:
    """Loading raises one line that holds all of `facts`."""
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = caught.value.message
    assert "\n" not in message
    assert [fact for fact in facts if fact not in message] == [], message


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / FILE)
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / FILE)


def rewrite_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, "model.layers.1.mlp.up_proj.weight", None)
    fails(folder, FILE, "model.layers.1.mlp.up_proj.weight", "found nothing")


def test_a_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder, "model.layers.2.self_attn.k_proj.weight", torch.zeros(16, 64))
    fails(folder, "layers.2.self_attn.k_proj.weight", "found shape [16, 64]", "expected [32, 64]")


def test_integers_are_not_weights(folder: Path) -> None:
    rewrite(folder, "lm_head.weight", torch.zeros(211, 64, dtype=torch.int8))
    fails(folder, "lm_head.weight", "torch.int8", "expected floating point")


def test_extra_tensors_are_ignored(folder: Path) -> None:
    """Old checkpoints carry `rotary_emb.inv_freq`."""
    tensors = load_file(folder / FILE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / FILE)
    load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 5000, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:keep])
    fails(folder, FILE, "damaged", "bytes")


def test_no_weights(folder: Path) -> None:
    (folder / FILE).unlink()
    fails(folder, FILE, "no such file", INDEX)


def test_pickled_weights_are_refused_and_not_opened(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    fails(folder, "pytorch_model.bin", "expected safetensors", "not read")


def test_a_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00006.safetensors").unlink()
    fails(shards, "model-00002-of-00006.safetensors", "no such file")


def test_a_tensor_that_is_not_in_its_shard(shards: Path) -> None:
    rewrite_index(shards, **{"model.norm.weight": "model-00001-of-00006.safetensors"})
    fails(shards, "model-00001-of-00006.safetensors", "model.norm.weight", "found nothing")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", 3, "x.bin"])
def test_an_index_may_not_lead_elsewhere(shards: Path, name: object) -> None:
    rewrite_index(shards, **{"model.norm.weight": name})
    fails(shards, INDEX, "weight_map")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "{"])
def test_a_malformed_index(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    fails(shards, INDEX, "weight_map")


def test_progress_ends_at_all_bytes(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = Llama.load(folder, "auto", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (model.weight_bytes, model.weight_bytes)


@pytest.mark.parametrize(
    ("published", "asked", "held"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_dtypes(folder: Path, published: torch.dtype, asked: str, held: torch.dtype) -> None:
    tensors = {name: tensor.to(published) for name, tensor in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(published).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    model = Llama.load(folder, asked)  # type: ignore[arg-type]
    assert model.dtype == held
    want = tensors["model.embed_tokens.weight"].to(held)
    assert torch.equal(model.state()["embedding"], want)
