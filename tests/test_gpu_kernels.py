"""The device kernels against their definition: in plain torch, in Triton's interpreter, on a GPU.

Without a GPU this file runs twice: here in plain torch, and in a process of its own whose kernels
Triton's interpreter runs. With one, `pytest -m gpu tests/test_gpu_kernels.py` runs them compiled.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import kernel_calls
import numpy as np
import pytest
import torch
from torch import Tensor
from world_models import make_kv, make_meta

from muxrt import kernels
from muxrt.kernels import DeviceMeta, KvCache, Team, gpu, reference
from muxrt.worker.sampler import uniforms

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu

LAYER = 1
EPS = 1e-5
# Relative, of results; a GPU multiplies float32 in three parts of 10 bits.
ROUNDING = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
if DEVICE == "cuda":
    ROUNDING[torch.float32] = 1e-5
FLOATS = pytest.mark.parametrize("dtype", list(ROUNDING), ids=["fp32", "fp16", "bf16"])


@dataclass(frozen=True)
class Planes:
    """What `make_kv` needs to know of a model."""

    num_kv_heads: int
    head_dim: int
    num_layers: int = 3


@dataclass(frozen=True)
class Batch:
    """Tokens as `rope_and_store` finds them, and where they belong."""

    qkv: Tensor  # [T, (heads + 2 * kv_heads) * head_dim]
    kv: KvCache
    meta: DeviceMeta  # on the device, padded
    host_meta: kernels.AttentionMeta

    @property
    def num_tokens(self) -> int:
        return len(self.host_meta.positions)

    @property
    def attended(self) -> Tensor:
        """Poisoned memory for the result of attention."""
        return poisoned(len(self.qkv), self.qkv.shape[1] - 2 * self.kv.num_kv_heads * self.head_dim)

    @property
    def head_dim(self) -> int:
        return self.kv.head_dim


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """By the norm of the difference: NaN never passes."""
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= tolerance, f"relative error {error.item():.2e} > {tolerance:.0e}"


def on_device(meta: kernels.AttentionMeta, sequences: int = 0, tokens: int = 0) -> DeviceMeta:
    """The batch padded by so many sequences and tokens; what padding holds is nonsense."""
    sequences, tokens = sequences + len(meta.slots), tokens + len(meta.positions)
    buffer = torch.full((DeviceMeta.num_ints(sequences, tokens),), 2**30, dtype=torch.int32)
    DeviceMeta.over(buffer, sequences, tokens).fill(meta)
    return DeviceMeta.over(buffer.to(DEVICE), sequences, tokens)


def cached_batch(
    sequences: Sequence[tuple[int, int, int]],
    groups: int,
    shape: Planes,
    *,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    block_tokens: int = 16,
    planes_per_block: int = 8,
    padding: int = 0,
) -> Batch:
    """(slot, start, new tokens) of each sequence; K and V of tokens before `start` are stored."""
    kv = make_kv(
        shape,
        slots=8,
        max_tokens=max(start + new for _, start, new in sequences),
        block_tokens=block_tokens,
        planes_per_block=planes_per_block,
    )
    kv = replace(kv, arena=kv.arena.to(kv_dtype or dtype))
    for slot, start, _ in sequences:
        if start:
            k, v = torch.randn(2, start, shape.num_kv_heads, shape.head_dim).to(dtype)
            reference.write_kv(k, v, make_meta([slot], [0], [start]), kv, LAYER)
    slots, starts, counts = (list(column) for column in zip(*sequences, strict=True))
    meta = make_meta(slots, starts, counts)
    kv = replace(kv, arena=kv.arena.to(DEVICE), block_table=kv.block_table.to(DEVICE))
    width = (shape.num_kv_heads * (groups + 2)) * shape.head_dim
    qkv = random(sum(counts) + padding, width, dtype=dtype)
    return Batch(qkv, kv, on_device(meta, padding, padding), meta)


def stored(batch: Batch) -> Batch:
    """The same batch with its K and V in the arena, by the definition."""
    _, k, v = split(batch)
    reference.write_kv(k, v, batch.meta, batch.kv, LAYER)
    return batch


def split(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    rows = batch.qkv.view(len(batch.qkv), -1, batch.head_dim)
    kv_heads = batch.kv.num_kv_heads
    q, k, v = rows.split((rows.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    return q, k, v


def expected(batch: Batch, scale: float) -> Tensor:
    """Attention by the definition, not rounded at the end."""
    q, _, _ = split(batch)
    out = torch.zeros(q.shape, device=DEVICE)
    reference.attend(q.float(), batch.meta, batch.kv, LAYER, scale, out)
    return out.flatten(1)[: batch.num_tokens]


def bits(arena: Tensor) -> Tensor:
    """For a comparison in which NaN equals NaN."""
    return arena.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[arena.itemsize])


@pytest.mark.skipif(IS_INTERPRETED or DEVICE == "cuda", reason="this is that process, or a GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_this_file_in_tritons_interpreter() -> None:
    """In a process of its own: what is interpreted is decided when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


