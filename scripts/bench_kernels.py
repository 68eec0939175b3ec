"""How fast the kernels read and multiply here, beside torch's, and what a program costs.

Writes docs/benchmarks/kernels.json and prints one line per case. Every figure is the best of many
runs: other load on the machine only ever adds time.

    python scripts/bench_kernels.py [--out FILE]
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from bench_record import CORES, FOLDER, Record

from muxrt.kernels import (
    AttentionMeta,
    KvCache,
    Packed,
    Pages,
    Program,
    Team,
    pack_into,
    packed_elems,
    warm_up,
)

BLOCK_TOKENS, PLANES_PER_BLOCK = 16, 8
LARGE_BYTES = 256 * 2**20  # more than a model of the benchmarks
REPEATS = 15
GIGA = 1e9


@dataclass(frozen=True)
class Attention:
    """A batch of equal sequences: `start` cached tokens and `new` ones each."""

    heads: int
    kv_heads: int
    head_dim: int
    sequences: int
    start: int
    new: int
    dtype: str = "float32"

    @property
    def kv_bytes(self) -> int:
        """K and V that one layer reads."""
        itemsize = getattr(torch, self.dtype).itemsize
        tokens = self.sequences * (self.start + self.new)
        return int(2 * tokens * self.kv_heads * self.head_dim * itemsize)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the causal part of one layer."""
        pairs = self.sequences * self.new * (self.start + (self.new + 1) / 2)
        return 4 * pairs * self.heads * self.head_dim


