"""What one rank of a tensor-parallel mesh holds of its unit: its part of every block."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from muxrt.config.model import ModelShape
from muxrt.config.shard import Shard, check_split
from muxrt.engine.build import UnitPlan
from muxrt.errors import ConfigError
from muxrt.kvcache.layout import ArenaLayout, ModelLayout


def plan_rank(plan: UnitPlan, shapes: Mapping[str, ModelShape], shard: Shard) -> UnitPlan:
    """The unit as rank `shard.rank` sees it.

    A block is the same number on every rank, and 1 / size of its planes lie in each rank's arena:
    the scheduler need not know that there are ranks. Raises ConfigError for a model or blocks that
    cannot be cut.
    """
    inside, rest = divmod(plan.arena.planes_per_block, shard.size)
    if rest:
        raise ConfigError(
            f"memory.planes_per_block of unit {plan.spec.name}: found"
            f" {plan.arena.planes_per_block}, expected a multiple of its {shard.size} ranks"
        )
    layouts = {}
    for name, layout in plan.arena.models.items():
        check_split(name, shapes[name], shard.size)
        layouts[name] = _layout(layout, len(shard.kv_heads(shapes[name])))
    return replace(
        plan,
        arena=ArenaLayout(plan.arena.plane_bytes, inside, layouts),
        weight_bytes=plan.weight_bytes // shard.size,  # as many blocks as the whole budget is worth
        models={name: replace(plan.models[name], layout=layouts[name]) for name in plan.models},
    )


def _layout(layout: ModelLayout, kv_heads: int) -> ModelLayout:
    """Of a rank; one with fewer heads than others leaves the planes of the last ones alone."""
    return replace(layout, shape=replace(layout.shape, num_kv_heads=kv_heads))


def rank_cores(cores: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """The cores of each rank: equal parts of the mesh's, in order; what is left over is nobody's.

    Raises ConfigError where there are more ranks than cores.
    """
    each = len(cores) // size
    if not each:
        raise ConfigError(
            f"mesh.gpus: found {size} ranks, expected at most {len(cores)}: one core each of"
            f" {', '.join(map(str, cores))}"
        )
    return tuple(tuple(cores[rank * each : (rank + 1) * each]) for rank in range(size))
