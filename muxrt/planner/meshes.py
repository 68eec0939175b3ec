"""Ways of cutting a cluster into meshes, as counts: which nodes hold them does not matter."""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from math import prod

from muxrt.errors import ConfigError
from muxrt.planner.draft import packs_pool
from muxrt.planner.workload import Pool, Problem

Mesh = tuple[int, int]  # pool, GPUs
MeshGroup = Counter[Mesh]


def mesh_sizes(pool: Pool, largest: int) -> tuple[int, ...]:
    """Powers of two up to a node, largest first."""
    return tuple(size for size in (16, 8, 4, 2, 1) if size <= pool.widest(largest))


def mesh_groups(problem: Problem, most: int) -> list[MeshGroup]:
    """At most `most` ways to use every GPU, evenly spread over all of them if there are more."""
    ways = [list(_pool_ways(pool, problem.largest_tp, most)) for pool in problem.pools]
    total = prod(len(way) for way in ways)
    stride = max(1, -(-total // most))
    found = []
    for index, combination in enumerate(product(*ways)):
        if index % stride == 0:
            found.append(
                Counter(
                    {(pool, size): n for pool, c in enumerate(combination) for size, n in c.items()}
                )
            )
    return found


def _pool_ways(pool: Pool, largest: int, most: int) -> Iterator[Counter[int]]:
    """Counts per size that use all GPUs of a pool; steps widen where there would be too many."""
    sizes = mesh_sizes(pool, largest)
    step = 1
    while _num_ways(pool.num_gpus, sizes, step) > most:
        step *= 2
    for counts in _counts(pool.num_gpus, sizes, step):
        if packs_pool(counts, pool):
            yield counts


def _num_ways(gpus: int, sizes: tuple[int, ...], step: int) -> int:
    """An upper bound, without the last size, which takes the rest."""
    return prod(gpus // (size * step) + 1 for size in sizes[:-1])


def _counts(gpus: int, sizes: tuple[int, ...], step: int) -> Iterator[Counter[int]]:
    size, rest = sizes[0], sizes[1:]
    if not rest:
        if gpus % size == 0:
            yield Counter({size: gpus // size} if gpus else {})
        return
    for count in range(0, gpus // size + 1, step):
        for counts in _counts(gpus - count * size, rest, step):
            yield counts + Counter({size: count})


def smallest_mesh(problem: Problem, model: str) -> Mesh:
    """The mesh with the fewest GPUs that holds a model alone.

    Raises ConfigError with the nearest feasible alternative where no mesh does.
    """
    found = [
        (tp, pool.index)
        for pool in problem.pools
        for tp in problem.tps(model, pool.index)
        if problem.fits(pool.index, tp, (model,))
    ]
    if not found:
        raise ConfigError(_fits_nowhere(problem, model))
    tp, pool = min(found)
    return pool, tp


def _fits_nowhere(problem: Problem, model: str) -> str:
    tried = [
        (problem.kv_bytes(pool.index, tp, (model,)), tp, pool)
        for pool in problem.pools
        for tp in problem.tps(model, pool.index)
    ]
    demand = problem.demands[model]
    if not tried:
        return (
            f"{model}: found {demand.shape.num_heads} heads, which no mesh of these nodes divides,"
            " expected a tp that divides heads and intermediate_size"
        )
    room, tp, pool = max(tried, key=lambda item: item[:2])
    part = problem.bytes(model, tp)
    need = part.kv_per_token * demand.max_tokens
    lacking = need - room
    text = (
        f"{model} fits nowhere: on {tp} x {pool.gpu.name}, its largest mesh, each GPU needs"
        f" {part.weights / 1e9:.1f} GB of weights, {part.activations / 1e9:.1f} GB of activations"
        f" and {need / 1e9:.1f} GB of KV for one sequence of {demand.max_tokens} tokens:"
        f" {lacking / 1e9:.1f} GB more than its {pool.gpu.memory_bytes / 1e9:.0f} GB hold"
    )
    if room > part.kv_per_token:
        return f"{text}; max_model_len {room // part.kv_per_token} would fit"
    return f"{text}; a GPU with {(pool.gpu.memory_bytes + lacking) / 0.98e9:.0f} GB would do"
