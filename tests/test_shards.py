"""How a model is cut over ranks: every part is somewhere, read once, and adds up to the whole."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from time import sleep, thread_time
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from real_world import DEMO, MODELS, demo_plan  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.distributed import HashStore  # noqa: E402
from world_models import PagedRunner, make_kv, make_meta, publish  # noqa: E402

from muxrt.config.model import ModelShape, load_shape  # noqa: E402
from muxrt.config.shard import Shard, check_split  # noqa: E402
from muxrt.engine.ranks import plan_rank, rank_cores  # noqa: E402
from muxrt.errors import ConfigError  # noqa: E402
from muxrt.models.llama import Llama, Session  # noqa: E402
from muxrt.models.ranks import Ranks  # noqa: E402
from muxrt.models.weights import Kind, list_weights  # noqa: E402
from muxrt.worker.collectives import GroupRanks, RankLost  # noqa: E402
from muxrt.worker.kv_storage import Segment  # noqa: E402
from muxrt.worker.rank_processes import open_wake  # noqa: E402
from muxrt.worker.shared_ranks import ROOM, SharedRanks, num_bytes  # noqa: E402

TIMEOUT_S, LATE_S = 3.0, 0.5

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "three heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, settings = FAMILIES[request.param]
    path = tmp_path_factory.mktemp("model")
    publish(path, family, **settings)
    return path


def shape_of(heads: int, kv_heads: int) -> ModelShape:
    return replace(load_shape(DEMO / "pydoc-m"), num_heads=heads, num_kv_heads=kv_heads)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "held", "kv_held"),
    [
        (8, 4, 2, [(0, 4), (4, 8)], [(0, 2), (2, 4)]),
        (3, 3, 2, [(0, 1), (1, 3)], [(0, 1), (1, 3)]),
        (2, 1, 2, [(0, 1), (1, 2)], [(0, 1), (0, 1)]),
        (8, 2, 4, [(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (6, 2, 4, [(0, 1), (1, 3), (3, 4), (4, 6)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
    ],
)
def test_heads_stay_with_the_kv_head_they_attend_to(
    heads: int, kv_heads: int, size: int, held: Any, kv_held: Any
) -> None:
    shape = shape_of(heads, kv_heads)
    check_split("m", shape, size)
    shards = [Shard(rank, size) for rank in range(size)]
    assert [s.heads(shape) for s in shards] == [range(*each) for each in held]
    assert [s.kv_heads(shape) for s in shards] == [range(*each) for each in kv_held]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 3, 4), (4, 2, 8), (1, 1, 2)])
def test_heads_that_do_not_reach_are_refused(heads: int, kv_heads: int, size: int) -> None:
    with pytest.raises(
        ConfigError, match=f"m cannot be cut over {size} ranks: found {heads} heads"
    ):
        check_split("m", shape_of(heads, kv_heads), size)


def test_each_rank_has_its_planes_of_every_block() -> None:
    """pydoc-s has three kv heads: room for two on each rank."""
    plan = demo_plan(MODELS, planes_per_block=4, tp=2)
    shapes = {model: load_shape(DEMO / model) for model in MODELS}
    ranks = [plan_rank(plan, shapes, Shard(rank, 2)) for rank in range(2)]
    for rank in ranks:
        assert rank.num_blocks == plan.num_blocks
        assert rank.arena.block_bytes * 2 == plan.arena.block_bytes
        for name, model in rank.models.items():
            layout = model.layout
            assert layout.blocks_per_group == plan.models[name].layout.blocks_per_group
            assert layout.shape.num_planes <= layout.blocks_per_group * rank.arena.planes_per_block
    heads = [rank.models["pydoc-s"].layout.shape.num_kv_heads for rank in ranks]
    assert heads == [1, 2]
    with pytest.raises(ConfigError, match="planes_per_block of unit unit: found 1, expected a mul"):
        plan_rank(demo_plan(MODELS, planes_per_block=1, tp=2), shapes, Shard(0, 2))


def test_ranks_have_equal_parts_of_the_cores() -> None:
    assert rank_cores([3, 4, 5, 6, 7], 2) == ((3, 4), (5, 6))
    with pytest.raises(ConfigError, match="found 2 ranks, expected at most 1: one core each of 3"):
        rank_cores([3], 2)


# -- weights ---------------------------------------------------------------------------------


def file_bytes(folder: Path, shard: Shard) -> int:
    """What a rank holds of the file, counted from the published tensors."""
    shape = load_shape(folder)
    tensors = load_file(folder / "model.safetensors")
    weights = list(list_weights(shape, shard))
    parts = [part for weight in weights for part in weight.parts]
    assert len({part.name for part in parts}) == len(parts)
    total = 0
    for part in parts:
        tensor = tensors[part.name]
        assert tuple(tensor.shape) == part.shape
        for dim, cut in enumerate((part.rows, part.columns)[: tensor.ndim]):
            tensor = tensor if cut is None else tensor.narrow(dim, cut.start, len(cut))
        total += tensor.numel() * tensor.element_size()
    return total


def test_a_rank_reads_what_it_holds_and_no_more(folder: Path) -> None:
    whole = Llama.load(folder, "float32")
    parts = [Llama.load(folder, "float32", shard=Shard(rank, 2)) for rank in range(2)]
    assert whole.bytes_read == sum(
        t.nbytes for t in load_file(folder / "model.safetensors").values()
    )
    for rank, part in enumerate(parts):
        assert part.bytes_read == file_bytes(folder, Shard(rank, 2))
    shape, hidden = load_shape(folder), load_shape(folder).hidden_size
    norms = [w for w in list_weights(shape) if w.kind is Kind.NORM and not w.name.endswith(".bias")]
    twice = sum(4 * w.shape[0] for w in norms)
    if shape.num_kv_heads < 2:
        twice += 4 * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * hidden
    assert sum(part.bytes_read for part in parts) == whole.bytes_read + twice


def test_what_others_hold_may_be_anything(folder: Path, tmp_path: Path) -> None:
    """Rank 1 of a file in which everything else is NaN is rank 1 of the file."""
    shard = Shard(1, 2)
    poisoned_copy(folder, tmp_path, shard)
    clean = Llama.load(folder, "float32", shard=shard).state()
    found = Llama.load(tmp_path, "float32", shard=shard).state()
    assert clean.keys() == found.keys()
    assert all(torch.equal(clean[name], found[name]) for name in clean)


def poisoned_copy(folder: Path, into: Path, shard: Shard) -> None:
    """The model, of which everything that the rank does not hold is NaN."""
    tensors = load_file(folder / "model.safetensors")
    poisoned = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    for weight in list_weights(load_shape(folder), shard):
        for part in weight.parts:
            cuts = (part.rows, part.columns)[: len(part.shape)]
            place = tuple(slice(None) if c is None else slice(c.start, c.stop) for c in cuts)
            poisoned[part.name][place] = tensors[part.name][place]
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            (into / name).write_text((folder / name).read_text())
    save_file(poisoned, into / "model.safetensors")


# -- the forward pass, over gloo between two threads -----------------------------------------


@pytest.fixture(params=["shared", "gloo"])
def lines(request: pytest.FixtureRequest) -> Iterator[list[Ranks]]:
    """A line of each of two ranks."""
    memory, wakes = Segment(num_bytes(2)), [open_wake(), open_wake()]
    store, found = HashStore(), {}

    def meet(rank: int) -> None:
        shard = Shard(rank, 2)
        if request.param == "gloo":
            found[rank] = GroupRanks(store, "test", shard, TIMEOUT_S)
        else:
            found[rank] = SharedRanks(memory.tensor(), wakes, shard, TIMEOUT_S)

    together(meet)
    yield [found[0], found[1]]
    for wake in wakes:
        os.close(wake)


def together(work: Any) -> None:
    """`work(rank)` on two threads; raises what either raises."""
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_parts_compute_what_the_whole_does(folder: Path, lines: list[Ranks]) -> None:
    """A prompt in two chunks and a decode step, logits within rounding."""
    whole = Llama.load(folder, "float32")
    single = PagedRunner(whole, make_kv(load_shape(folder)))
    tokens = np.random.default_rng(0).integers(0, whole.shape.vocab_size, 12).tolist()
    chunks = [tokens[:7], tokens[7:11], tokens[11:]]
    wanted = [single.step([(1, chunk)])[0] for chunk in chunks]
    found: list[Any] = []

    def compute(rank: int) -> None:
        llama = Llama.load(folder, "float32", shard=Shard(rank, 2))
        session = Session(llama, make_kv(llama.shape), single.team, lines[rank])
        start = 0
        for chunk in chunks:
            meta = make_meta([1], [start], [len(chunk)])
            start += len(chunk)
            # Only the first rank knows the tokens.
            ids = np.array(chunk if rank == 0 else [0] * len(chunk), dtype=np.int32)
            with torch.inference_mode():
                logits = session.logits(session.forward(ids, meta.arrays))
            assert (logits is None) == (rank == 1)
            if logits is not None:
                found.append(logits.clone())

    together(compute)
    for here, there in zip(found, wanted, strict=True):
        torch.testing.assert_close(here, there, atol=2e-4, rtol=1e-4)


def test_a_rank_that_does_not_come_is_found(lines: list[Ranks]) -> None:
    with pytest.raises(RankLost, match="an exchange between ranks failed"):
        lines[0].add(torch.ones(4))


def test_one_that_comes_late_is_waited_for_asleep(lines: list[Ranks]) -> None:
    """And what is exchanged may be larger than the room for it."""
    count, used_s = ROOM + 1000, []

    def work(rank: int) -> None:
        if rank == 1:
            sleep(LATE_S)
        begun_s = thread_time()
        values = torch.full((count,), float(rank + 1))
        values[-1] = 10.0 * (rank + 1)
        lines[rank].add(values)
        assert values[0] == 3.0 and values[-2] == 3.0 and values[-1] == 30.0
        ids = torch.arange(count, dtype=torch.int32) if rank == 0 else torch.zeros(count).int()
        lines[rank].share(ids)
        assert torch.equal(ids, torch.arange(count, dtype=torch.int32))
        part = torch.full((70, 2000 + rank), float(rank))
        joined = lines[rank].join(part, 4001)
        used_s.append(thread_time() - begun_s)
        assert (joined is None) == (rank == 1)
        if joined is not None:
            assert joined.shape == (70, 4001)
            assert (joined[:, :2000] == 0).all() and (joined[:, 2000:] == 1).all()

    together(work)
    assert max(used_s) < LATE_S / 2