# -- rows ----------------------------------------------------------------------------------------


@FLOATS
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 8), (7, 100), (33, 1030)])
def test_norm(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    x, weight = random(num_tokens, width, dtype=dtype), random(width, dtype=dtype)
    out, before = poisoned(num_tokens, width, dtype=dtype), x.clone()
    gpu.rms_norm(x, weight, EPS, out)
    assert_near(out, reference.rms_norm(x.float(), weight, EPS), ROUNDING[dtype])
    assert torch.equal(x, before)


@FLOATS
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 8), (7, 100), (33, 1030)])
def test_norm_of_a_residual(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    x, add, weight = (random(n, width, dtype=dtype) for n in (num_tokens, num_tokens, 1))
    out, want_x = poisoned(num_tokens, width, dtype=dtype), x + add
    gpu.rms_norm(x, weight[0], EPS, out, add)
    if IS_INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts bits off
        assert_near(x, want_x, ROUNDING[dtype])
    else:
        assert torch.equal(x, want_x)
    assert_near(out, reference.rms_norm(x.float(), weight[0], EPS), ROUNDING[dtype])


@FLOATS
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 8), (7, 100), (9, 2050)])
def test_silu_mul(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    gate_up = random(num_tokens, 2 * width, dtype=dtype) * 20
    out = poisoned(num_tokens, width, dtype=dtype)
    gpu.silu_mul(gate_up, out)
    assert_near(out, reference.silu_mul(gate_up.double()), ROUNDING[dtype])


@FLOATS
@pytest.mark.parametrize("width", [8, 100, 2050])
def test_embedding(dtype: torch.dtype, width: int) -> None:
    table, ids = random(50, width, dtype=dtype), torch.tensor([3, 0, 49, -1, 50, 3], device=DEVICE)
    out = poisoned(6, width)
    gpu.embed(ids.int(), table, out)
    want = table.float()[[3, 0, 49, 0, 0, 3]]
    want[3:5] = 0  # no tokens
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("block_bytes", [16, 192, 20_000])
def test_blocks_are_copied_and_no_others(dtype: torch.dtype, block_bytes: int) -> None:
    source = torch.randint(0, 255, (10 * block_bytes + 8,), dtype=torch.uint8, device=DEVICE)
    source = source.view(dtype)
    target = torch.zeros(7 * block_bytes, dtype=torch.uint8, device=DEVICE)
    want = target.clone()
    ids = torch.tensor([[9, 0, 4], [1, 6, 2]], dtype=torch.int32, device=DEVICE)
    reference.copy_blocks(source, want, ids[0], ids[1], block_bytes)
    gpu.copy_blocks(source, target, ids[0], ids[1], block_bytes)
    assert torch.equal(target, want)
    assert torch.equal(
        reference.blocks(target, block_bytes)[6], reference.blocks(source, block_bytes)[0]
    )


# -- rotation and the arena ------------------------------------------------------------------------


def turned(batch: Batch, rope: Tensor, norms: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """What `qkv` becomes, float32."""
    rows = batch.qkv[: batch.num_tokens].float().clone()
    q, k, _ = split(replace(batch, qkv=rows))
    for x, norm in zip((q, k), norms, strict=True):
        if norm is not None:
            reference.rms_norm_heads(x, norm, EPS)
    cos, sin = rope[:, batch.host_meta.positions.to(DEVICE)]
    reference.rope(q, k, cos, sin)
    return rows


@FLOATS
@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "groups", "head_dim", "block_tokens", "planes_per_block"),
    [(2, 1, 64, 16, 1), (3, 5, 128, 32, 8), (1, 8, 64, 16, 16), (2, 2, 80, 16, 8)],
)
def test_heads_are_normed_rotated_and_stored(
    dtype: torch.dtype,
    is_normed: bool,
    kv_heads: int,
    groups: int,
    head_dim: int,
    block_tokens: int,
    planes_per_block: int,
) -> None:
    batch = cached_batch(
        [(2, 0, 5), (0, 14, 4), (5, 33, 1)],
        groups,
        Planes(kv_heads, head_dim),
        dtype=dtype,
        block_tokens=block_tokens,
        planes_per_block=planes_per_block,
        padding=3,
    )
    rope = random(2, 40, head_dim // 2)
    norms = (random(head_dim), random(head_dim)) if is_normed else (None, None)
    want, before = turned(batch, rope, norms), batch.qkv.clone()
    arena = batch.kv.arena.clone()
    gpu.rope_and_store(batch.qkv, batch.kv, batch.meta, LAYER, (rope[0], rope[1]), norms, EPS)
    assert_near(batch.qkv[: batch.num_tokens], want, ROUNDING[dtype])
    assert torch.equal(batch.qkv[batch.num_tokens :], before[batch.num_tokens :])
    _, k, v = split(batch)
    _, _, old_v = split(replace(batch, qkv=before))
    assert torch.equal(v, old_v)
    reference.write_kv(k, v, batch.meta, replace(batch.kv, arena=arena), LAYER)
    assert torch.equal(bits(batch.kv.arena), bits(arena)), "K and V, and nothing else, are written"


def test_float8_is_rounded_to_the_nearest_and_at_most_448() -> None:
    batch = cached_batch(
        [(0, 0, 6)], 1, Planes(1, 64), dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn
    )
    values = torch.logspace(-4, 3, 6 * 64).view(6, 64) * torch.tensor([1.0, -1.0]).repeat(32)
    if IS_INTERPRETED:  # it cuts bits off, and loses a carry into the exponent: exact numbers only
        values = torch.where(values.abs() < 448, values.to(torch.float8_e4m3fn).float(), values)
    batch.qkv.view(6, 3, 64)[:] = values[:, None].to(DEVICE, torch.bfloat16)
    still = torch.stack((torch.ones(8, 32), torch.zeros(8, 32))).to(DEVICE)
    gpu.rope_and_store(batch.qkv, batch.kv, batch.meta, LAYER, (still[0], still[1]))
    rounded = values.bfloat16().clamp(-448, 448).to(torch.float8_e4m3fn)
    for got in reference.gather_kv(batch.kv, LAYER, 0, 6):
        assert torch.equal(got[:, 0].float().cpu(), rounded.float())


# -- attention -------------------------------------------------------------------------------------

DECODE = ((2, 0, 1), (0, 5, 1), (3, 37, 1), (1, 95, 1), (4, 15, 1), (5, 129, 1), (6, 16, 1))
PREFILL = ((2, 0, 33), (0, 5, 1), (3, 37, 20), (1, 95, 1), (4, 0, 1), (5, 16, 130), (6, 0, 64))
KV_DTYPES = pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
    ids=["fp32", "fp16", "bf16", "bf16-fp8"],
)
SHAPES = pytest.mark.parametrize(
    ("groups", "head_dim", "block_tokens", "planes_per_block"),
    [(1, 128, 16, 8), (2, 64, 32, 1), (3, 64, 16, 16), (5, 128, 32, 8), (8, 64, 16, 8)],
)


