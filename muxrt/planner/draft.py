"""A placement as counts: which models share a mesh of how many GPUs, not yet which GPUs."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from muxrt.planner.workload import Pool, Problem


class Part(NamedTuple):
    """A model in a group, and the share of its requests that it gets there."""

    model: str
    traffic: float = 1.0
    decode_pct: int | None = None  # MuxServe: its own share of SMs for decodes


class Group(NamedTuple):
    """A mesh of `size` GPUs of one node and the models on it; tensor parallel over all of them."""

    pool: int
    size: int
    parts: tuple[Part, ...]
    prefill_pct: int | None = None  # of the SMs while decodes run; None: one lane, in turns

    @property
    def models(self) -> tuple[str, ...]:
        return tuple([part.model for part in self.parts])

    def traffic(self, model: str) -> float:
        """The share of a model's requests that it gets here."""
        return next((part.traffic for part in self.parts if part.model == model), 0.0)

    def with_parts(self, parts: Iterable[Part]) -> "Group":
        return Group(self.pool, self.size, tuple(sorted(parts)), self.prefill_pct)

    def with_size(self, size: int) -> "Group":
        return Group(self.pool, size, self.parts, self.prefill_pct)


Draft = tuple[Group, ...]


def num_gpus(draft: Draft) -> int:
    """GPUs that the draft uses."""
    return sum(group.size for group in draft)


def packs(draft: Draft, pools: tuple[Pool, ...]) -> bool:
    """Whether the meshes fit the nodes, none across two of them."""
    sizes = [Counter[int]() for _ in pools]
    for group in draft:
        sizes[group.pool][group.size] += 1
    return all(packs_pool(sizes[pool.index], pool) for pool in pools)


def packs_pool(sizes: Counter[int], pool: Pool) -> bool:
    """`packs` for one pool; first fit of the largest first, which is exact for powers of two.

    Each size divides the next (Coffman et al. 1987). Nodes are alike, so only what is left of them
    counts: gaps of g GPUs in so many nodes.
    """
    gaps = Counter({pool.gpus_per_node: pool.num_nodes})
    for size, count in sorted(sizes.items(), reverse=True):
        for gap in sorted(gap for gap in gaps if gap >= size):
            per_node = gap // size
            nodes = min(gaps[gap], -(-count // per_node))
            full, rest = divmod(min(count, nodes * per_node), per_node)
            gaps[gap] -= full + (rest > 0)
            gaps[gap - per_node * size] += full
            if rest:
                gaps[gap - rest * size] += 1
            count -= full * per_node + rest
            if not count:
                break
        if count:
            return False
        gaps = +gaps
    return True


def check_draft(draft: Draft, problem: Problem) -> None:
    """Our own invariants: everything fits, and each model's traffic adds up."""
    assert packs(draft, problem.pools), "the meshes do not fit the nodes"
    dealt = dict.fromkeys(problem.demands, 0.0)
    for group in draft:
        assert problem.fits(group.pool, group.size, group.models), f"{group} does not fit"
        for part in group.parts:
            dealt[part.model] += part.traffic
    for model in problem.demands:
        assert abs(dealt[model] - 1) < 1e-6, f"{model} has {dealt[model]} of its traffic"
