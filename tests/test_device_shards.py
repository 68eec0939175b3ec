"""What a rank on a device holds of a model, and what two of them compute together."""

from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.distributed import HashStore  # noqa: E402

from muxrt.config.model import load_shape  # noqa: E402
from muxrt.config.placement import Lanes  # noqa: E402
from muxrt.config.shard import Shard  # noqa: E402
from muxrt.models.device_llama import DeviceLlama, DeviceSession, rope_table  # noqa: E402
from muxrt.models.llama import Llama  # noqa: E402
from muxrt.worker.collectives import GroupRanks, RankLost  # noqa: E402
from muxrt.worker.device_runner import DeviceCopier  # noqa: E402
from muxrt.worker.device_storage import DeviceStorage  # noqa: E402
from muxrt.worker.device_streams import plain_share  # noqa: E402
from tests.test_device_weights import padded  # noqa: E402
from tests.test_shards import FAMILIES, TIMEOUT_S, file_bytes, poisoned_copy, together  # noqa: E402
from tests.worker_world import Desk, make_plan, write_models  # noqa: E402
from tests.world_models import PagedRunner, make_kv, publish  # noqa: E402

CPU = torch.device("cpu")
SHARDS = (Shard(0, 2), Shard(1, 2))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, settings = FAMILIES[request.param]
    path = tmp_path_factory.mktemp("model")
    publish(path, family, **settings)
    return path


def load(folder: Path, shard: Shard) -> DeviceLlama:
    return DeviceLlama.load(folder, torch.float32, CPU, shard=shard)


def test_a_rank_reads_what_it_holds_and_no_more(folder: Path) -> None:
    """Also into the device's memory: both have the norms, and half of the rest each, or so."""
    whole = DeviceLlama.load(folder, torch.float32, CPU).weights
    for shard in SHARDS:
        weights = load(folder, shard).weights
        assert weights.bytes_read == file_bytes(folder, shard)
        assert weights.memory.numel() < 0.62 * whole.memory.numel()


def test_what_others_hold_may_be_anything(folder: Path, tmp_path: Path) -> None:
    """Rank 1 of a file in which everything else is NaN is rank 1 of the file."""
    shard = SHARDS[1]
    poisoned_copy(folder, tmp_path, shard)
    clean, found = (load(where, shard).weights.state() for where in (folder, tmp_path))
    assert clean.keys() == found.keys()
    assert all(torch.equal(clean[name], found[name]) for name in clean)


@pytest.fixture
def lines() -> Iterator[list[GroupRanks]]:
    """A line of each of two ranks."""
    store, found = HashStore(), {}

    def meet(rank: int) -> None:
        found[rank] = GroupRanks(store, "test", SHARDS[rank], TIMEOUT_S)

    together(meet)
    yield [found[0], found[1]]
    for line in found.values():
        line.close()


def test_two_parts_compute_what_the_whole_does_on_cores(
    folder: Path, lines: list[GroupRanks]
) -> None:
    """A prompt in two chunks and a decode step, logits within rounding."""
    whole = Llama.load(folder, "float32")
    single = PagedRunner(whole, make_kv(load_shape(folder)))
    tokens = np.random.default_rng(0).integers(0, whole.shape.vocab_size, 12).tolist()
    chunks = [tokens[:7], tokens[7:11], tokens[11:]]
    wanted = [single.step([(1, chunk)])[0] for chunk in chunks]
    found: list[Any] = []

    def compute(rank: int) -> None:
        llama = load(folder, SHARDS[rank])
        rope = rope_table(llama.shape, 128, CPU)
        session = DeviceSession(llama, make_kv(llama.shape), rope, 4, lines[rank])
        start = 0
        for chunk in chunks:
            count = len(chunk)
            meta = padded([1], [start], [count], count)
            workspace = session.workspace(1, 128) if count == 1 else None
            start += count
            # Only the first rank knows the tokens.
            ids = torch.tensor(chunk if rank == 0 else [0] * count, dtype=torch.int32)
            with torch.inference_mode():
                logits = session.logits(session.forward(ids, meta, workspace))
            assert (logits is None) == (rank == 1)
            if logits is not None:
                found.append(logits.clone())

    together(compute)
    for here, there in zip(found, wanted, strict=True):
        torch.testing.assert_close(here, there, atol=2e-4, rtol=1e-4)


def test_ranks_agree_on_the_largest_number(lines: list[GroupRanks]) -> None:
    found = [0, 0]

    def say(rank: int) -> None:
        found[rank] = lines[rank].most(3 + 4 * rank)

    together(say)
    assert found == [7, 7]


def test_who_compiles_kernels_is_waited_for(lines: list[GroupRanks]) -> None:
    """For longer than an exchange may take otherwise."""

    def work(rank: int) -> None:
        if rank == 1:
            sleep(1.5 * TIMEOUT_S)
        values = torch.ones(4)
        with lines[rank].patiently():
            lines[rank].add(values)
        assert (values == 2).all()

    together(work)
    with pytest.raises(RankLost):
        lines[0].add(torch.ones(4))


def test_a_copy_is_over_when_it_is_over_on_all_ranks(
    lines: list[GroupRanks], tmp_path: Path
) -> None:
    write_models(tmp_path)
    desk = Desk(make_plan(tmp_path, planes_per_block=2, lanes=Lanes(kind="stream")))
    storage = DeviceStorage(desk.plan, CPU)
    share = plain_share("copy", CPU, 0)
    seat = desk.seat("wide", 9)
    desk.batch(0, [(seat, 9)])
    out = desk.swap_out(seat)
    copiers = [
        DeviceCopier(storage, desk.plan.arena.block_bytes, share, lines[rank]) for rank in (0, 1)
    ]
    together(lambda rank: copiers[rank].launch(out).wait())
    with pytest.raises(RankLost):
        copiers[0].launch(out).wait()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_and_rows_of_every_dtype(lines: list[GroupRanks], dtype: Any) -> None:
    """As activations have it; the last columns are the larger part's."""

    def work(rank: int) -> None:
        values = torch.full((3, 5), rank + 1.0, dtype=dtype)
        lines[rank].add(values)
        assert (values == 3).all()
        joined = lines[rank].join(torch.full((3, 2 + rank), rank + 1.0, dtype=dtype), 5)
        assert (joined is None) == (rank == 1)
        if joined is not None:
            assert joined.dtype == dtype and joined.tolist() == [[1, 1, 2, 2, 2]] * 3

    together(work)
