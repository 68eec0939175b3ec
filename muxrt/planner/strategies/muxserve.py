"""MuxServe's placement as published: Algorithms 1 and 2 (ICML 2024, section 3.2 and appendix).

Algorithm 2 gives each model at most one candidate per tp: the smallest share of SMs that meets its
rate. Algorithm 1 tries ways to cut the cluster into meshes; for each it places models by demand,
largest first, on the mesh where the unit's throughput grows most. What the published code does
otherwise (rate-weighted means, gains looked up for the wrong mesh, no look at whether the rate is
met) is not copied. No replicas, tp = the mesh's size, and no notion of waiting: that is the
algorithm.
"""

from collections import Counter
from dataclasses import dataclass

from muxrt.cost.memory import num_params
from muxrt.errors import ConfigError
from muxrt.planner.draft import Draft, Group, Part
from muxrt.planner.meshes import Mesh, MeshGroup, mesh_groups, smallest_mesh
from muxrt.planner.search import Search
from muxrt.planner.throughput import Guest, throughput_rps
from muxrt.planner.workload import Problem

SM_PCTS = tuple(range(30, 101, 10))  # what MuxServe profiled
MAX_MESH_GROUPS = 2000
# The search is models x mesh groups x distinct meshes: beyond this many tries fewer groups are cut.
MAX_TRIES = 200_000
# A prefill must run on something: MuxServe's smallest SM token.
LEAST_PREFILL_PCT = 10


def muxserve(problem: Problem, search: Search) -> Draft:
    """Place each model once, for the highest sum of throughputs. Raises ConfigError."""
    candidates = {model: parallel_candidates(problem, model) for model in problem.demands}
    order = sorted(problem.demands, key=lambda model: (-_demand(problem, model), model))
    groups = _pruned(problem, candidates)
    best: _Units | None = None
    greedy = _Greedy(problem)
    for done, meshes in enumerate(groups):
        search.tell("muxserve: mesh groups", done, len(groups))
        units = greedy.place(meshes, order, candidates)
        if units is not None and (best is None or units.total_rps > best.total_rps):
            best = units
        if best is not None and search.is_over():
            break
    if best is None:
        raise ConfigError(
            f"no way to cut {problem.num_gpus} GPUs into meshes holds {len(order)} models once"
            " each: more GPUs, fewer models, or a smaller max_model_len would"
        )
    return tuple(_group(mesh, guests) for mesh, guests in best.units if guests)


def parallel_candidates(problem: Problem, model: str) -> dict[Mesh, Guest]:
    """Algorithm 2: per mesh the smallest share of SMs that meets the rate, else all of them."""
    smallest_mesh(problem, model)  # raises where there is none
    found = {}
    rate = problem.demands[model].rate_rps
    for pool in problem.pools:
        for tp in problem.tps(model, pool.index):
            if not problem.fits(pool.index, tp, (model,)):
                continue
            guests = [Guest(model, pct) for pct in SM_PCTS]
            meets = (
                guest
                for guest in guests
                if throughput_rps(problem, pool.index, tp, [guest])[0] >= rate
            )
            found[pool.index, tp] = next(meets, guests[-1])
    return found


def _demand(problem: Problem, model: str) -> float:
    """Computation that a model asks for: rate x size."""
    demand = problem.demands[model]
    return demand.rate_rps * num_params(demand.shape)


def _pruned(problem: Problem, candidates: dict[str, dict[Mesh, Guest]]) -> list[MeshGroup]:
    """Mesh groups whose largest mesh holds every model, with no more meshes than models."""
    least = max(min(size for _, size in meshes) for meshes in candidates.values())
    most = max(1, min(MAX_MESH_GROUPS, MAX_TRIES // len(candidates) ** 2))
    groups = mesh_groups(problem, max(most, 64))
    kept = [
        meshes
        for meshes in groups
        if max(size for _, size in meshes) >= least and sum(meshes.values()) <= len(candidates)
    ]
    kept = kept or groups
    return kept[:: -(-len(kept) // most)]


@dataclass(frozen=True, slots=True)
class _Units:
    """Meshes with their guests."""

    units: tuple[tuple[Mesh, tuple[Guest, ...]], ...]
    total_rps: float


class _Greedy:
    """Algorithm 1's inner loop; throughputs of units that were seen before are kept."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._kept: dict[tuple[Mesh, tuple[Guest, ...]], float] = {}

    def place(
        self, meshes: MeshGroup, order: list[str], candidates: dict[str, dict[Mesh, Guest]]
    ) -> _Units | None:
        """Models in `order`, each on the mesh with the largest gain; None: one fits nowhere."""
        units: Counter[tuple[Mesh, tuple[Guest, ...]]] = Counter()
        for mesh, count in meshes.items():
            units[mesh, ()] += count
        for model in order:
            best: tuple[float, Mesh, tuple[Guest, ...]] | None = None
            for mesh, guests in units:  # alike units are one entry
                guest = candidates[model].get(mesh)
                names = (*(g.model for g in guests), model)
                if guest is None or not self._problem.fits(*mesh, names):
                    continue
                gain = self._total(mesh, (*guests, guest)) - self._total(mesh, guests)
                # At a tie the mesh with fewer GPUs: the larger ones are for who needs them.
                if best is None or (gain, -mesh[1]) > (best[0] + 1e-9, -best[1][1]):
                    best = gain, mesh, guests
            if best is None:
                return None
            _, mesh, guests = best
            units[mesh, guests] -= 1
            units += Counter()  # drops what is at zero
            units[mesh, (*guests, candidates[model][mesh])] += 1
        placed = tuple(units.elements())
        return _Units(placed, sum(self._total(*unit) for unit in placed))

    def _total(self, mesh: Mesh, guests: tuple[Guest, ...]) -> float:
        key = (mesh, guests)
        if key not in self._kept:
            self._kept[key] = sum(throughput_rps(self._problem, *mesh, guests))
        return self._kept[key]


def _group(mesh: Mesh, guests: tuple[Guest, ...]) -> Group:
    pool, size = mesh
    parts = tuple(sorted(Part(guest.model, 1.0, guest.decode_pct) for guest in guests))
    rest = 100 - max(guest.decode_pct for guest in guests)
    return Group(pool, size, parts, rest if rest >= LEAST_PREFILL_PCT else None)
