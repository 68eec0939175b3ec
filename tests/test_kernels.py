"""The numba kernels against their definition in plain torch."""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_calls
import numpy as np
import pytest
import torch
from torch import Tensor
from world_models import make_kv, make_meta

from muxrt import kernels
from muxrt.kernels import KvCache, Team, amx, jit, reference

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
    got = kernel_calls.attention(q, k, v, meta, kv, LAYER, shape.head_dim**-0.5, team)
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
    got = kernel_calls.attention(q, k, v, meta, kv, LAYER, 1.0, team)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("groups", "new"), [(1, 1), (4, 1), (2, 40)])
def test_offsets_beyond_31_bits(dtype: torch.dtype, groups: int, new: int) -> None:
    """The last blocks of an arena of more than 2**31 elements; untouched pages cost nothing."""
    shape = Planes(2, 64, num_layers=2)
    block_elems = 4 * 2 * 16 * 64
    num_blocks = 2**31 // block_elems + 64
    arena = kernel_calls.sparse_arena(num_blocks * block_elems, dtype)
    table = torch.arange(num_blocks - 1, num_blocks - 9, -1, dtype=torch.int32).view(1, 8)
    high = KvCache(arena, table, 2, 2, 64, 16, 1, 4)
    low = make_kv(shape, slots=1, max_tokens=128, planes_per_block=4, dtype=dtype)
    q, k, v = tokens(60 + new, groups, shape)
    with Team() as team:
        for start, end in ((0, 60), (60, 60 + new)):
            meta = make_meta([0], [start], [end - start])
            part = (q[start:end], k[start:end], v[start:end], meta)
            got = kernel_calls.attention(*part, high, LAYER, 0.1, team)
            want = kernel_calls.attention(*part, low, LAYER, 0.1, team)
            assert torch.equal(got, want)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    """Also at ties, at the largest finite number, for denormals, infinities and NaN."""
    halves = np.arange(0x3F80, 0x3FC0, dtype=np.uint32) << 16
    patterns = np.concatenate([halves + low for low in (0, 0x7FFF, 0x8000, 0x8001)])
    special = [0x7F7FFFFF, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF]
    values = np.concatenate([patterns, np.array(special, np.uint32)]).view(np.float32)
    values = np.resize(values, 320)
    v = torch.from_numpy(values).view(5, 1, 64)
    kv = make_kv(Planes(1, 64), slots=1, max_tokens=16, planes_per_block=1, dtype=torch.bfloat16)
    meta, zeros = make_meta([0], [0], [5]), torch.zeros(5, 1, 64)
    with Team() as team:
        kernel_calls.attention(zeros, zeros, v, meta, kv, 0, 1.0, team)
    _, got = reference.gather_kv(kv, 0, 0, 5)
    torch.testing.assert_close(got, v.to(torch.bfloat16), equal_nan=True, atol=0, rtol=0)


def test_results_do_not_depend_on_neighbours_or_threads() -> None:
    """A decode row is the same in any company."""
    shape = Planes(2, 64)
    kv = make_kv(shape, slots=3)
    q, k, v = tokens(3, 4, shape)
    for slot, start in ((0, 40), (1, 100), (2, 3)):
        _, old_k, old_v = tokens(start, 4, shape)
        reference.write_kv(old_k, old_v, make_meta([slot], [0], [start]), kv, LAYER)
    with Team() as one, Team(size=2) as two:
        together = kernel_calls.attention(
            q, k, v, make_meta([0, 1, 2], [40, 100, 3], [1, 1, 1]), kv, LAYER, 0.125, two
        )
        alone = kernel_calls.attention(
            q[1:2], k[1:2], v[1:2], make_meta([1], [100], [1]), kv, LAYER, 0.125, one
        )
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("width", [8, 100, 512])
def test_norm_is_the_definition(team: Team, num_tokens: int, width: int) -> None:
    x, weight = torch.randn(num_tokens, width), torch.rand(width)
    want = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(kernel_calls.rms_norm(x, weight, 1e-5, team), want)