def decode(batch: Batch, sm_count: int) -> Tensor:
    out = batch.attended.to(batch.qkv.dtype)
    heads = out.shape[1] // batch.head_dim
    workspace = gpu.decode_workspace(batch.kv, heads, len(batch.meta.slots), 300, sm_count)
    assert (workspace.splits > 1) == (sm_count > 1)
    workspace.parts.fill_(torch.nan)
    workspace.weights.fill_(torch.nan)
    gpu.decode_attention(batch.qkv, batch.kv, batch.meta, LAYER, out, 0.11, workspace)
    return out


def prefill(batch: Batch) -> Tensor:
    out = batch.attended.to(batch.qkv.dtype)
    gpu.prefill_attention(batch.qkv, batch.kv, batch.meta, LAYER, out, 0.11)
    return out


@KV_DTYPES
@SHAPES
def test_decode(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    groups: int,
    head_dim: int,
    block_tokens: int,
    planes_per_block: int,
) -> None:
    torch.manual_seed(groups)
    batch = stored(
        cached_batch(
            DECODE,
            groups,
            Planes(2, head_dim),
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_tokens=block_tokens,
            planes_per_block=planes_per_block,
            padding=3,
        )
    )
    for sm_count in (1, 40):  # sequences whole, and in parts of which short ones leave some empty
        out = decode(batch, sm_count)
        assert_near(out[:7], expected(batch, 0.11), ROUNDING[dtype])
        assert out[7:].isnan().all(), "rows of padding are left as they are"


