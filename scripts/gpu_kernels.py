"""Cases of bench_gpu.py --part kernels: each kernel checked against float64, then timed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Bound, Case, Figure, median_ms, relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from muxrt.kernels import (
    AttentionMeta,
    DeviceMeta,
    KvCache,
    gpu,
    plain,
    reference,
    triton_kernels,
)
from muxrt.kernels import device as sizes
from muxrt.kernels.device import Tiling

CEILINGS = ("copy", "matmul")  # cases that the others are fractions of
TOLERANCE = 2e-2  # of bfloat16 results; the table says how large each error is
BLOCK_TOKENS, PLANES_PER_BLOCK = 16, 16


@dataclass(frozen=True)
class Sizes:
    """How large the cases are: several times the cache, or tiny for the interpreter."""

    heads: int = 32  # of the 7B shape
    head_dim: int = 128
    batch: int = 64
    context: int = 1024
    long_context: int = 16_384
    prompts: int = 8
    prompt_tokens: int = 2048
    rows: int = 16_384
    hidden: int = 4096
    intermediate: int = 11_008
    vocab: int = 32_000
    copy_bytes: int = 4 << 30
    matmul: int = 8192
    # What the chosen tilings are compared with.
    decode_tilings: tuple[Tiling, ...] = tuple(
        Tiling(rows, tokens, stages, 4)
        for rows in (1, 16)
        for tokens in (32, 64, 128)
        for stages in (2, 3, 4)
    )
    prefill_tilings: tuple[Tiling, ...] = (
        Tiling(128, 64, 2, 4),
        Tiling(128, 64, 3, 8),
        Tiling(128, 128, 2, 8),
        Tiling(64, 64, 3, 4),
        Tiling(64, 128, 2, 4),
    )


TINY = Sizes(
    4,
    64,
    3,
    70,
    150,
    2,
    70,
    5,
    64,
    96,
    300,
    1 << 16,
    64,
    (Tiling(16, 32, 2, 4),),
    (Tiling(64, 64, 3, 4),),
)


@dataclass(frozen=True)
class Attention:
    """Sequences with `start` cached and `new` new tokens each."""

    sequences: int
    start: int
    new: int
    heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype = torch.bfloat16

    @property
    def kv_bytes(self) -> int:
        """K and V of all tokens, of one layer."""
        tokens = self.sequences * (self.start + self.new)
        return 2 * tokens * self.kv_heads * self.head_dim * self.kv_dtype.itemsize

    @property
    def flops(self) -> int:
        """Two products per pair of a query and a token it sees."""
        pairs = self.new * self.start + self.new * (self.new + 1) // 2
        return 4 * self.sequences * pairs * self.heads * self.head_dim


@dataclass(frozen=True)
class World:
    """A batch whose K and V are stored, of one layer."""

    qkv: Tensor
    kv: KvCache
    meta: DeviceMeta
    out: Tensor

    def checked(self, run: Callable[[], Any]) -> float:
        """The relative error of what `run` leaves in `out`."""
        self.out.fill_(torch.nan)
        run()
        q, _, _ = plain.split(self.qkv, self.kv)
        want = torch.empty(q.shape, dtype=torch.float64, device=q.device)
        reference.attend(q.double(), self.meta, self.kv, 0, q.shape[-1] ** -0.5, want)
        return relative_error(self.out, want.flatten(1))


def world(case: Attention, device: torch.device) -> World:
    """Random K and V in blocks in random order."""
    total = case.start + case.new
    groups = -(-total // BLOCK_TOKENS)
    per_group = -(-case.kv_heads // PLANES_PER_BLOCK)
    blocks = case.sequences * groups * per_group
    elems = blocks * PLANES_PER_BLOCK * 2 * BLOCK_TOKENS * case.head_dim
    arena = torch.empty(elems, dtype=case.kv_dtype, device=device)
    for part in arena.split(1 << 28):  # float32 on the way: not all at once
        part.copy_(torch.randn(len(part), device=device))
    table = torch.randperm(blocks, device=device).to(torch.int32).view(case.sequences, -1)
    kv = KvCache(
        arena, table, 1, case.kv_heads, case.head_dim, BLOCK_TOKENS, per_group, PLANES_PER_BLOCK
    )
    counts = torch.full((case.sequences,), case.new)
    starts = torch.full((case.sequences,), case.start, dtype=torch.int32)
    meta = AttentionMeta(
        torch.arange(case.sequences, dtype=torch.int32),
        starts,
        F.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        (case.start + torch.arange(case.new)).repeat(case.sequences),
        torch.arange(case.sequences).repeat_interleave(case.new).to(torch.int32),
    )
    num_tokens = case.sequences * case.new
    buffer = torch.zeros(DeviceMeta.num_ints(case.sequences, num_tokens), dtype=torch.int32)
    DeviceMeta.over(buffer, case.sequences, num_tokens).fill(meta)
    on_device = DeviceMeta.over(buffer.to(device), case.sequences, num_tokens)
    width = (case.heads + 2 * case.kv_heads) * case.head_dim
    qkv = torch.randn(num_tokens, width, device=device).bfloat16()
    return World(qkv, kv, on_device, qkv.new_empty(num_tokens, case.heads * case.head_dim))


def cases(size: Sizes, device: torch.device) -> Iterator[Case]:
    """All of the part, the ceilings first."""
    yield Case("copy", partial(copy, size, device))
    yield Case("matmul", partial(matmul, size, device))
    yield from decode_cases(size, device)
    yield from prefill_cases(size, device)
    yield from row_cases(size, device)
    yield from sampling_cases(size, device)


# -- ceilings --------------------------------------------------------------------------------------


def copy(size: Sizes, device: torch.device) -> Figure:
    """A large copy on the device: bytes read and written."""
    source = torch.randint(0, 255, (size.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Figure(
        median_ms(lambda: target.copy_(source), device), "bytes", 2 * size.copy_bytes, None
    )


def matmul(size: Sizes, device: torch.device) -> Figure:
    """A large bfloat16 product of random matrices."""
    a, b = (torch.randn(size.matmul, size.matmul, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return Figure(
        median_ms(lambda: torch.mm(a, b, out=out), device), "flops", 2 * size.matmul**3, None
    )


# -- attention -------------------------------------------------------------------------------------


def decode_cases(size: Sizes, device: torch.device) -> Iterator[Case]:
    seven = Attention(size.batch, size.context - 1, 1, size.heads, size.heads, size.head_dim)
    chip = sizes.chip_of(device)
    long = replace(seven, sequences=1, start=size.long_context - 1)
    shapes = {
        "decode 7B": seven,
        "decode 7B fp8": replace(seven, kv_dtype=torch.float8_e4m3fn),
        "decode GQA 4": replace(seven, kv_heads=size.heads // 4),
        "decode 7B, one long": long,
        "decode GQA 4, one long": replace(long, kv_heads=size.heads // 4),
    }
    for name, case in shapes.items():
        yield Case(name, partial(decode, case, device, chip.sm_count))
    yield Case(
        "decode 7B, half the SMs' splits", partial(decode, seven, device, chip.sm_count // 2)
    )
    for tiling in size.decode_tilings:
        if tiling.shared_bytes(size.head_dim, 0, 2) <= chip.shared_bytes:
            yield Case(
                f"decode 7B, {_said(tiling)}", partial(decode, seven, device, chip.sm_count, tiling)
            )


def _said(tiling: Tiling) -> str:
    return f"{tiling.rows} x {tiling.tokens} x {tiling.stages}, {tiling.warps} warps"


def decode(
    case: Attention, device: torch.device, sm_count: int, tiling: Tiling | None = None
) -> Figure:
    given = world(case, device)
    workspace = gpu.decode_workspace(
        given.kv, case.heads, case.sequences, case.start + 1, max(1, sm_count)
    )
    if tiling is not None:
        workspace = replace(workspace, tiling=tiling)
    scale = case.head_dim**-0.5

    def run() -> None:
        gpu.decode_attention(given.qkv, given.kv, given.meta, 0, given.out, scale, workspace)

    return timed(run, device, "bytes", case.kv_bytes, partial(given.checked, run))


def prefill_cases(size: Sizes, device: torch.device) -> Iterator[Case]:
    seven = Attention(size.prompts, 0, size.prompt_tokens, size.heads, size.heads, size.head_dim)
    half = size.prompt_tokens // 2
    shapes = {
        "prefill 7B": seven,
        "prefill GQA 4": replace(seven, kv_heads=size.heads // 4),
        "prefill 7B fp8": replace(seven, kv_dtype=torch.float8_e4m3fn),
        "prefill 7B, half cached": replace(seven, start=half, new=half),
    }
    for name, case in shapes.items():
        yield Case(name, partial(prefill, case, device))
    chip = sizes.chip_of(device)
    for tiling in size.prefill_tilings:
        if tiling.shared_bytes(size.head_dim, 2, 2) <= chip.shared_bytes:
            yield Case(f"prefill 7B, {_said(tiling)}", partial(prefill, seven, device, tiling))
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        yield Case(f"torch's {backend.lower()}", partial(torch_prefill, seven, device, backend))
    yield Case("torch's varlen_attn", partial(torch_varlen, seven, device))


def prefill(case: Attention, device: torch.device, tiling: Tiling | None = None) -> Figure:
    given = world(case, device)
    scale = case.head_dim**-0.5

    def run() -> None:
        triton_kernels.prefill_attention(
            given.qkv, given.kv, given.meta, 0, given.out, scale, tiling
        )

    return timed(run, device, "flops", case.flops, partial(given.checked, run))


def torch_prefill(case: Attention, device: torch.device, backend: str) -> Figure:
    """torch's attention of prompts of one length without a cached prefix, a backend alone."""
    shape = (case.sequences, case.heads, case.new, case.head_dim)
    q, k, v = (torch.randn(shape, device=device).bfloat16() for _ in range(3))

    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _if_it_runs(run, case, device)