@dataclass(frozen=True)
class Linear:
    """Layers of one shape, so many that their weights are large, over `rows` tokens."""

    rows: int
    features: int
    depth: int
    dtype: str = "float32"
    is_prefill: bool = False

    @property
    def num_layers(self) -> int:
        itemsize = getattr(torch, self.dtype).itemsize
        return max(1, LARGE_BYTES // 2 // (self.features * self.depth * itemsize))


DECODE = [
    case
    for dtype in ("float32", "bfloat16")
    for case in (
        Attention(8, 8, 64, 1, 999, 1, dtype),
        Attention(8, 8, 64, 32, 199, 1, dtype),
        Attention(32, 32, 128, 8, 999, 1, dtype),
        Attention(32, 8, 128, 32, 999, 1, dtype),
        Attention(32, 4, 64, 32, 999, 1, dtype),
    )
]
PREFILL = [
    Attention(8, 8, 64, 1, 0, 128),
    Attention(8, 8, 64, 1, 0, 512),
    Attention(32, 8, 128, 1, 0, 512),
    Attention(8, 8, 64, 1, 1024, 128),
]
LINEAR = [
    Linear(rows, 1536, 512, dtype, is_prefill)
    for dtype in ("float32", "bfloat16", "int8")
    for is_prefill, counts in ((False, (1, 4, 8, 16, 32, 64)), (True, (32, 64, 128, 512)))
    for rows in counts
]


def best_s(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Seconds of the fastest run."""
    run()
    times = []
    for _ in range(repeats):
        begun_s = perf_counter()
        run()
        times.append(perf_counter() - begun_s)
    return min(times)


def arena(case: Attention) -> tuple[KvCache, AttentionMeta]:
    """Blocks in random order, with so many layers that no cache of a core holds them all."""
    num_layers = max(1, LARGE_BYTES // case.kv_bytes)
    num_layers += -num_layers * case.kv_heads % PLANES_PER_BLOCK
    blocks_per_group = num_layers * case.kv_heads // PLANES_PER_BLOCK or 1
    columns = -(-(case.start + case.new) // BLOCK_TOKENS) * blocks_per_group
    table = torch.randperm(case.sequences * columns).to(torch.int32).view(case.sequences, columns)
    elems = table.numel() * PLANES_PER_BLOCK * 2 * BLOCK_TOKENS * case.head_dim
    dtype = getattr(torch, case.dtype)
    kv = KvCache(
        Pages(elems * dtype.itemsize).tensor((elems,), dtype).fill_(1),
        table,
        num_layers,
        case.kv_heads,
        case.head_dim,
        BLOCK_TOKENS,
        blocks_per_group,
        PLANES_PER_BLOCK,
    )
    counts = torch.arange(case.sequences + 1, dtype=torch.int32)
    owners = counts[:-1].repeat_interleave(case.new)
    positions = torch.arange(case.start, case.start + case.new).repeat(case.sequences)
    starts = torch.full((case.sequences,), case.start, dtype=torch.int32)
    return kv, AttentionMeta(counts[:-1], starts, counts * case.new, positions, owners)


def attention_s(case: Attention, team: Team) -> float:
    """Seconds per layer, of a program that goes through all layers."""
    kv, meta = arena(case)
    program = Program(team, len(meta.positions))
    qkv = program.floats((case.heads + 2 * case.kv_heads) * case.head_dim)
    out = program.floats(case.heads * case.head_dim)
    qkv[:] = 0.1
    positions = case.start + case.new
    rope = (torch.ones(positions, case.head_dim // 2), torch.zeros(positions, case.head_dim // 2))
    for layer in range(kv.num_layers):
        program.attention(qkv, kv, layer, out, rope=rope, scale=case.head_dim**-0.5)
    tokens = torch.zeros(len(meta.positions), dtype=torch.int64).numpy()
    return best_s(lambda: program.run_batch(tokens, meta.arrays)) / kv.num_layers


def sdpa_s(case: Attention) -> float:
    """Seconds of torch's attention over K and V that lie gathered already."""
    total = case.start + case.new
    q = torch.randn(1, case.heads, case.new, case.head_dim)
    k, v = torch.randn(2, 1, case.kv_heads, total, case.head_dim)
    later = torch.arange(total)[None] > case.start + torch.arange(case.new)[:, None]
    mask = None if case.start == 0 else ~later
    return best_s(
        lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
    )


def linear_s(case: Linear, team: Team) -> float:
    """Seconds per layer, of a program that goes through all layers."""
    dtype = getattr(torch, case.dtype)
    elems, weight = packed_elems(case.features, case.depth), torch.randn(case.features, case.depth)
    pages = Pages(case.num_layers * Pages.rounded(elems * dtype.itemsize))
    program = Program(team, case.rows, case.is_prefill)
    x, out = program.floats(case.depth), program.floats(case.features)
    x[:] = 0.1
    for _ in range(case.num_layers):
        data = pages.tensor((elems,), dtype)
        scales = pack_into(data, weight)
        program.linear(x, Packed(data, scales, None, case.features, case.depth), out)
    return best_s(lambda: program.run_rows(case.rows)) / case.num_layers


def torch_linear_s(case: Linear) -> dict[str, float]:
    """Seconds per layer of torch's two ways, in float32."""
    x = torch.full((case.rows, case.depth), 0.1)
    plain = [torch.randn(case.features, case.depth) for _ in range(case.num_layers)]
    mkldnn = torch.ops.mkldnn
    packed = [mkldnn._reorder_linear_weight(w, case.rows) for w in plain]

    def run_packed() -> None:
        for weight in packed:
            mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return {
        "F.linear": best_s(lambda: [F.linear(x, w) for w in plain]) / case.num_layers,
        "oneDNN packed": best_s(run_packed) / case.num_layers,
    }


def measure() -> Iterator[dict[str, Any]]:
    """All figures, one dict per case."""
    for threads in range(1, min(2, len(CORES)) + 1):
        torch.set_num_threads(threads)
        with Team(size=threads) as team:
            for attention in (*DECODE, *PREFILL):
                yield _attention_row(attention, team)
            for linear in LINEAR:
                yield _linear_row(linear, team)
            yield _cost_of_a_program(team)


def _attention_row(case: Attention, team: Team) -> dict[str, Any]:
    seconds = attention_s(case, team)
    if case.new == 1:
        figures = {"kind": "decode", "gb_per_s": case.kv_bytes / seconds / GIGA}
    else:
        theirs = case.flops / sdpa_s(case) / GIGA
        figures = {"kind": "prefill", "gflop_per_s": case.flops / seconds / GIGA, "sdpa": theirs}
    return _row(figures, team, case, seconds)


def _linear_row(case: Linear, team: Team) -> dict[str, Any]:
    seconds = linear_s(case, team)
    num_bytes = case.features * case.depth * getattr(torch, case.dtype).itemsize
    flops = 2 * case.rows * case.features * case.depth
    figures: dict[str, Any] = {"kind": "linear", "gb_per_s": num_bytes / seconds / GIGA}
    figures["gflop_per_s"] = flops / seconds / GIGA
    if case.dtype == "float32":
        figures |= {name: flops / s / GIGA for name, s in torch_linear_s(case).items()}
    return _row(figures, team, case, seconds)


def _row(
    figures: dict[str, Any], team: Team, case: Attention | Linear, seconds: float
) -> dict[str, Any]:
    rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()}
    return {**rounded, "threads": team.size, **asdict(case), "ms": round(seconds * 1e3, 4)}


def _cost_of_a_program(team: Team) -> dict[str, Any]:
    """What is paid besides the work: handing a program to the team, and each stage of it."""
    times = []
    for stages in (1, 101):
        program = Program(team, 1)
        x, weight = program.floats(16), torch.ones(16)
        x[:] = 1
        for _ in range(stages):
            program.rms_norm(x, weight, 1e-5, x)
        times.append(best_s(lambda program=program: program.run_rows(1), 2000))  # type: ignore[misc]
    per_stage_us = (times[1] - times[0]) / 100 * 1e6
    return {
        "kind": "program",
        "threads": team.size,
        "us": round(times[0] * 1e6, 2),
        "us_per_stage": round(per_stage_us, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER / "kernels.json")
    out = parser.parse_args().out
    warm_up()
    record = Record(out, {"torch": torch.__version__, "repeats": REPEATS})
    for row in measure():
        record.add("results", row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