@KV_DTYPES
@SHAPES
def test_prefill(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    groups: int,
    head_dim: int,
    block_tokens: int,
    planes_per_block: int,
) -> None:
    torch.manual_seed(groups)
    batch = stored(
        cached_batch(
            PREFILL,
            groups,
            Planes(2, head_dim),
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_tokens=block_tokens,
            planes_per_block=planes_per_block,
            padding=3,
        )
    )
    out = prefill(batch)
    assert_near(out[: batch.num_tokens], expected(batch, 0.11), ROUNDING[dtype])
    assert out[batch.num_tokens :].isnan().all(), "rows of padding are left as they are"


@pytest.mark.parametrize("seed", range(4))
def test_attention_of_random_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    shape = Planes(int(rng.integers(1, 4)), int(rng.choice([64, 80, 128])))
    options = {
        "block_tokens": int(rng.choice([8, 16, 32, 48])),
        "planes_per_block": int(rng.choice([1, 3, 8, 16])),
        "padding": int(rng.integers(0, 3)),
    }
    groups, slots = int(rng.integers(1, 9)), rng.permutation(8)[: rng.integers(1, 9)].tolist()
    for most in (1, 90):
        sequences = [(s, int(rng.integers(0, 150)), int(rng.integers(1, most + 1))) for s in slots]
        batch = stored(cached_batch(sequences, groups, shape, **options))
        want = expected(batch, 0.11)
        assert_near(prefill(batch)[: batch.num_tokens], want, ROUNDING[torch.float32])
        if most == 1:
            assert_near(decode(batch, 20)[: batch.num_tokens], want, ROUNDING[torch.float32])


