"""MuxServe's placement as published: Algorithms 1 and 2 (ICML 2024, section 3.2 and appendix).

Algorithm 2 gives each model at most one candidate per tp that was profiled: the smallest share of
SMs that meets its rate. Algorithm 1 tries ways to cut the cluster into meshes, large meshes first;
for each it places models by demand, largest first, on the mesh where the unit's throughput grows
most. No replicas, tp = the mesh's size, and no notion of waiting: that is the algorithm. What the
published code does otherwise (rate-weighted means, gains looked up for the wrong mesh, no look at
whether the rate is met) is not copied: docs/planner.md says what that changes.
"""

from collections import Counter

from muxrt.cost.memory import num_params
from muxrt.cost.roofline import Roofline
from muxrt.errors import ConfigError
from muxrt.planner.draft import Draft, Group, Part
from muxrt.planner.meshes import Mesh, MeshGroup, mesh_groups, smallest_mesh
from muxrt.planner.search import Search
from muxrt.planner.throughput import Guest, throughput_rps
from muxrt.planner.workload import Problem

# What MuxServe gives decodes; prefills are taken to have all SMs.
SM_PCTS = tuple(range(30, 91, 10))
# Shares of a mesh may add up to more than 100 by this much (MuxServe's overload threshold: 2 of 10
# SM tokens). Without a limit decodes could not overlap as its estimator takes them to.
OVERLOAD_PCT = 20
MAX_MESH_GROUPS = 2000
# The search is models x mesh groups x distinct meshes: beyond this many tries fewer groups are cut.
MAX_TRIES = 200_000
# A prefill must run on something: MuxServe's smallest SM token.
LEAST_PREFILL_PCT = 10
TIE_RPS = 1e-9


def muxserve(problem: Problem, search: Search) -> Draft:
    """Place each model once, for the highest sum of throughputs. Raises ConfigError."""
    if problem.cluster.is_cpu:
        raise ConfigError(
            "strategies muxserve and temporal give decodes 30 to 90 % of the SMs, found a CPU,"
            " whose lanes are whole cores, expected strategy auto or spatial"
        )
    units = _best(problem, search, every=False) or _best(problem, search, every=True)
    if units is None:
        raise ConfigError(
            f"no way to cut {problem.num_gpus} GPUs into meshes holds {len(problem.demands)} models"
            f" once each with at least {SM_PCTS[0]} % of the SMs: more GPUs, fewer models, or a"
            " smaller max_model_len would; strategy auto knows other ways to share"
        )
    return tuple(_group(mesh, guests) for mesh, guests in units)


def _best(problem: Problem, search: Search, *, every: bool) -> "_Units | None":
    """The units of the best mesh group; `every` lets in degrees that do not meet the rate."""
    candidates = {m: parallel_candidates(problem, m, every=every) for m in problem.demands}
    order = sorted(problem.demands, key=lambda model: (-computation(problem, model), model))
    groups = _pruned(problem, candidates)
    greedy = _Greedy(problem)
    best, best_rps = None, -1.0
    for done, meshes in enumerate(groups):
        search.tell("muxserve: mesh groups", done, len(groups))
        units = greedy.place(meshes, order, candidates)
        if units is not None and (rps := greedy.total_rps(units)) > best_rps + TIE_RPS:
            best, best_rps = units, rps
        if best is not None and search.is_over():
            break
    return best


def parallel_candidates(problem: Problem, model: str, *, every: bool = False) -> dict[Mesh, Guest]:
    """Algorithm 2: per mesh the smallest share of SMs that meets the rate.

    Meshes that do not meet it give their largest share; they count where no mesh does, or with
    `every`, so that an overloaded cluster has a placement too.
    """
    smallest_mesh(problem, model)  # raises where there is none
    meets, misses = {}, {}
    rate = problem.demands[model].rate_rps
    for mesh in _degrees(problem, model):
        guests = [Guest(model, pct) for pct in SM_PCTS]
        enough = (guest for guest in guests if throughput_rps(problem, *mesh, [guest])[0] >= rate)
        found = next(enough, None)
        if found is None:
            misses[mesh] = guests[-1]
        else:
            meets[mesh] = found
    return {**misses, **meets} if every or not meets else meets


def _degrees(problem: Problem, model: str) -> list[Mesh]:
    """Meshes that hold the model: those that were profiled, if any were."""
    fit = [
        (pool.index, tp)
        for pool in problem.pools
        for tp in problem.tps(model, pool.index)
        if problem.fits(pool.index, tp, (model,))
    ]
    shape = problem.demands[model].shape
    profiled = [
        (pool, tp)
        for pool, tp in fit
        if not isinstance(problem.cost.steps(shape, tp, problem.pools[pool].gpu), Roofline)
    ]
    return profiled or fit


def computation(problem: Problem, model: str) -> float:
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
    # At a tie the first group stays, so this order is part of the algorithm (as in its code).
    sizes = sorted({mesh for meshes in groups for mesh in meshes}, key=lambda m: (-m[1], m[0]))
    kept = sorted(kept or groups, key=lambda meshes: [-meshes[mesh] for mesh in sizes])
    return kept[:: -(-len(kept) // most)]


_Units = tuple[tuple[Mesh, tuple[Guest, ...]], ...]  # meshes that are used, with their guests
_Place = tuple[float, Mesh, tuple[Guest, ...]]  # gain, and the unit that a model would join


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
            best: _Place | None = None
            for mesh, guests in units:  # alike units are one entry
                guest = candidates[model].get(mesh)
                if guest is None or not self._holds(mesh, (*guests, guest)):
                    continue
                gain = self._total(mesh, (*guests, guest)) - self._total(mesh, guests)
                if best is None or self._is_better((gain, mesh, guests), best):
                    best = gain, mesh, guests
            if best is None:
                return None
            _, mesh, guests = best
            units[mesh, guests] -= 1
            units += Counter()  # drops what is at zero
            units[mesh, (*guests, candidates[model][mesh])] += 1
        return tuple(unit for unit, count in units.items() if unit[1] for _ in range(count))

    def total_rps(self, units: _Units) -> float:
        """The sum of all throughputs."""
        return sum(self._total(*unit) for unit in units)

    def _holds(self, mesh: Mesh, guests: tuple[Guest, ...]) -> bool:
        shares = sum(guest.decode_pct for guest in guests)
        names = tuple(guest.model for guest in guests)
        return shares <= 100 + OVERLOAD_PCT and self._problem.fits(*mesh, names)

    def _is_better(self, place: _Place, other: _Place) -> bool:
        """The larger gain; at a tie fewer GPUs, which others need less, then less load."""
        (gain, mesh, guests), (other_gain, other_mesh, other_guests) = place, other
        if abs(gain - other_gain) > TIE_RPS:
            return gain > other_gain
        load, other_load = self._load(mesh, guests), self._load(other_mesh, other_guests)
        return (mesh[1], load) < (other_mesh[1], other_load)

    def _load(self, mesh: Mesh, guests: tuple[Guest, ...]) -> float:
        """Computation asked for, per GPU."""
        return sum(computation(self._problem, guest.model) for guest in guests) / mesh[1]

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
