"""How fast attention reads and multiplies here, and what handing work to a team costs.

Writes docs/benchmarks/kernels.json and prints one line per case. Every figure is the best of many
runs: other load on the machine only ever adds time.

    python scripts/bench_kernels.py [--out FILE]
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from muxrt import kernels
from muxrt.kernels import AttentionMeta, KvCache, Team

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "kernels.json"
BLOCK_TOKENS, PLANES_PER_BLOCK = 16, 8
ARENA_BYTES = 256 * 2**20  # far more than any cache
REPEATS = 15
GIGA = 1e9


@dataclass(frozen=True)
class Case:
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


DECODE = [
    case
    for dtype in ("float32", "bfloat16")
    for case in (
        Case(8, 8, 64, 1, 999, 1, dtype),
        Case(8, 8, 64, 32, 199, 1, dtype),
        Case(32, 32, 128, 8, 999, 1, dtype),
        Case(32, 8, 128, 32, 999, 1, dtype),
        Case(32, 4, 64, 32, 999, 1, dtype),
    )
]
PREFILL = [
    Case(8, 8, 64, 1, 0, 128),
    Case(8, 8, 64, 1, 0, 512),
    Case(32, 8, 128, 1, 0, 512),
    Case(8, 8, 64, 1, 1024, 128),
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


def arena(case: Case) -> tuple[KvCache, AttentionMeta]:
    """Blocks in random order, with so many layers that no cache holds them all."""
    num_layers = max(1, ARENA_BYTES // case.kv_bytes)
    num_layers += -num_layers * case.kv_heads % PLANES_PER_BLOCK
    blocks_per_group = num_layers * case.kv_heads // PLANES_PER_BLOCK or 1
    columns = -(-(case.start + case.new) // BLOCK_TOKENS) * blocks_per_group
    table = torch.randperm(case.sequences * columns).to(torch.int32).view(case.sequences, columns)
    elems = table.numel() * PLANES_PER_BLOCK * 2 * BLOCK_TOKENS * case.head_dim
    kv = KvCache(
        torch.ones(elems, dtype=getattr(torch, case.dtype)),
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


def attention_s(case: Case, team: Team) -> float:
    """Seconds per layer, each run on the layer whose blocks were touched longest ago."""
    kv, meta = arena(case)
    qkv = torch.randn(len(meta.positions), case.heads + 2 * case.kv_heads, case.head_dim)
    q, k, v = qkv.split((case.heads, case.kv_heads, case.kv_heads), dim=1)
    layers = iter(range(10**9))

    def run() -> None:
        layer = next(layers) % kv.num_layers
        kernels.attention(q, k, v, meta, kv, layer, case.head_dim**-0.5, team)

    return best_s(run, max(REPEATS, 2 * min(kv.num_layers, 40)))


def torch_s(case: Case) -> float:
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


def measure() -> Iterator[dict[str, Any]]:
    """All figures, one dict per case."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with Team(size=threads) as team:
            for case in DECODE:
                seconds = attention_s(case, team)
                gb_per_s = case.kv_bytes / seconds / GIGA
                yield _row("decode", threads, case, seconds, gb_per_s=gb_per_s)
            for case in PREFILL:
                seconds, theirs_s = attention_s(case, team), torch_s(case)
                yield _row(
                    "prefill",
                    threads,
                    case,
                    seconds,
                    gflop_per_s=case.flops / seconds / GIGA,
                    sdpa_gflop_per_s=case.flops / theirs_s / GIGA,
                )
            yield from _costs_of_a_call(threads, team)


def _row(kind: str, threads: int, case: Case, seconds: float, **rates: float) -> dict[str, Any]:
    rounded = {name: round(rate, 2) for name, rate in rates.items()}
    return {"kind": kind, "threads": threads, **asdict(case), "ms": seconds * 1e3, **rounded}


def _costs_of_a_call(threads: int, team: Team) -> Iterator[dict[str, Any]]:
    """What is paid before any work is done."""
    x, weight = torch.randn(1, 512), torch.ones(512)
    nothing = Case(8, 8, 64, 1, 0, 1)
    calls: dict[str, Callable[[], Any]] = {
        "team hand-off": lambda: team.run(_nothing, threads),
        "rms_norm of 512": lambda: kernels.rms_norm(x, weight, 1e-5, team, x),
    }
    for name, call in calls.items():
        yield {"kind": name, "threads": threads, "us": best_s(call, 2000) * 1e6}
    yield {
        "kind": "attention to one token",
        "threads": threads,
        "us": attention_s(nothing, team) * 1e6,
    }


def _nothing(begin: int, end: int) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    kernels.warm_up()
    rows = []
    for row in measure():
        rows.append(row)
        print(
            "  ".join(f"{k}={round(v, 3) if isinstance(v, float) else v}" for k, v in row.items())
        )
    machine = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")
    print(f"written to {out}")


def _processor() -> str:
    """The name Linux has for it; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


if __name__ == "__main__":
    main()