@pytest.mark.parametrize("is_decode", [True, False])
def test_large_scores_do_not_overflow(is_decode: bool) -> None:
    batch = cached_batch([(0, 150, 1), (1, 0, 1)], 4, Planes(1, 64))
    batch.qkv.mul_(300)
    stored(batch)
    got = decode(batch, 132) if is_decode else prefill(batch)
    assert_near(got, expected(batch, 0.11), 1e-5)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The same as a CUDA graph; where there is no GPU, itself."""
    step()  # compiles
    if DEVICE == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def test_a_captured_step_serves_any_batch_that_fits() -> None:
    """Captured once for 7 sequences, replayed for fewer: sizes are read on the device."""
    shape, dtype = Planes(2, 128), torch.bfloat16
    whole = cached_batch(DECODE, 4, shape, dtype=dtype)
    rope, before = random(2, 200, 64), whole.qkv.clone()
    table, ids = random(50, whole.qkv.shape[1], dtype=dtype), torch.arange(7, device=DEVICE)
    out, tokens = whole.attended.to(dtype), torch.empty(7, dtype=torch.int32, device=DEVICE)
    workspace = gpu.decode_workspace(whole.kv, 8, 7, 300, 132)
    zeros, ones = torch.zeros(7, device=DEVICE).double(), torch.ones(7, device=DEVICE).double()

    def step() -> None:
        gpu.embed(ids, table, whole.qkv)
        gpu.rope_and_store(whole.qkv, whole.kv, whole.meta, LAYER, (rope[0], rope[1]))
        gpu.decode_attention(whole.qkv, whole.kv, whole.meta, LAYER, out, 0.11, workspace)
        gpu.sample(out, zeros, ids, ones, zeros, ids, ids, tokens)

    replay = captured(step)
    for count in (7, 3, 1):
        slots, starts, counts = (list(column) for column in zip(*DECODE[:count], strict=True))
        host = make_meta(slots, starts, counts)
        fewer = on_device(host, 7 - count, 7 - count)
        for name in ("slots", "starts", "query_starts", "positions", "token_sequence"):
            getattr(whole.meta, name).copy_(getattr(fewer, name))
        out.fill_(torch.nan)
        replay()
        want = expected(replace(whole, host_meta=host), 0.11)
        assert_near(out[:count], want, ROUNDING[dtype])
        assert out[count:].isnan().all()
        assert torch.equal(tokens[:count], out[:count].argmax(dim=-1).int())
        assert (tokens[count:] == -1).all()
    assert not torch.equal(whole.qkv, before)


def far_arena(num_elems: int, dtype: torch.dtype) -> Tensor:
    """Of which only the pages that are touched take memory, on the CPU.

    The interpreter copies a tensor's whole storage back after a kernel: there the tensor is only
    the first elements, and kernels address what lies behind them.
    """
    if DEVICE == "cuda":
        return torch.empty(num_elems, dtype=dtype, device=DEVICE)
    return kernel_calls.sparse_arena(num_elems, dtype, 64 if IS_INTERPRETED else -1)


@pytest.mark.parametrize(("new", "block_tokens"), [(1, 16), (20, 32)])
def test_offsets_beyond_31_bits(new: int, block_tokens: int) -> None:
    """The last blocks of an arena of more than 2**32 elements: the same as in a small one."""
    shape = Planes(2, 64, num_layers=2)
    near = cached_batch(
        [(0, 0, 40 + new)], 2, shape, dtype=torch.float16, block_tokens=block_tokens
    )
    block_elems = 8 * near.kv.plane_elems
    num_blocks = 2**32 // block_elems + 64
    blocks = near.kv.block_table.shape[1]
    table = torch.arange(num_blocks - 1, num_blocks - 1 - blocks, -1, dtype=torch.int32)
    arena = far_arena(num_blocks * block_elems, torch.float16)
    far = replace(near.kv, arena=arena, block_table=table.view(1, -1).to(DEVICE))
    still = torch.stack((torch.ones(80, 32), torch.zeros(80, 32))).to(DEVICE)
    results = []
    for kv in (near.kv, far):
        for start, end in ((0, 40), (40, 40 + new)):
            meta = make_meta([0], [start], [end - start])
            batch = Batch(near.qkv[start:end].clone(), kv, on_device(meta), meta)
            gpu.rope_and_store(batch.qkv, kv, batch.meta, LAYER, (still[0], still[1]))
            results.append(prefill(batch))
        if new == 1:
            results.append(decode(batch, 132))
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


# -- sampling --------------------------------------------------------------------------------------


def draw_both(logits: Tensor, seed: int, **params: float) -> tuple[list[int], list[int]]:
    """Tokens of rows by the device's kernel and by the CPU's; what is not given is random."""
    rng = np.random.default_rng(seed)
    rows, vocab = logits.shape
    choices = {
        "temperature": [0.0, 1e-9, 0.3, 1.0, 2.5],
        "top_k": [0, 1, 5, 40, vocab - 1, vocab, vocab + 9],
        "top_p": [1.0, 0.9, 0.5, 1e-6],
        "min_p": [0.0, 0.02, 0.3],
    }
    drawn = {name: rng.choice(values, rows) for name, values in choices.items()}
    drawn |= {name: np.full(rows, value) for name, value in params.items()}
    temperatures, top_k, top_p, min_p = drawn.values()
    seeds = rng.integers(0, 2**64, rows, dtype=np.uint64)
    positions = rng.integers(0, 5000, rows)
    with Team() as team:
        numbers = uniforms(seeds, positions)
        want = kernels.sample(logits.clone(), temperatures, top_k, top_p, min_p, numbers, team)
    columns = (temperatures, top_k, top_p, min_p, seeds.view(np.int64), positions)
    out = torch.full((rows,), -7, dtype=torch.int32, device=DEVICE)
    gpu.sample(logits.to(DEVICE), *(torch.from_numpy(c).to(DEVICE) for c in columns), out)
    return out.tolist(), want.tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "vocab"), [(16, 3), (16, 97), (4, 5000)])
def test_tokens_are_those_of_the_cpu(seed: int, rows: int, vocab: int) -> None:
    torch.manual_seed(seed)
    got, want = draw_both(torch.randn(rows, vocab) * 3, seed)
    assert got == want


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    """Five weights stay; without the fifth's own, 0.9 of the mass would be that of four."""
    logits = (-0.1 * torch.arange(40)).repeat(40, 1)
    got, want = draw_both(logits, 0, temperature=1.0, top_k=5, top_p=0.9, min_p=0.0)
    assert got == want
    assert set(got) == set(range(5))