def torch_varlen(case: Attention, device: torch.device) -> Figure:
    """torch's attention of prompts of any lengths without a cached prefix, from `qkv` as it is."""
    given = world(case, device)
    q, k, v = plain.split(given.qkv, given.kv)
    starts = given.meta.query_starts

    def run() -> Tensor:
        return varlen_attn(q, k, v, starts, starts, case.new, case.new, window_size=(-1, 0))

    return _if_it_runs(run, case, device)


def _if_it_runs(run: Callable[[], Any], case: Attention, device: torch.device) -> Figure:
    """Of torch's ways, which not every device and version has."""
    try:
        run()
    except (RuntimeError, TypeError) as error:
        return Figure(None, "flops", case.flops, None, f"not here: {error!s:.60}")
    return timed(run, device, "flops", case.flops, None)


# -- rows ------------------------------------------------------------------------------------------


def row_cases(size: Sizes, device: torch.device) -> Iterator[Case]:
    yield Case("norm of the residual", partial(norm, size, device))
    yield Case("silu x up", partial(silu, size, device))
    yield Case("rope and KV write", partial(rope, size, device))
    yield Case("embedding", partial(embedding, size, device))
    yield Case("copy of blocks", partial(block_copy, size, device))


def norm(size: Sizes, device: torch.device) -> Figure:
    x, add = (torch.randn(size.rows, size.hidden, device=device).bfloat16() for _ in range(2))
    weight, out = torch.randn(size.hidden, device=device).bfloat16(), torch.empty_like(x)
    add *= 1e-3  # x grows with every run

    def error() -> float:
        out.fill_(torch.nan)
        want = reference.rms_norm((x + add).float(), weight, 1e-5)
        gpu.rms_norm(x, weight, 1e-5, out, add)
        return relative_error(out, want)

    run = partial(gpu.rms_norm, x, weight, 1e-5, out, add)
    return timed(run, device, "bytes", 4 * x.nbytes, error)


