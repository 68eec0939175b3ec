"""Two placements beside each other: what is served, and what would be."""

from collections.abc import Iterator
from pathlib import Path

from muxrt.cli.plan_picture import (
    ALARM,
    GREY,
    INK,
    LOW,
    Block,
    Kind,
    Note,
    Panel,
    Piece,
    draw_panels,
)
from muxrt.cli.replan_run import Replan, Served
from muxrt.config.placement import UnitSpec
from muxrt.planner.diff import Fate
from muxrt.planner.workload import Problem


def draw(path: Path, found: Replan) -> None:
    """Write an SVG or PNG, as the name ends. Raises ConfigError where that cannot be."""
    outlook, best = found.outlook, found.best
    problem = outlook.at(outlook.bands[0].rates_rps).problem
    fates = {unit.name: unit.fate for unit in best.diff.units}
    panels = (
        Panel(
            "now",
            found.before.goodput_rps[0],
            tuple(_blocks(problem, outlook.served.config.units, found.before, fates, Fate.REMOVED)),
        ),
        Panel(
            "then" if best.decision.is_worth else "then, if it were worth it",
            best.served.goodput_rps[0],
            tuple(_blocks(problem, best.units, best.served, fates, Fate.ADDED)),
        ),
    )
    draw_panels(path, problem, panels, offered_rps=found.before.offered_rps)


def _blocks(
    problem: Problem,
    units: tuple[UnitSpec, ...],
    served: Served,
    fates: dict[str, Fate],
    told: Fate,
) -> Iterator[tuple[int, Block]]:
    """Each unit; its fate is told where it is to change, or is the one `told`."""
    dealt: dict[tuple[str, bool], float] = {}
    for unit in units:
        for part in unit.models:
            key = part.name, part.role == "decode"
            dealt[key] = dealt.get(key, 0.0) + part.traffic
    for unit in units:
        fate = fates[unit.name]
        word = fate.value if fate in (Fate.CHANGED, told) else ""
        yield unit.mesh.node or 0, _block(problem, unit, served, dealt, word)


def _block(
    problem: Problem,
    unit: UnitSpec,
    served: Served,
    dealt: dict[tuple[str, bool], float],
    word: str,
) -> Block:
    gpus = unit.mesh.gpus or (0,)
    memory = next(p.gpu.memory_bytes for p in problem.pools if p.gpu.name == unit.mesh.kind)
    name = f"{unit.name} ({word})" if word else unit.name
    notes, pieces = [Note(f"{name}  tp {len(gpus)}", INK)], []
    for part in unit.models:
        total = dealt[part.name, part.role == "decode"]
        rate = problem.demands[part.name].rate_rps * part.traffic / total
        weights = problem.bytes(part.name, len(gpus)).weights
        pieces.append(Piece(Kind.WEIGHTS, weights, part.name, rate))
        kept = served.attainment[part.name]
        text = f"{part.name}  {rate:.2f}/s, attainment {kept:.0%}"
        notes.append(Note(text, ALARM if kept < LOW else GREY))
    kv = unit.memory.kv_bytes / len(gpus)
    used = kv * served.kv[unit.name]
    other = max(0.0, memory - kv - sum(piece.num_bytes for piece in pieces))
    rest = [Piece(Kind.OTHER, other), Piece(Kind.KV_USED, used), Piece(Kind.KV_FREE, kv - used)]
    names = tuple(part.name for part in unit.models)
    return Block(gpus, memory, name, (*pieces, *rest), tuple(notes), names)
