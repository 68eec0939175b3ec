"""Our forward pass against transformers, by teacher forcing through the paged cache."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from world_models import BASE, PagedRunner, make_kv, publish

from muxrt.kernels import Team
from muxrt.models.llama import Llama

VOCAB = int(BASE["vocab_size"])
TOLERANCE = 1e-4

ROPE = {"rope_theta": 10000.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = ROPE | {"rope_type": "linear", "factor": 4.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 1: as many kv heads": ("llama", {"num_key_value_heads": 4}),
    "llama 2": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "num_attention_heads": 8}),
    "llama, all biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, own head_dim": ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, other theta": ("llama", {"rope_parameters": {"rope_theta": 5e5}}),
    "mistral": ("mistral", {"sliding_window": None, "num_attention_heads": 8}),
    "mistral, a window that never cuts": ("mistral", {"sliding_window": 512}),
    "qwen 2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen 2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen 3": ("qwen3", {"head_dim": 32}),
    "qwen 3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen 3, yarn without rounding": (
        "qwen3",
        {"head_dim": 32, "rope_parameters": YARN | {"truncate": False, "beta_fast": 16.0}},
    ),
    "qwen 3, yarn with a given magnitude": (
        "qwen3",
        {"head_dim": 32, "rope_parameters": YARN | {"attention_factor": 1.5}},
    ),
    "llama, yarn with mscale": (
        "llama",
        {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The models are tiny: torch's own threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' model, ours) of the same sharded folder."""
    family, settings = request.param
    folder = tmp_path_factory.mktemp("model")
    theirs = publish(folder, family, max_shard_size="100KB", **settings)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return theirs, load(folder)


def load(folder: Path) -> Llama:
    return Llama.load(folder, "auto")


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, VOCAB, (num_tokens,), generator=generator).tolist()
    return ids


def reference(theirs: Any, ids: list[int]) -> Tensor:
    """Logits of all positions, [tokens, vocab]."""
    with torch.no_grad():
        logits: Tensor = theirs(torch.tensor([ids])).logits[0]
    return logits


def check(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_whole_prompt(pair: Any) -> None:
    theirs, ours = pair
    ids = prompt(301)
    (got,) = PagedRunner(ours, make_kv(ours.shape)).step([(1, ids)])
    check(got, reference(theirs, ids))


def test_a_prompt_in_chunks_then_token_by_token(pair: Any) -> None:
    theirs, ours = pair
    ids = prompt(150, seed=1)
    runner = PagedRunner(ours, make_kv(ours.shape, planes_per_block=1))
    chunks = [ids[:7], ids[7:64], ids[64:130], *([token] for token in ids[130:])]
    got = torch.cat([runner.step([(2, chunk)])[0] for chunk in chunks])
    check(got, reference(theirs, ids))


def test_ragged_batches_of_prefills_and_decodes(pair: Any) -> None:
    theirs, ours = pair
    runner = PagedRunner(ours, make_kv(ours.shape, block_tokens=32), Team(size=2))
    prompts = {slot: prompt(40 + 17 * slot, seed=slot) for slot in range(4)}
    plan = [
        {0: 30, 3: 50},
        {0: 1, 1: 57, 3: 1},
        {2: 20, 0: 1, 1: 0, 3: 40},
        {2: 54, 3: 0, 0: 8},
    ]
    got: dict[int, list[Tensor]] = {slot: [] for slot in prompts}
    for step in plan:
        chunks = []
        for slot, count in step.items():
            begin = runner.lengths.get(slot, 0)
            if count:
                chunks.append((slot, prompts[slot][begin : begin + count]))
        for (slot, _), logits in zip(chunks, runner.step(chunks), strict=True):
            got[slot].append(logits)
    runner.team.close()
    assert runner.lengths == {slot: len(ids) for slot, ids in prompts.items()}
    for slot, ids in prompts.items():
        check(torch.cat(got[slot]), reference(theirs, ids))


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, LINEAR, None], ids=str)
def test_config_as_it_was_before_transformers_5(tmp_path: Path, scaling: dict[str, Any]) -> None:
    """`rope_theta` beside `rope_scaling`, with its kind under the legacy key `type`."""
    parameters = (
        ROPE | {"rope_theta": 5e5} | {k: v for k, v in (scaling or {}).items() if k != "rope_theta"}
    )
    theirs = publish(tmp_path, "llama", rope_parameters=parameters)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    old = {k: v for k, v in config.pop("rope_parameters").items() if k != "rope_theta"}
    if old.get("rope_type", "default") != "default":
        old["type"] = old.pop("rope_type")
    config |= {"rope_theta": 5e5, "rope_scaling": old if scaling else None}
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config))
    ours, ids = load(tmp_path), prompt(300)
    (got,) = PagedRunner(ours, make_kv(ours.shape)).step([(0, ids)])
    check(got, reference(theirs, ids))


def test_bfloat16_weights_and_cache_stay_close(tmp_path: Path) -> None:
    theirs = publish(tmp_path, "llama")
    ours = Llama.load(tmp_path, "bfloat16")
    assert ours.dtype == torch.bfloat16
    ids = prompt(120)
    runner = PagedRunner(ours, make_kv(ours.shape, dtype=torch.bfloat16))
    got = torch.cat([runner.step([(0, part)])[0] for part in (ids[:100], ids[100:])])
    want = reference(theirs, ids)
    assert (got - want).abs().mean() < 0.02 * want.abs().mean() + 0.02


def test_a_second_model_over_the_same_weights(tmp_path: Path) -> None:
    """What a lane process does with weights another one loaded: no copy, same results."""
    publish(tmp_path, "qwen2")
    first = load(tmp_path)
    second = Llama.from_state(first.shape, first.state())
    assert second.weight_bytes == first.weight_bytes
    pointers = [{t.data_ptr() for t in model.state().values()} for model in (first, second)]
    assert pointers[0] == pointers[1]
    ids = prompt(20)
    a, b = (PagedRunner(m, make_kv(m.shape)).step([(0, ids)])[0] for m in (first, second))
    assert torch.equal(a, b)