def silu(size: Sizes, device: torch.device) -> Figure:
    gate_up = torch.randn(size.rows, 2 * size.intermediate, device=device).bfloat16()
    out = gate_up.new_full((size.rows, size.intermediate), torch.nan)

    def error() -> float:
        gpu.silu_mul(gate_up, out)
        few = slice(0, 1024)  # float64 of all would not fit beside it
        return relative_error(out[few], reference.silu_mul(gate_up[few].double()))

    run = partial(gpu.silu_mul, gate_up, out)
    return timed(run, device, "bytes", 3 * out.nbytes, error)


def rope(size: Sizes, device: torch.device) -> Figure:
    """All of q, k, v read; q and k, then K and V written."""
    heads = size.heads
    tokens = size.rows // size.prompts
    case = Attention(size.prompts, 0, max(1, tokens), heads, heads, size.head_dim)
    given = world(case, device)
    angles = torch.rand(2, case.new, size.head_dim // 2, device=device)
    turns = (angles[0].cos(), angles[0].sin())

    def error() -> float:
        want, cache = given.qkv.clone(), replace(given.kv, arena=given.kv.arena.clone())
        plain.rope_and_store(want, cache, given.meta, 0, turns, (None, None), 0.0)
        gpu.rope_and_store(given.qkv, given.kv, given.meta, 0, turns)
        stored = relative_error(given.kv.arena, cache.arena)
        return max(stored, relative_error(given.qkv, want))

    run = partial(gpu.rope_and_store, given.qkv, given.kv, given.meta, 0, turns)
    num_bytes = given.qkv.nbytes // 3 * 7
    return timed(run, device, "bytes", num_bytes, error)


def embedding(size: Sizes, device: torch.device) -> Figure:
    table = torch.randn(size.vocab, size.hidden, device=device).bfloat16()
    ids = torch.randint(0, size.vocab, (size.rows,), dtype=torch.int32, device=device)
    out = table.new_full((size.rows, size.hidden), torch.nan)

    def error() -> float:
        gpu.embed(ids, table, out)
        return relative_error(out, table[ids.long()])

    return timed(partial(gpu.embed, ids, table, out), device, "bytes", 2 * out.nbytes, error)


def block_copy(size: Sizes, device: torch.device) -> Figure:
    """An eighth of a large copy, in blocks in random order."""
    block_bytes = PLANES_PER_BLOCK * 2 * BLOCK_TOKENS * size.head_dim * 2
    num_blocks = max(2, size.copy_bytes // 8 // block_bytes)
    source = torch.randint(0, 255, (num_blocks * block_bytes,), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    src, dst = (torch.randperm(num_blocks, device=device).to(torch.int32) for _ in range(2))

    def error() -> float:
        gpu.copy_blocks(source, target, src, dst, block_bytes)
        blocks = (reference.blocks(arena, block_bytes) for arena in (target, source))
        got, want = (x[ids.long()] for x, ids in zip(blocks, (dst, src), strict=True))
        return 0.0 if torch.equal(got, want) else float("nan")

    run = partial(gpu.copy_blocks, source, target, src, dst, block_bytes)
    return timed(run, device, "bytes", 2 * source.nbytes, error)


# -- sampling --------------------------------------------------------------------------------------


def sampling_cases(size: Sizes, device: torch.device) -> Iterator[Case]:
    """The amount is the logits once: how many passes over them a draw costs is what is asked."""
    for name, heat, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("temperature", 1.0, 0, 1.0),
        ("top-k", 1.0, 40, 1.0),
        ("top-k, top-p", 0.8, 40, 0.9),
        ("top-p", 1.0, 0, 0.9),
    ):
        for rows, vocab in ((size.batch, size.vocab), (1, 4 * size.vocab)):
            given = (device, rows, vocab, heat, top_k, top_p)
            title = f"sample {name}, {rows} x {vocab}"
            yield Case(title, partial(sampling, gpu, *given))
            yield Case(f"{title}, torch's sort", partial(sampling, plain, *given))


def sampling(
    kernels: Any,
    device: torch.device,
    rows: int,
    vocab: int,
    heat: float,
    top_k: int,
    top_p: float,
) -> Figure:
    logits = torch.randn(rows, vocab, device=device) * 3
    options = {"dtype": torch.float64, "device": device}
    columns = (
        torch.full((rows,), heat, **options),
        torch.full((rows,), top_k, device=device),
        torch.full((rows,), top_p, **options),
        torch.zeros(rows, **options),
        torch.randint(0, 2**62, (rows,), device=device),
        torch.arange(rows, device=device),
    )
    out = torch.empty(rows, dtype=torch.int32, device=device)

    def error() -> float:
        """The share of rows whose token is not that of the definition: none, but for rounding."""
        kernels.sample(logits, *columns, out)
        want = torch.empty_like(out)
        plain.sample(logits, *columns, want)
        return float((out != want).double().mean())

    run = partial(kernels.sample, logits, *columns, out)
    return timed(run, device, "bytes", logits.nbytes, error)


def timed(
    run: Callable[[], Any],
    device: torch.device,
    bound: Bound,
    amount: float,
    error: Callable[[], float] | None,
) -> Figure:
    """Correct first: a kernel that is wrong is not timed."""
    found = None if error is None else error()
    if found is not None and not found <= TOLERANCE:
        return Figure(None, bound, amount, found, "wrong, so not timed")
    return Figure(median_ms(run, device), bound, amount, found)
