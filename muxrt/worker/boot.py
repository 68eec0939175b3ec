"""From a `UnitBoot` to cores and a plan: what every executor of the unit starts with."""

import os
from collections.abc import Mapping

import msgspec

from muxrt.config.model import ModelShape, load_shape
from muxrt.config.placement import UnitSpec
from muxrt.engine.build import UnitPlan, plan_unit
from muxrt.engine.messages import UnitBoot
from muxrt.errors import ConfigError


def take_cores(unit: UnitSpec) -> tuple[int, ...]:
    """The cores of the unit's mesh, which this process keeps to from now on.

    Raises ConfigError.
    """
    cores = mesh_cores(unit)
    os.sched_setaffinity(0, cores)
    return cores


def load_shapes(boot: UnitBoot) -> dict[str, ModelShape]:
    """The shapes of the unit's models, by name. Raises ConfigError."""
    return {spec.name: load_shape(spec.folder) for spec in boot.models}


def plan_boot(
    boot: UnitBoot,
    num_cores: int,
    shapes: Mapping[str, ModelShape],
    weights: Mapping[str, int] | None = None,
) -> UnitPlan:
    """The geometry of the unit on `num_cores` cores; `weights`: see `plan_unit`.

    Raises ConfigError.
    """
    specs = {spec.name: spec for spec in boot.models}
    return plan_unit(with_split(boot.unit, num_cores), specs, shapes, weights)


def mesh_cores(unit: UnitSpec) -> tuple[int, ...]:
    """The cores of the unit's mesh. Raises ConfigError for one that is not ours."""
    allowed = os.sched_getaffinity(0)
    if unit.mesh.cores is None:
        return tuple(sorted(allowed))
    strangers = sorted(set(unit.mesh.cores) - allowed)
    if strangers:
        raise ConfigError(
            f"mesh.cores of unit {unit.name}: found {strangers}, expected cores that this process"
            f" may use: {sorted(allowed)}"
        )
    return unit.mesh.cores


def with_split(unit: UnitSpec, num_cores: int) -> UnitSpec:
    """The unit with its lanes spelt out: two of half the cores each where nobody said otherwise.

    Every rank of a mesh has its own cores, and lanes of those.

    So a prefill of one model runs beside decodes of others; docs/benchmarks/lanes.md has the
    figures. Lanes on a GPU are shares of it, not cores.
    """
    if unit.lanes.split is not None or unit.mesh.device == "gpu":
        return unit
    num_cores //= unit.mesh.tp
    halves = (num_cores - num_cores // 2, num_cores // 2)
    split = tuple(half for half in halves if half)
    return msgspec.structs.replace(unit, lanes=msgspec.structs.replace(unit.lanes, split=split))
