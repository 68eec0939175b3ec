"""A placement as a picture: GPUs as rows, what fills their memory to scale."""

from pathlib import Path

from muxrt.config.placement import Placement
from muxrt.errors import ConfigError
from muxrt.planner.draft import Draft
from muxrt.planner.queueing import Score
from muxrt.planner.workload import Problem

ROW_INCHES = 0.32
GB = 1e9


def draw(path: Path, problem: Problem, draft: Draft, score: Score, placement: Placement) -> None:
    """Write an SVG or PNG, as the name ends. Raises ConfigError without matplotlib."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"found {path}, expected a picture named *.svg or *.png")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install muxrt[plot]") from None
    rows = _rows(problem)
    figure = Figure(figsize=(11, 1.2 + ROW_INCHES * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    palette = colormaps["tab20"]
    colours = {name: palette(i % 20) for i, name in enumerate(problem.demands)}
    for group, found, unit in zip(draft, score.groups, placement.units, strict=True):
        kv = problem.kv_bytes(group.pool, group.size, group.models)
        for gpu in unit.mesh.gpus or ():
            row = rows[unit.mesh.node or 0, gpu]
            left = 0.0
            for name in group.models:
                width = problem.bytes(name, group.size).weights / GB
                axes.barh(row, width, left=left, color=colours[name], edgecolor="white")
                axes.text(left + width / 2, row, name, ha="center", va="center", fontsize=6)
                left += width
            axes.barh(row, kv / GB, left=left, color="0.88", edgecolor="white")
            used = min(found.kv_bytes, kv) / GB
            axes.barh(row, used, left=left, color="0.65", edgecolor="white")
            axes.text(left + kv / GB, row, f"{unit.name} ", ha="right", va="center", fontsize=6)
    axes.set_yticks(list(rows.values()), [f"node {node} gpu {gpu}" for node, gpu in rows])
    axes.tick_params(axis="y", labelsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, max(pool.gpu.memory_bytes for pool in problem.pools) / GB)
    axes.set_xlabel("GB: weights by model, KV in use (dark) and free (light)")
    axes.set_title(f"{score.goodput_rps:.1f} requests/s within SLO")
    figure.savefig(path)


def _rows(problem: Problem) -> dict[tuple[int, int], int]:
    """The row of each GPU, by node and number."""
    gpus, node = [], 0
    for pool in problem.pools:
        for _ in range(pool.num_nodes):
            gpus += [(node, gpu) for gpu in range(pool.gpus_per_node)]
            node += 1
    return {key: row for row, key in enumerate(gpus)}