def test_min_p_keeps_a_share_of_the_best() -> None:
    """exp(-0.1 x 6) is 0.549, the next 0.497."""
    logits = (-0.1 * torch.arange(40)).repeat(40, 1)
    got, want = draw_both(logits, 0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.5)
    assert got == want
    assert set(got) == set(range(7))


@pytest.mark.parametrize("seed", range(4))
def test_equal_logits_stay_together(seed: int) -> None:
    torch.manual_seed(seed)
    got, want = draw_both(torch.randint(-2, 3, (16, 60)).float(), seed)
    assert got == want


def test_logits_that_are_not_finite() -> None:
    logits = torch.randn(5, 300)
    logits[0, 3], logits[1, 299], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, :299] = -torch.inf  # one token is left
    got, want = draw_both(logits, 0)
    assert got == want
    assert got[:4] == [-1, -1, -1, 299]


def test_a_batch_that_does_not_fit_is_refused() -> None:
    buffer = torch.zeros(DeviceMeta.num_ints(2, 3), dtype=torch.int32)
    found = "found 1 sequences with 4 tokens, expected at most 2 with 3"
    with pytest.raises(ValueError, match=found):
        DeviceMeta.over(buffer, 2, 3).fill(make_meta([0], [0], [4]))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU needs Triton")
def test_without_triton_everything_is_plain_torch() -> None:
    """As where it is not installed: nothing of it is imported."""
    code = """
import importlib.util, sys, torch
find_spec = importlib.util.find_spec
sys.modules["triton"] = None
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name)
from muxrt.kernels import gpu, plain
out = torch.zeros(2, 4)
gpu.silu_mul(torch.ones(2, 8), out)
assert gpu._kernels(out) is plain and out.min() > 0.7
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