@pytest.mark.parametrize("num_tokens", [1, 200])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 64), (3, 3, 100), (16, 2, 128)])
@pytest.mark.parametrize("is_normed", [True, False])
def test_heads_are_normed_and_rotated(
    team: Team, num_tokens: int, heads: int, kv_heads: int, head_dim: int, is_normed: bool
) -> None:
    shape = Planes(kv_heads, head_dim)
    q, k, v = tokens(num_tokens, heads // kv_heads, shape)
    rope = torch.randn(2, 340, head_dim // 2)
    norms = (torch.rand(head_dim), torch.rand(head_dim)) if is_normed else (None, None)
    meta = make_meta([0, 1], [0, 100], [num_tokens - num_tokens // 2, num_tokens // 2])
    if num_tokens == 1:
        meta = make_meta([1], [137], [1])
    kv, other = (make_kv(shape, slots=2, max_tokens=340, seed=5) for _ in range(2))
    for cache in (kv, other):
        cache.arena.copy_(
            torch.randn(cache.arena.shape, generator=torch.Generator().manual_seed(1))
        )
    got = kernel_calls.attention(q, k, v, meta, kv, LAYER, 0.1, team, (rope[0], rope[1]), norms)
    want_q, want_k = q.clone(), k.clone()
    for x, weight in zip((want_q, want_k), norms, strict=True):
        if weight is not None:
            reference.rms_norm_heads(x, weight, 1e-6)
    cos, sin = rope[:, meta.positions]
    reference.rope(want_q, want_k, cos, sin)
    want = reference.attention(want_q, want_k, v, meta, other, LAYER, 0.1)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(kv.arena, other.arena)


DTYPES = [torch.float32, torch.bfloat16, torch.int8]
PHASES = pytest.mark.parametrize("is_prefill", [False, True], ids=["decode", "prefill"])


@PHASES
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("num_tokens", [*range(1, 9), 13, 18, 23, 24, 31, 96, 97, 200])
@pytest.mark.parametrize(("features", "depth"), [(64, 512), (200, 100), (1, 8), (130, 1376)])
def test_linear_is_the_definition(
    team: Team, dtype: torch.dtype, num_tokens: int, features: int, depth: int, is_prefill: bool
) -> None:
    torch.manual_seed(num_tokens + features)
    x, weight = torch.randn(num_tokens, depth), torch.randn(features, depth)
    bias = torch.randn(features) if num_tokens % 2 else None
    packed = kernel_calls.pack(weight, dtype, bias)
    got, want = kernel_calls.linear(x, packed, team, is_prefill), reference.linear(x, packed)
    torch.testing.assert_close(got, want, atol=2e-6 * depth**0.5 * 4, rtol=2e-5)


def test_code_for_another_machine_uses_no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.CPU_NAME", "generic")
    assert not amx.is_usable.__wrapped__()


def test_linear_in_parts_is_as_exact_as_float32(team: Team) -> None:
    """Against float64, where AMX multiplies in a prefill: numbers of one sign, no error cancels."""
    torch.manual_seed(0)
    x, weight = torch.rand(64, 2000), torch.rand(70, 2000)
    exact = x.double() @ weight.double().T
    packed = kernel_calls.pack(weight, torch.float32)
    decode, prefill = (
        ((kernel_calls.linear(x, packed, team, is_prefill) - exact) / exact).abs().max()
        for is_prefill in (False, True)
    )
    assert prefill <= decode < 4e-6
    assert (prefill < decode) == amx.is_usable()  # a prefill does multiply in parts


@PHASES
def test_linear_keeps_what_is_not_finite_in_its_row(team: Team, is_prefill: bool) -> None:
    x, packed = torch.randn(40, 64), kernel_calls.pack(torch.randn(64, 64), torch.float32)
    want = kernel_calls.linear(x, packed, team, is_prefill)
    x[3, 5], x[17, 60], x[39, 0] = torch.nan, torch.inf, -torch.inf
    got = kernel_calls.linear(x, packed, team, is_prefill)
    is_finite = torch.ones(40, dtype=torch.bool).index_fill_(0, torch.tensor([3, 17, 39]), False)
    assert torch.equal(got[is_finite], want[is_finite])
    assert not got[~is_finite].isfinite().any()


@PHASES
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("width", [64, 100])
def test_linear_with_silu(
    team: Team, dtype: torch.dtype, num_tokens: int, width: int, is_prefill: bool
) -> None:
    x, weight, bias = (
        torch.randn(num_tokens, 96),
        torch.randn(2 * width, 96),
        torch.randn(2 * width),
    )
    weight[:4] *= 30  # silu of large numbers, both ways
    packed = kernel_calls.pack(weight, dtype, bias, parts=2)
    got = kernel_calls.rows(
        team, x, width, lambda p, a, out: p.linear_silu_mul(a, packed, out), is_prefill
    )
    want = reference.silu_mul(reference.linear(x, packed))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


@PHASES
@pytest.mark.parametrize("num_tokens", [1, 50])
def test_linear_adds_to_what_is_there(team: Team, num_tokens: int, is_prefill: bool) -> None:
    x, packed = torch.randn(num_tokens, 70), kernel_calls.pack(torch.randn(70, 70), torch.float32)

    def record(program: kernels.Program, source: Any, out: Any) -> None:
        program.linear(source, packed, out)
        program.add_linear(source, packed, out)

    got = kernel_calls.rows(team, x, 70, record, is_prefill)
    torch.testing.assert_close(got, 2 * reference.linear(x, packed), atol=1e-4, rtol=1e-5)


@PHASES
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "int8"])
def test_a_row_of_a_linear_layer_is_the_same_in_any_company(
    team: Team, dtype: torch.dtype, is_prefill: bool
) -> None:
    """Bit for bit: so tokens depend neither on the batch nor on how prompts are cut."""
    x, packed = torch.randn(650, 300), kernel_calls.pack(torch.randn(100, 300), dtype)
    together = kernel_calls.linear(x, packed, team, is_prefill)
    for first, end in ((0, 1), (3, 9), (10, 17), (90, 120), (100, 520)):
        part = kernel_calls.linear(x[first:end], packed, team, is_prefill)
        assert torch.equal(part, together[first:end])


@pytest.mark.parametrize("seed", range(5))
def test_int8_is_within_half_a_step(seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(90, 70) * torch.logspace(-6, 3, 90)[:, None]
    weight[5] = 0
    packed = kernel_calls.pack(weight, torch.int8)
    steps = weight.abs().amax(dim=1) / 127
    assert ((kernels.unpack(packed) - weight).abs() <= steps[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_embedding(team: Team, dtype: torch.dtype, is_packed: bool) -> None:
    table, ids = torch.randn(150, 72).to(dtype), torch.randint(0, 150, (33,))
    program = kernels.Program(team, 40)
    out = program.floats(72)
    program.embed(kernel_calls.pack(table, dtype) if is_packed else table, out)
    program.run_batch(ids.numpy(), make_meta([0], [0], [33]).arrays)
    assert torch.equal(torch.from_numpy(out[:33]), table.float()[ids])


def test_a_shape_without_a_kernel_is_refused() -> None:
    kv, meta = make_kv(Planes(1, 64), slots=1), make_meta([0], [0], [1])
    q, k, v = tokens(1, 65, Planes(1, 64))
    with Team() as team, pytest.raises(ValueError, match="no kernel for 65/1 heads of 64"):
        kernel_calls.attention(q, k, v, meta, kv, 0, 1.0, team)


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
    packed = kernel_calls.pack(torch.randn(512, 128), torch.float32)

    def live() -> None:
        x = torch.randn(40, 128)
        want = reference.linear(x, packed)
        with Team(size=2) as team:
            for _ in range(50):
                got = kernel_calls.linear(x, packed, team)
                if not torch.allclose(got, want, atol=1e-4):
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
    with Team() as team, pytest.raises(KeyError, match="float64"):
        kernels.Program(team, 1).embed(torch.zeros(4, 8, dtype=torch.float64), np.zeros((1, 8)))


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
