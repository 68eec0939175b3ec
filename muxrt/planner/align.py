"""A new placement laid over the old one: what can stay where it is, stays.

A plan numbers its units and GPUs as it comes to them. GPUs of a kind are alike, so a new unit that
holds what an old one holds may take its place, its name and its settings, and nothing moves.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import count

import msgspec

from muxrt.config.placement import Mesh, Scheduling, UnitSpec
from muxrt.planner.assign import mesh_of
from muxrt.planner.workload import Problem

# (kind, GPUs, stages, what it does for whom): two units that agree hold the same.
Holds = tuple[str | None, int, int, tuple[tuple[str, str], ...]]


def align(
    problem: Problem, old: Sequence[UnitSpec], new: Sequence[UnitSpec], *, retune: bool = False
) -> tuple[UnitSpec, ...]:
    """`new` on other GPUs of the same kinds, under the names of `old` where a unit goes on.

    A unit that holds what it held keeps its settings (lanes, memory) as well, unless `retune`.
    Units with roles stay where the plan has them, which is near each other.
    """
    twins = _twins(old, new)
    plain = [_like(old, unit) for unit in new]
    stays = sorted(twins, key=lambda index: -len(new[index].mesh.gpus or ()))
    # What stays may leave no room in one piece for what comes: then the smallest give way.
    for count_kept in range(len(stays), -1, -1):
        kept = set(stays[:count_kept])
        found = [
            _lasted(twins[index], new[index], retune=retune) if index in kept else plain[index]
            for index in range(len(new))
        ]
        placed = _placed(problem, found, kept)
        if placed is not None:
            return _named(old, placed)
    return _named(old, plain)


def _twins(old: Sequence[UnitSpec], new: Sequence[UnitSpec]) -> dict[int, UnitSpec]:
    """By the index of a new unit an old one of its own that holds the same, where there is one."""
    taken: list[Mesh] = [unit.mesh for unit in new if unit.has_roles]
    left: dict[Holds, list[UnitSpec]] = {}
    for unit in old:
        left.setdefault(_holds(unit), []).append(unit)
    found: dict[int, UnitSpec] = {}
    for index, unit in enumerate(new):
        known = left.get(_holds(unit), [])
        # With roles only one that lies where it is to lie, otherwise one that is in nobody's way.
        fit = [
            one
            for one in known
            if (one.mesh == unit.mesh if unit.has_roles else not _overlaps(one.mesh, taken))
        ]
        if fit:
            found[index] = fit[0]
            known.remove(fit[0])
    return found


def _holds(unit: UnitSpec) -> Holds:
    models = tuple(sorted((part.name, part.role) for part in unit.models))
    return unit.mesh.kind, len(unit.mesh.gpus or ()), unit.mesh.pp, models


def _overlaps(mesh: Mesh, others: Iterable[Mesh]) -> bool:
    mine = _gpus(mesh)
    return any(mine & _gpus(other) for other in others)


def _gpus(mesh: Mesh) -> set[tuple[int, int]]:
    """(node, GPU) of a mesh without stages."""
    return {(mesh.node or 0, gpu) for gpu in mesh.gpus or ()}


def _lasted(old: UnitSpec, new: UnitSpec, *, retune: bool) -> UnitSpec:
    """The old unit where it was, with the new shares of traffic and expectations."""
    replace = msgspec.structs.replace
    fresh = {part.name: part for part in new.models}
    models = tuple(
        replace(part, traffic=fresh[part.name].traffic, expected=fresh[part.name].expected)
        for part in old.models
    )
    if not retune:
        return replace(old, models=models)
    memory = replace(new.memory, swap_bytes=old.memory.swap_bytes)
    scheduling = _carried(old.scheduling, new.scheduling)
    return replace(
        new, name=old.name, mesh=old.mesh, memory=memory, scheduling=scheduling, models=new.models
    )


def _like(old: Sequence[UnitSpec], new: UnitSpec) -> UnitSpec:
    """`new` with what a plan does not decide, as the old unit had it that shares most models."""
    names = {part.name for part in new.models}
    nearest = max(
        old, key=lambda unit: len(names & {part.name for part in unit.models}), default=None
    )
    if nearest is None:
        return new
    return msgspec.structs.replace(
        new,
        memory=msgspec.structs.replace(new.memory, swap_bytes=nearest.memory.swap_bytes),
        scheduling=_carried(nearest.scheduling, new.scheduling),
        transfer=nearest.transfer,
    )


def _carried(old: Scheduling, new: Scheduling) -> Scheduling:
    """The operator's settings, and the sizes of the plan."""
    return msgspec.structs.replace(
        old, prefill_tokens=new.prefill_tokens, max_sequences=new.max_sequences
    )


def _placed(
    problem: Problem, units: Sequence[UnitSpec], kept: Collection[int]
) -> list[UnitSpec] | None:
    """All but the kept ones on GPUs that are left, the largest first; None where that fails."""
    first_node = [0]
    for pool in problem.pools:
        first_node.append(first_node[-1] + pool.num_nodes)
    free = {
        node: set(range(pool.gpus_per_node))
        for pool in problem.pools
        for node in range(first_node[pool.index], first_node[pool.index + 1])
    }
    pool_of = {pool.gpu.name: pool for pool in problem.pools}
    stays = [index in kept or unit.has_roles for index, unit in enumerate(units)]
    for unit, stay in zip(units, stays, strict=True):
        nodes = unit.mesh.nodes or (unit.mesh.node or 0,)
        for node in nodes if stay else ():
            free[node] -= set(unit.mesh.gpus or ())
    found = list(units)
    moving = [index for index, stay in enumerate(stays) if not stay]
    for index in sorted(moving, key=lambda index: -len(units[index].mesh.gpus or ())):
        mesh = units[index].mesh
        pool, size = pool_of[mesh.kind or ""], len(mesh.gpus or ())
        nodes = tuple(range(first_node[pool.index], first_node[pool.index + 1]))
        starts = [
            (len(free[node]), node, start) for node in nodes for start in _starts(free[node], size)
        ]
        if not starts:
            return None
        _, node, start = min(starts)  # the fullest node: what is left of another stays in one piece
        free[node] -= set(range(start, start + size))
        found[index] = msgspec.structs.replace(units[index], mesh=mesh_of(pool, node, start, size))
    return found


def _starts(free: set[int], size: int) -> list[int]:
    """Where so many GPUs lie beside each other, at a multiple of their number."""
    return [gpu for gpu in sorted(free) if gpu % size == 0 and free >= set(range(gpu, gpu + size))]


def _named(old: Sequence[UnitSpec], units: Sequence[UnitSpec]) -> tuple[UnitSpec, ...]:
    """Names of old units for those that go on, or take their mesh; new ones for the rest."""
    by_mesh = {unit.mesh: unit.name for unit in old}
    holds = {unit.name: _holds(unit) for unit in old}
    names: dict[int, str] = {}
    for is_twin in (True, False):
        for index, unit in enumerate(units):
            name = by_mesh.get(unit.mesh)
            if index in names or name is None or name in names.values():
                continue
            if not is_twin or holds[name] == _holds(unit):
                names[index] = name
    used = {unit.name for unit in old}
    fresh = (name for number in count() if (name := f"unit-{number}") not in used)
    return tuple(
        msgspec.structs.replace(unit, name=names.get(index) or next(fresh))
        for index, unit in enumerate(units)
    )
