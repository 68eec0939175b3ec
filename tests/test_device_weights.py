"""Weights and forward pass on a device against the CPU's, for every family that we know."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from muxrt.config.model import load_shape  # noqa: E402
from muxrt.config.placement import Sizes  # noqa: E402
from muxrt.config.presets import shape_of_sizes  # noqa: E402
from muxrt.errors import ConfigError  # noqa: E402
from muxrt.kernels import DeviceMeta  # noqa: E402
from muxrt.models.device_llama import DeviceLlama, DeviceSession, rope_table  # noqa: E402
from muxrt.models.device_weights import (  # noqa: E402
    ALIGNMENT,
    DeviceWeights,
    load_device_weights,
    random_device_weights,
)
from muxrt.models.llama import Llama  # noqa: E402
from tests.test_models_llama import CASES, prompt  # noqa: E402
from tests.test_models_weights import rewrite  # noqa: E402
from tests.world_models import PagedRunner, make_kv, make_meta, publish  # noqa: E402

CPU = torch.device("cpu")
torch.set_num_threads(1)
FAMILIES = ["llama 3", "llama, all biases, tied", "qwen 2", "qwen 3, biases"]
TINY = shape_of_sizes(Sizes(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96))


def made(folder: Path, case: str = "llama 2") -> Path:
    family, settings = CASES[case]
    publish(folder, family, max_shard_size="100KB", **settings)
    return folder


@pytest.mark.parametrize("case", FAMILIES)
def test_hidden_states_are_the_cpu_engine_s(tmp_path: Path, case: str) -> None:
    """A prompt in two chunks beside another one, and decode steps with padding."""
    folder = made(tmp_path, case)
    cores = PagedRunner(Llama.load(folder, "float32"), make_kv(load_shape(folder)))
    llama = DeviceLlama.load(folder, torch.float32, CPU)
    kv = make_kv(llama.shape)
    session = DeviceSession(llama, kv, rope_table(llama.shape, 128, CPU), sm_count=4)
    first, second = prompt(40), prompt(23, seed=1)
    lengths: dict[int, int] = {}
    for chunks in (
        [(1, first[:17]), (3, second[:20])],
        [(1, first[17:37])],
        [(3, second[20:21]), (1, first[37:38])],
        [(1, first[38:39]), (3, second[21:22])],
    ):
        want = torch.cat(cores.step(chunks))
        counts = [len(tokens) for _, tokens in chunks]
        starts = [lengths.get(slot, 0) for slot, _ in chunks]
        lengths |= {slot: lengths.get(slot, 0) + len(new) for slot, new in chunks}
        is_decode = max(counts) == 1
        room = 4 if is_decode else sum(counts)
        meta = padded([slot for slot, _ in chunks], starts, counts, room)
        tokens = torch.full((room,), -1, dtype=torch.int32)
        flat = [token for _, new in chunks for token in new]
        tokens[: len(flat)] = torch.tensor(flat)
        workspace = session.workspace(room, 128) if is_decode else None
        hidden = session.forward(tokens, meta, workspace)[: len(flat)]
        torch.testing.assert_close(session.logits(hidden), want, atol=1e-4, rtol=1e-4)


def padded(slots: list[int], starts: list[int], counts: list[int], room: int) -> DeviceMeta:
    size = DeviceMeta.num_ints(room, room)
    meta = DeviceMeta.over(torch.zeros(size, dtype=torch.int32), room, room)
    meta.fill(make_meta(slots, starts, counts))
    return meta


def test_weights_lie_in_one_piece_aligned_for_matrix_products(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama, all biases, tied")
    seen: list[tuple[int, int]] = []
    shape = load_shape(folder)
    weights = load_device_weights(
        folder, shape, torch.bfloat16, CPU, lambda done, total: seen.append((done, total))
    )
    state = weights.state()
    begin = weights.memory.data_ptr()
    for name, tensor in state.items():
        assert begin <= tensor.data_ptr() < begin + weights.memory.numel()
        assert (tensor.data_ptr() - begin) % ALIGNMENT == 0
        assert tensor.dtype == (torch.float32 if name.endswith("norm") else torch.bfloat16), name
    sizes = [tensor.nbytes for tensor in state.values()]
    assert [done for done, _ in seen] == [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert {total for _, total in seen} == {sum(sizes)}


def test_parts_are_stacked_as_published(tmp_path: Path) -> None:
    family, settings = CASES["llama 2"]
    theirs = publish(tmp_path, family, **settings).state_dict()
    state = load_device_weights(tmp_path, load_shape(tmp_path), torch.float32, CPU).state()
    attention = "model.layers.1.self_attn"
    qkv = torch.cat([theirs[f"{attention}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(state["layers.1.qkv"], qkv)
    mlp = [theirs[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(state["layers.0.gate_up"], torch.cat(mlp))
    assert torch.equal(state["embedding"], theirs["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(211, 64, dtype=torch.int8), "expected floating point"),
        (torch.zeros(210, 64), "found shape"),
        (None, "found nothing"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, tensor: Any, message: str) -> None:
    publish(tmp_path, "llama")
    rewrite(tmp_path, "lm_head.weight", tensor)
    with pytest.raises(ConfigError, match=message):
        load_device_weights(tmp_path, load_shape(tmp_path), torch.float32, CPU)


def test_random_weights_are_normal_and_the_same_for_a_seed() -> None:
    one, two, other = (random_device_weights(TINY, torch.float32, CPU, s) for s in (1, 1, 2))
    head = one.state()["head"]
    assert torch.equal(head, two.state()["head"])
    assert not torch.equal(head, other.state()["head"])
    assert 0.019 < float(head.std()) < 0.021
    assert bool((one.state()["layers.0.input_norm"] == 1).all())


def test_a_model_lives_in_memory_that_somebody_else_owns() -> None:
    """As a process does that was given the piece."""
    owned = random_device_weights(TINY, torch.float32, CPU)
    mine = DeviceLlama(TINY, owned)
    theirs = DeviceLlama(TINY, DeviceWeights(owned.memory, dict(owned.places)))
    mine.layers[1].down.weight.fill_(3.0)
    assert bool((theirs.layers[1].down.weight == 3.0).all())
