"""The numba kernels against their definition in plain torch."""

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from world_models import make_kv, make_meta

from muxrt import kernels
from muxrt.kernels import KvCache, Team, cpu_rows, jit, reference

LAYER = 1


@dataclass(frozen=True)
class Planes:
    """What `make_kv` needs to know of a model."""

    num_kv_heads: int
    head_dim: int
    num_layers: int = 3


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The tensors are tiny: torch's own threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[1, 2])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    kernels.warm_up()
    with Team(size=request.param) as team:
        yield team


def tokens(num: int, groups: int, shape: Planes) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of new tokens as a model makes them: views of one product."""
    heads = shape.num_kv_heads * groups
    qkv = torch.randn(num, heads + 2 * shape.num_kv_heads, shape.head_dim)
    q, k, v = qkv.split((heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
    return q, k, v


def compare(
    kv: KvCache,
    groups: int,
    batch: Sequence[tuple[int, int, int]],
    team: Team,
    tolerance: float = 2e-6,
) -> None:
    """Run a batch of (slot, start, new tokens) both ways, over prefixes of random K and V."""
    shape = Planes(kv.num_kv_heads, kv.head_dim)
    for slot, start, _ in batch:
        if start:
            _, k, v = tokens(start, groups, shape)
            reference.write_kv(k, v, make_meta([slot], [0], [start]), kv, LAYER)
    slots, starts, counts = (list(column) for column in zip(*batch, strict=True))
    meta = make_meta(slots, starts, counts)
    q, k, v = tokens(sum(counts), groups, shape)
    before = kv.arena.clone()
    want = reference.attention(q, k, v, meta, kv, LAYER, shape.head_dim**-0.5)
    written = kv.arena.clone()
    kv.arena.copy_(before)
    got = kernels.attention(q, k, v, meta, kv, LAYER, shape.head_dim**-0.5, team)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    assert torch.equal(bits(kv.arena), bits(written)), "K and V, and nothing else, are written"


def bits(arena: Tensor) -> Tensor:
    """For a comparison in which NaN equals NaN."""
    return arena.view(torch.int16 if arena.dtype == torch.bfloat16 else torch.int32)


RAGGED = ((2, 0, 33), (0, 5, 1), (3, 37, 20), (1, 95, 1), (4, 0, 1), (5, 16, 130))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize(("block_tokens", "planes_per_block"), [(16, 1), (32, 8), (16, 16)])
def test_attention_is_the_definition(
    team: Team,
    dtype: torch.dtype,
    head_dim: int,
    groups: int,
    block_tokens: int,
    planes_per_block: int,
) -> None:
    torch.manual_seed(head_dim + groups)
    kv = make_kv(
        Planes(2, head_dim),
        slots=6,
        max_tokens=160,
        block_tokens=block_tokens,
        planes_per_block=planes_per_block,
        dtype=dtype,
    )
    compare(kv, groups, RAGGED, team)


@pytest.mark.parametrize("seed", range(20))
def test_attention_of_random_batches(team: Team, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = Planes(int(rng.integers(1, 5)), int(rng.choice([4, 16, 64, 100, 128])))
    kv = make_kv(
        shape,
        slots=8,
        max_tokens=400,
        block_tokens=int(rng.choice([1, 8, 16, 24, 32, 128])),
        planes_per_block=int(rng.choice([1, 2, 3, 16])),
        seed=seed,
    )
    batch = [
        (int(slot), int(rng.integers(0, 200)), int(rng.choice([1, 1, 2, 17, 200])))
        for slot in rng.permutation(8)[: rng.integers(1, 9)]
    ]
    compare(kv, int(rng.choice([1, 3, 5, 7, 16])), batch, team)


def test_one_long_sequence(team: Team) -> None:
    kv = make_kv(Planes(2, 64), slots=1, max_tokens=5000)
    compare(kv, 1, [(0, 4998, 1)], team)
    compare(kv, 4, [(0, 4990, 7)], team)


def test_large_scores_do_not_overflow(team: Team) -> None:
    kv = make_kv(Planes(1, 64), slots=1)
    q, k, v = (x * 30 for x in tokens(200, 4, Planes(1, 64)))
    meta = make_meta([0], [0], [200])
    want = reference.attention(q, k, v, meta, kv, LAYER, 1.0)
    got = kernels.attention(q, k, v, meta, kv, LAYER, 1.0, team)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("groups", "new"), [(1, 1), (4, 1), (2, 40)])
def test_offsets_beyond_31_bits(dtype: torch.dtype, groups: int, new: int) -> None:
    """The last blocks of an arena of more than 2**31 elements; untouched pages cost nothing."""
    shape = Planes(2, 64, num_layers=2)
    block_elems = 4 * 2 * 16 * 64
    num_blocks = 2**31 // block_elems + 64
    arena = sparse_arena(num_blocks * block_elems, dtype)
    table = torch.arange(num_blocks - 1, num_blocks - 9, -1, dtype=torch.int32).view(1, 8)
    high = KvCache(arena, table, 2, 2, 64, 16, 1, 4)
    low = make_kv(shape, slots=1, max_tokens=128, planes_per_block=4, dtype=dtype)
    q, k, v = tokens(60 + new, groups, shape)
    with Team() as team:
        for start, end in ((0, 60), (60, 60 + new)):
            meta = make_meta([0], [start], [end - start])
            part = (q[start:end], k[start:end], v[start:end], meta)
            got = kernels.attention(*part, high, LAYER, 0.1, team)
            want = kernels.attention(*part, low, LAYER, 0.1, team)
            assert torch.equal(got, want)


def sparse_arena(num_elems: int, dtype: torch.dtype) -> Tensor:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, num_elems * dtype.itemsize)
    memory = mmap.mmap(fd, num_elems * dtype.itemsize)
    os.close(fd)
    return torch.frombuffer(memory, dtype=dtype)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    """Also at ties, at the largest finite number, for denormals, infinities and NaN."""
    halves = np.arange(0x3F80, 0x3FC0, dtype=np.uint32) << 16
    patterns = np.concatenate([halves + low for low in (0, 0x7FFF, 0x8000, 0x8001)])
    special = [0x7F7FFFFF, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF]
    values = np.concatenate([patterns, np.array(special, np.uint32)]).view(np.float32)
    values = np.resize(values, 320)
    k = torch.from_numpy(values).view(5, 1, 64)
    kv = make_kv(Planes(1, 64), slots=1, max_tokens=16, planes_per_block=1, dtype=torch.bfloat16)
    meta = make_meta([0], [0], [5])
    with Team() as team:
        kernels.attention(torch.zeros(5, 1, 64), k, k, meta, kv, 0, 1.0, team)
    got, _ = reference.gather_kv(kv, 0, 0, 5)
    torch.testing.assert_close(got, k.to(torch.bfloat16), equal_nan=True, atol=0, rtol=0)


def test_results_do_not_depend_on_neighbours_or_threads() -> None:
    """A decode row is the same in any company."""
    shape = Planes(2, 64)
    kv = make_kv(shape, slots=3)
    q, k, v = tokens(3, 4, shape)
    for slot, start in ((0, 40), (1, 100), (2, 3)):
        _, old_k, old_v = tokens(start, 4, shape)
        reference.write_kv(old_k, old_v, make_meta([slot], [0], [start]), kv, LAYER)
    with Team() as one, Team(size=2) as two:
        together = kernels.attention(
            q, k, v, make_meta([0, 1, 2], [40, 100, 3], [1, 1, 1]), kv, LAYER, 0.125, two
        )
        alone = kernels.attention(
            q[1:2], k[1:2], v[1:2], make_meta([1], [100], [1]), kv, LAYER, 0.125, one
        )
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("width", [8, 100, 512])
def test_rows(team: Team, num_tokens: int, width: int) -> None:
    x, add, weight = (
        torch.randn(num_tokens, width),
        torch.randn(num_tokens, width),
        torch.rand(width),
    )
    want_sum = x.clone()
    want = reference.rms_norm(want_sum, weight, 1e-5, add)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5, team, add), want)
    assert torch.equal(x, want_sum)
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-5, team), reference.rms_norm(x, weight, 1e-5)
    )
    gate_up = torch.randn(num_tokens, 2 * width) * 20
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -88.0])
    torch.testing.assert_close(kernels.silu_mul(gate_up, team), reference.silu_mul(gate_up))


@pytest.mark.parametrize("num_tokens", [1, 200])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 64), (3, 3, 100), (16, 2, 128)])
def test_heads(team: Team, num_tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, head_dim)
    expected = qkv.clone()
    sizes = (heads, kv_heads, kv_heads)
    (q, k, _), (want_q, want_k, _) = qkv.split(sizes, dim=1), expected.split(sizes, dim=1)
    weight = torch.rand(head_dim)
    cos, sin = torch.randn(2, num_tokens, head_dim // 2)
    reference.rms_norm_heads(want_k, weight, 1e-6)
    reference.rope(want_q, want_k, cos, sin)
    kernels.rms_norm_heads(k, weight, 1e-6, team)
    kernels.rope(q, k, cos, sin, team)
    torch.testing.assert_close(qkv, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_blocks_are_copied_and_no_others(dtype: torch.dtype) -> None:
    source = torch.randint(0, 255, (10 * 192 + 8,), dtype=torch.uint8).view(dtype)
    target = torch.zeros(7 * 192, dtype=torch.uint8)
    expected = target.clone()
    ids, other = torch.tensor([9, 0, 4], dtype=torch.int32), torch.tensor([1, 6, 2]).int()
    reference.copy_blocks(source, expected, ids, other, 192)
    kernels.copy_blocks(source, target, ids, other, 192)
    assert torch.equal(target, expected)
    assert torch.equal(reference.blocks(target, 192)[6], reference.blocks(source, 192)[0])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("work_items", [0, 1, 2, 7, 64])
def test_a_team_does_every_item_once(size: int, work_items: int) -> None:
    done: list[int] = []
    with Team(size=size) as team:
        for _ in range(20):
            team.run(lambda begin, end, into: into.extend(range(begin, end)), work_items, done)
    assert sorted(done) == sorted(list(range(work_items)) * 20)


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_a_team_reports_an_error_and_goes_on(guilty: int) -> None:
    def work(begin: int, end: int, done: list[int]) -> None:
        if begin == guilty:
            raise ArithmeticError("a bad item")
        done.append(begin)

    done: list[int] = []
    with Team(size=3) as team:
        with pytest.raises(ArithmeticError, match="a bad item"):
            team.run(work, 3, done)
        assert len(done) == 2
        team.run(lambda begin, end: done.append(end), 3)
    assert len(done) == 5


def test_two_teams_work_at_the_same_time() -> None:
    """numba's own pool would abort the process here."""
    kernels.warm_up()
    failures: list[str] = []

    def live() -> None:
        x, weight = torch.randn(400, 512), torch.rand(512)
        want = reference.rms_norm(x, weight, 1e-5)
        with Team(size=2) as team:
            for _ in range(50):
                got = kernels.rms_norm(x, weight, 1e-5, team)
                if not torch.allclose(got, want, atol=1e-5):
                    failures.append("wrong result")

    lanes = [threading.Thread(target=live) for _ in range(3)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    assert not failures


def test_helpers_are_pinned_and_end() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only")
    homes: dict[int, set[int]] = {}
    before = threading.active_count()
    with Team(cores[:2]) as team:
        team.run(lambda begin, end: homes.update({begin: os.sched_getaffinity(0)}), 2)
        assert threading.active_count() == before + 1
    assert homes[1] == {cores[1]}
    assert threading.active_count() == before


def test_a_team_refuses_cores_it_cannot_have() -> None:
    with pytest.raises(ValueError, match="needs as many cores"):
        Team([0, 0], size=2)
    with pytest.raises(ValueError, match="not this process's cores"):
        Team([10**6])


def test_no_call_compiles_anything() -> None:
    """A type that was not foreseen is an error at once, not a request that waits."""
    kernels.warm_up()
    x = np.zeros((1, 8))  # float64
    with pytest.raises(TypeError, match="No matching definition"):
        cpu_rows.silu_mul(0, 1, x, x)


def test_where_compiled_kernels_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    folder = jit.cache_folder.__wrapped__
    assert folder().parent == tmp_path / "cache" / "muxrt"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "own"))
    assert folder().parent == tmp_path / "own"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(blocked / "below"))
    private = folder().parent
    assert private.stat().st_mode & 0o077 == 0, "nobody else may put code there"
