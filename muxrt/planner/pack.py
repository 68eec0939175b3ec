"""A first placement, from capacities alone: full meshes for the popular, shared ones else."""

from collections import Counter
from dataclasses import dataclass

from muxrt.errors import ConfigError
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft, Group, Part, packs_pool
from muxrt.planner.meshes import Mesh, mesh_sizes, smallest_mesh
from muxrt.planner.workload import Problem

# Shares of its capacity that a mesh is filled to: from hardly to far beyond.
LEAST_FULL, MOST_FULL = 0.05, 2.0
NUM_BISECTIONS = 6


def pack(problem: Problem, capacity: Capacity) -> Draft:
    """Every model at least once, meshes filled evenly: as little as there are GPUs for.

    Raises ConfigError where not even one replica of each model finds room.
    """
    low, high = LEAST_FULL, MOST_FULL
    best = _Packer(problem, capacity, high)
    best.pack()
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        packer = _Packer(problem, capacity, middle)
        if packer.pack():
            best, high = packer, middle
        else:
            low = middle
    return best.draft


@dataclass(slots=True)
class _Bin:
    """A mesh that is being filled."""

    mesh: Mesh
    rates: dict[str, float]
    load: float


class _Packer:
    """Fills meshes up to `full`, largest need first, each into the fullest that still takes it."""

    def __init__(self, problem: Problem, capacity: Capacity, full: float) -> None:
        self._problem = problem
        self._capacity = capacity
        self._full = full
        self._bins: list[_Bin] = []
        self._sizes = [Counter[int]() for _ in problem.pools]
        self._is_even = True

    @property
    def draft(self) -> Draft:
        return tuple(self._group(found) for found in self._bins)

    def pack(self) -> bool:
        """Whether no mesh had to be filled beyond `full`. Raises ConfigError."""
        needs = sorted(
            ((self._cheapest(model), model) for model in self._problem.demands),
            key=lambda item: (-item[0][1], -self._gpus(item[1], item[0]), item[1]),
        )
        rest = {}
        for mesh, model in needs:  # once each comes first: nobody is left out
            rest[model] = self._problem.demands[model].rate_rps
            self._place_once(model, mesh, rest)
        for mesh, model in sorted(needs, key=lambda item: self._gpus(item[1], item[0])):
            self._place_rest(model, mesh, rest)
        self._spread(rest)
        return self._is_even

    def _cheapest(self, model: str) -> Mesh:
        """The mesh with the most capacity per GPU; the smallest where targets are met nowhere."""
        meshes = [
            (pool.index, tp)
            for pool in self._problem.pools
            for tp in self._problem.tps(model, pool.index)
        ]
        best = max(meshes, key=lambda mesh: self._capacity.rps(model, mesh) / mesh[1], default=None)
        if best is None or not self._capacity.rps(model, best):
            return smallest_mesh(self._problem, model)
        return best

    def _gpus(self, model: str, mesh: Mesh) -> float:
        """GPUs' worth of a model's traffic."""
        rps = self._capacity.rps(model, mesh)
        return self._problem.demands[model].rate_rps / rps * mesh[1] if rps else float(mesh[1])

    def _place_once(self, model: str, mesh: Mesh, rest: dict[str, float]) -> None:
        """The part of its traffic that whole meshes leave over, or all of it if that is less."""
        rps = self._full * self._capacity.rps(model, mesh)
        share = rest[model] % rps if rps and rest[model] > rps else rest[model]
        found = self._fullest(model, share) or self._open(model, mesh)
        if found is None:
            self._is_even = False
            found = self._least_loaded(model)
        if found is None:
            raise ConfigError(
                f"{model} finds no room: found {self._problem.num_gpus} GPUs, which the weights of"
                f" {len(self._problem.demands)} models fill; expected more of them, or fewer models"
            )
        rest[model] -= self._add(found, model, share)

    def _place_rest(self, model: str, mesh: Mesh, rest: dict[str, float]) -> None:
        """Whole meshes while there are GPUs."""
        rps = self._full * self._capacity.rps(model, mesh)
        while rps and rest[model] > 1e-9:
            found = self._open(model, mesh)
            if found is None:
                return
            rest[model] -= self._add(found, model, min(rest[model], rps))

    def _spread(self, rest: dict[str, float]) -> None:
        """What found no mesh of its own goes, in equal parts, where its model already is."""
        for model, rate in rest.items():
            if rate > 1e-9:
                self._is_even = False
                hosts = [found for found in self._bins if model in found.rates]
                for found in hosts:
                    self._add(found, model, rate / len(hosts))

    def _fullest(self, model: str, rate: float) -> _Bin | None:
        taking = [
            found
            for found in self._bins
            if found.load + self._share(found.mesh, model, rate) <= self._full
            and self._fits(found, model)
        ]
        return max(taking, key=lambda found: found.load, default=None)

    def _least_loaded(self, model: str) -> _Bin | None:
        taking = [found for found in self._bins if self._fits(found, model)]
        return min(taking, key=lambda found: found.load, default=None)

    def _fits(self, found: _Bin, model: str) -> bool:
        return model not in found.rates and self._problem.fits(*found.mesh, (*found.rates, model))

    def _open(self, model: str, mesh: Mesh) -> _Bin | None:
        """A new mesh of that size, else of another that fits the model, while there are GPUs."""
        others = [
            (pool.index, size)
            for pool in self._problem.pools
            for size in reversed(mesh_sizes(pool, self._problem.largest_tp))
        ]
        for candidate in (mesh, *others):
            pool, size = candidate
            if not self._problem.fits(pool, size, (model,)):
                continue
            self._sizes[pool][size] += 1
            if packs_pool(self._sizes[pool], self._problem.pools[pool]):
                self._bins.append(_Bin(candidate, {}, 0.0))
                return self._bins[-1]
            self._sizes[pool][size] -= 1
        return None

    def _add(self, found: _Bin, model: str, rate: float) -> float:
        found.rates[model] = found.rates.get(model, 0.0) + rate
        found.load += self._share(found.mesh, model, rate)
        return rate

    def _share(self, mesh: Mesh, model: str, rate: float) -> float:
        rps = self._capacity.rps(model, mesh)
        return rate / rps if rps else 1e3

    def _group(self, found: _Bin) -> Group:
        parts = tuple(
            Part(model, rate / self._problem.demands[model].rate_rps)
            for model, rate in sorted(found.rates.items())
        )
        return self._capacity.tuned(Group(*found.mesh, parts))
