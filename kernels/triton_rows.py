"""Triton kernels over rows: embedding, norm of the residual stream, SiLU, and copies of blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a row that a program takes: 16 bytes per thread and load
COPIED = 2048  # words of 8 bytes of a block that a program copies
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def embed(ids: Tensor, table: Tensor, out: Tensor) -> None:
    vocab, width = table.shape
    grid = (len(ids), triton.cdiv(width, BLOCK))
    _embed[grid](ids, table, out, vocab, width, BLOCK)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))  # two loads of 16 bytes per thread
    has_add = add is not None
    _rms_norm[(rows,)](x, weight, out, add, eps, width, has_add, block, num_warps=warps)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    rows, width = out.shape
    _silu_mul[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, BLOCK)


def copy_blocks(
    src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor, block_bytes: int
) -> None:
    word_bytes = next(size for size in WORDS if block_bytes % size == 0)
    words = block_bytes // word_bytes
    arenas = (_words(arena, block_bytes, WORDS[word_bytes]) for arena in (src, dst))
    _copy_blocks[(len(src_ids), triton.cdiv(words, COPIED))](
        *arenas, src_ids, dst_ids, words, COPIED
    )


def _words(arena: Tensor, block_bytes: int, dtype: torch.dtype) -> Tensor:
    data = arena.view(torch.uint8)
    return data[: data.numel() // block_bytes * block_bytes].view(dtype)


@triton.jit
def _embed(
    ids: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    vocab: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row).to(tl.int64)
    is_token = (token >= 0) & (token < vocab)
    values = tl.load(table + token * width + columns, mask=is_token & (columns < width), other=0.0)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    add: tl.tensor,
    eps: tl.tensor,
    width: tl.tensor,
    HAS_ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    is_inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    values = tl.load(x + at, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_ADD:
        added = tl.load(add + at, mask=is_inside, other=0.0).to(tl.float32)
        residual = (values + added).to(x.dtype.element_ty)
        tl.store(x + at, residual, mask=is_inside)
        values = residual.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    weights = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + at, (values * scale * weights).to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    start = gate_up + row * 2 * width + columns
    gate = tl.load(start, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(start + width, mask=is_inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _copy_blocks(
    src: tl.tensor,
    dst: tl.tensor,
    src_ids: tl.tensor,
    dst_ids: tl.tensor,
    words: tl.tensor,
    COPIED: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    columns = tl.program_id(1) * COPIED + tl.arange(0, COPIED)
    is_inside = columns < words
    source = tl.load(src_ids + pair).to(tl.int64) * words + columns
    target = tl.load(dst_ids + pair).to(tl.int64) * words + columns
    tl.store(dst + target, tl.load(src + source, mask=is_inside), mask=is_inside)
