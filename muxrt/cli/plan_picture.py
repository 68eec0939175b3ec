"""A placement as a picture: GPUs as rows, meshes as blocks, what fills their memory to scale."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import Any

from muxrt.config.placement import UnitModel, UnitSpec
from muxrt.errors import ConfigError
from muxrt.planner.draft import Draft, Group
from muxrt.planner.phase_plan import ModelPlan, PhasePlan
from muxrt.planner.queueing import GroupScore, Score
from muxrt.planner.workload import Pool, Problem

GB = 1e9
MAX_GPUS = 64  # that are drawn; the nodes with the least traffic are left out
TWO_COLUMNS = 16  # GPUs from which on nodes stand in two columns

# Inches.
ROW, NODE_HEAD, NODE_GAP, LINE = 0.2, 0.24, 0.14, 0.125
MARGIN, HEAD, FOOT, LABELS, BAR, NOTES, COLUMN_GAP = 0.3, 1.02, 0.3, 0.28, 3.9, 2.0, 0.15
COLUMN = LABELS + BAR + NOTES
CHAR = 0.0545  # width of a character of TEXT on average, so that what does not fit is not written
GAP = 0.03  # between meshes
TEXT, SMALL = 7.0, 6.0  # points
LOW = 0.9  # attainment below which a model is shown in red

INK, GREY, RULE, ALARM = "#24292f", "#6e7781", "#d0d7de", "#c01c28"
KV_USED, KV_FREE, OTHER = "#3f78b0", "#d6e4f2", "#e6e6e6"
RAMP, RAMP_ENDS = "YlOrRd", (0.12, 0.85)


class Kind(Enum):
    """What a piece of a GPU's memory holds."""

    WEIGHTS = "weights"
    OTHER = "other"
    KV_USED = "KV in use"
    KV_FREE = "KV free"


@dataclass(frozen=True, slots=True)
class Piece:
    """So many bytes on each GPU of a mesh."""

    kind: Kind
    num_bytes: float
    model: str = ""
    rate_rps: float = 0.0


@dataclass(frozen=True, slots=True)
class Note:
    """A line beside a block."""

    text: str
    colour: str = GREY


@dataclass(frozen=True, slots=True)
class Block:
    """A mesh, or GPUs of a node that no unit has."""

    gpus: tuple[int, ...]
    memory_bytes: int
    unit: str | None
    pieces: tuple[Piece, ...]
    notes: tuple[Note, ...]  # a line for the unit, then one per model
    models: tuple[str, ...]

    @property
    def rate_rps(self) -> float:
        return sum(piece.rate_rps for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Node:
    """The blocks of one machine, by GPU."""

    number: int
    gpu: str
    blocks: tuple[Block, ...]

    @property
    def num_gpus(self) -> int:
        return sum(len(block.gpus) for block in self.blocks)

    @property
    def height(self) -> float:
        return NODE_HEAD + self.num_gpus * ROW + NODE_GAP

    @property
    def rate_rps(self) -> float:
        return sum(block.rate_rps for block in self.blocks)


def check_name(path: Path) -> None:
    """Raise ConfigError where no picture of that name can be drawn."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"found {path}, expected a picture named *.svg or *.png")
    if find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install muxrt[plot]")


Blocks = tuple[tuple[int, Block], ...]  # each with the number of its node


@dataclass(frozen=True, slots=True)
class Panel:
    """One placement of a picture."""

    title: str
    goodput_rps: float
    blocks: Blocks


def draw(path: Path, problem: Problem, found: Blocks, goodput_rps: float) -> None:
    """Write an SVG or PNG, as the name ends. Raises ConfigError where that cannot be."""
    offered_rps = sum(demand.rate_rps for demand in problem.demands.values())
    draw_panels(path, problem, (Panel("", goodput_rps, found),), offered_rps)


def draw_panels(path: Path, problem: Problem, panels: Sequence[Panel], offered_rps: float) -> None:
    """`draw` for placements beside each other, under the same traffic."""
    check_name(path)
    from matplotlib.figure import Figure

    every = [nodes(problem, panel.blocks) for panel in panels]
    shown = [busiest(many) for many in every]
    columns = [in_columns(many) for many in shown]
    tallest = max(sum(node.height for node in one) for many in columns for one in many)
    height = HEAD + tallest + FOOT
    widths = [2 * MARGIN + len(many) * (COLUMN + COLUMN_GAP) - COLUMN_GAP for many in columns]
    figure = Figure(figsize=(sum(widths), height), dpi=130, facecolor="white")
    left = 0.0
    for panel, all_nodes, mine, drawn, width in zip(
        panels, every, shown, columns, widths, strict=True
    ):
        box = (left / sum(widths), 0.0, width / sum(widths), 1.0)
        sheet = _Sheet(figure, box, (width, height), problem, [n for many in shown for n in many])
        sheet.title(problem, panel, offered_rps, len(all_nodes) - len(mine))
        for index, column in enumerate(drawn):
            sheet.column(MARGIN + index * (COLUMN + COLUMN_GAP), column)
        left += width
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def nodes(problem: Problem, found: Blocks) -> list[Node]:
    """All machines with what is on them."""
    by_node: dict[int, list[Block]] = {}
    for node, block in found:
        by_node.setdefault(node, []).append(block)
    kinds = [pool for pool in problem.pools for _ in range(pool.num_nodes)]
    return [
        Node(number, pool.gpu.name, tuple(_with_idle(pool, by_node.get(number, []))))
        for number, pool in enumerate(kinds)
    ]


def blocks(problem: Problem, draft: Draft, score: Score, units: Sequence[UnitSpec]) -> Blocks:
    """Meshes on which models do both phases."""
    rows = zip(draft, score.groups, units, strict=True)
    return tuple(
        (unit.mesh.node or 0, _block(problem, group, found, unit)) for group, found, unit in rows
    )


def apart_blocks(problem: Problem, plan: PhasePlan, units: Sequence[UnitSpec]) -> Blocks:
    """Meshes of one phase, those of `units` that have a role."""
    plans = {one.model: one for one in plan.models}
    return tuple(
        (unit.mesh.node or 0, _phase_block(problem, plans[part.name], part, unit))
        for unit in units
        for part in unit.models
        if part.role != "mixed"
    )


def _phase_block(problem: Problem, plan: ModelPlan, part: UnitModel, unit: UnitSpec) -> Block:
    """KV in use is by Little's law: rate x time there x tokens, no more than there is."""
    demand, expected, gpus = problem.demands[part.name], part.expected, unit.mesh.gpus or ()
    assert expected is not None, "planned units say what is expected of them"
    pool = problem.pools[plan.prefill_pool if part.role == "prefill" else plan.decode_pool]
    held = problem.bytes(part.name, len(gpus))
    if part.role == "prefill":
        tokens = expected.rate_rps * expected.ttft_s * demand.prompt.mean
    else:
        stay_s = expected.tpot_s * demand.output.mean
        tokens = expected.rate_rps * stay_s * demand.context
    kv = unit.memory.kv_bytes // len(gpus)
    used = min(kv, tokens * held.kv_per_token)
    rest = pool.gpu.memory_bytes - kv - held.weights
    kept = f"{part.name}  {expected.rate_rps:.2f}/s, attainment {expected.attainment:.0%}"
    return Block(
        gpus=gpus,
        memory_bytes=pool.gpu.memory_bytes,
        unit=unit.name,
        pieces=(
            Piece(Kind.WEIGHTS, held.weights, part.name, expected.rate_rps),
            Piece(Kind.OTHER, rest),
            Piece(Kind.KV_USED, used),
            Piece(Kind.KV_FREE, kv - used),
        ),
        notes=(
            Note(f"{unit.name}  tp {len(gpus)}", INK),
            Note(kept, ALARM if expected.attainment < LOW else GREY),
        ),
        models=(part.name,),
    )


def _block(problem: Problem, group: Group, score: GroupScore, unit: UnitSpec) -> Block:
    rates = {part.model: part.rate_rps for part in score.parts}
    memory = problem.pools[group.pool].gpu.memory_bytes
    kv = problem.kv_bytes(group.pool, group.size, group.models)
    weights = [
        Piece(Kind.WEIGHTS, problem.bytes(model, group.size).weights, model, rates[model])
        for model in group.models
    ]
    used = min(score.kv_bytes, kv)
    other = memory - kv - sum(piece.num_bytes for piece in weights)
    rest = [Piece(Kind.OTHER, other), Piece(Kind.KV_USED, used), Piece(Kind.KV_FREE, kv - used)]
    return Block(
        gpus=unit.mesh.gpus or (),
        memory_bytes=memory,
        unit=unit.name,
        pieces=(*weights, *rest),
        notes=tuple(_notes(group, score, unit)),
        models=group.models,
    )


def _notes(group: Group, score: GroupScore, unit: UnitSpec) -> Iterator[Note]:
    lanes = "one lane" if group.prefill_pct is None else f"{group.prefill_pct} % for prefills"
    yield Note(f"{unit.name}  tp {group.size}, {lanes}", INK)
    by_name = {part.model: part for part in score.parts}
    for model in group.models:
        part = by_name[model]
        kept = part.goodput_rps / part.rate_rps if part.rate_rps else 0.0
        text = f"{model}  {part.rate_rps:.2f}/s, attainment {kept:.0%}"
        yield Note(text, ALARM if kept < LOW else GREY)


def _with_idle(pool: Pool, blocks: Sequence[Block]) -> Iterator[Block]:
    used = {gpu for block in blocks for gpu in block.gpus}
    idle = tuple(gpu for gpu in range(pool.gpus_per_node) if gpu not in used)
    yield from sorted(blocks, key=lambda block: block.gpus)
    if idle:
        yield Block(idle, pool.gpu.memory_bytes, None, (), (Note("idle"),), ())


def busiest(every: Sequence[Node]) -> list[Node]:
    """As many nodes as the picture has room for, those with the most traffic; in order."""
    kept: list[Node] = []
    gpus = 0
    for node in sorted(every, key=lambda node: (-node.rate_rps, node.number)):
        if kept and gpus + node.num_gpus > MAX_GPUS:
            break
        kept.append(node)
        gpus += node.num_gpus
    return sorted(kept, key=lambda node: node.number)


def in_columns(shown: Sequence[Node]) -> list[list[Node]]:
    """One column, or two of about the same height."""
    total = sum(node.num_gpus for node in shown)
    if total <= TWO_COLUMNS or len(shown) == 1:
        return [list(shown)]
    heights = [sum(node.height for node in shown[:cut]) for cut in range(len(shown) + 1)]
    cut = min(range(1, len(shown)), key=lambda cut: max(heights[cut], heights[-1] - heights[cut]))
    return [list(shown[:cut]), list(shown[cut:])]


class _Sheet:
    """One placement of a picture; coordinates are inches from its upper left corner."""

    def __init__(
        self,
        figure: Any,
        box: tuple[float, float, float, float],  # of the figure: left, bottom, width, height
        inches: tuple[float, float],
        problem: Problem,
        shown: Sequence[Node],  # of the whole picture: colours are the same in all of it
    ) -> None:
        from matplotlib import colormaps

        width, height = inches
        self._axes = figure.add_axes(box)
        self._axes.set_xlim(0, width)
        self._axes.set_ylim(height, 0)
        self._axes.set_axis_off()
        self._palette = colormaps[RAMP]
        most = max(pool.gpu.memory_bytes for pool in problem.pools)
        self._inches_per_byte = BAR / most
        self._most_bytes = most
        rates = [p.rate_rps for n in shown for b in n.blocks for p in b.pieces if p.rate_rps]
        self._low, self._high = (min(rates), max(rates)) if rates else (1.0, 1.0)

    def title(self, problem: Problem, panel: Panel, offered_rps: float, left_out: int) -> None:
        """What it adds up to, and what the colours mean."""
        text = f"{panel.goodput_rps:.1f} of {offered_rps:.1f} requests/s within SLO"
        text = f"{panel.title}: {text}" if panel.title else text
        self._write(MARGIN, 0.26, text, size=12, weight="bold")
        used = sum(len(block.gpus) for _, block in panel.blocks)
        text = (
            f"{len(problem.demands)} models in {len(panel.blocks)} units on {used} of"
            f" {problem.num_gpus} GPUs"
        )
        if left_out:
            text += f"; not drawn: the {left_out} nodes with the least traffic"
        self._write(MARGIN, 0.5, text, size=8, colour=GREY)
        self._legend(0.76)

    def _legend(self, y: float) -> None:
        x = MARGIN
        steps = 24
        for step in range(steps):
            self._fill(x + step * 0.03, y - 0.06, 0.031, 0.12, self._ramp(step / (steps - 1)))
        x += steps * 0.03 + 0.06
        span = f"{_short(self._low)} to {_short(self._high)} requests/s"
        x = self._write(x, y, f"weights, {span}", colour=GREY) + 0.18
        for colour, text in (
            (OTHER, "activations, runtime, reserve"),
            (KV_USED, "KV in use"),
            (KV_FREE, "KV free"),
        ):
            self._fill(x, y - 0.06, 0.16, 0.12, colour)
            x = self._write(x + 0.21, y, text, colour=GREY) + 0.18

    def column(self, left: float, column: Sequence[Node]) -> None:
        """Nodes below each other, and a scale below them."""
        y = HEAD
        for node in column:
            self._write(left + LABELS, y + NODE_HEAD / 2, f"node {node.number}", weight="bold")
            end = left + LABELS + node.blocks[0].memory_bytes * self._inches_per_byte
            self._write(end, y + NODE_HEAD / 2, node.gpu, colour=GREY, align="right")
            y += NODE_HEAD
            for block in node.blocks:
                self._block(left, y, block)
                y += len(block.gpus) * ROW
            y += NODE_GAP
        self._scale(left + LABELS, y)

    def _scale(self, left: float, y: float) -> None:
        most = self._most_bytes / GB
        step = next(step for step in (5, 10, 20, 50, 100) if most / step <= 6 or step == 100)
        for tick in range(0, int(most) + 1, step):
            x = left + tick * GB * self._inches_per_byte
            self._line(x, y - NODE_GAP + 0.02, x, y - NODE_GAP + 0.06)
            unit = " GB" if tick == 0 else ""
            self._write(x, y, f"{tick}{unit}", size=SMALL, colour=GREY, align="center")

    def _block(self, left: float, y: float, block: Block) -> None:
        height = len(block.gpus) * ROW
        top, inner = y + GAP / 2, height - GAP
        start = left + LABELS
        for row, gpu in enumerate(block.gpus):
            middle = y + (row + 0.5) * ROW
            self._write(start - 0.07, middle, str(gpu), size=SMALL, colour=GREY, align="right")
        x = start
        for piece in block.pieces:
            width = piece.num_bytes * self._inches_per_byte
            self._fill(x, top, width, inner, self._colour(piece))
            if piece.kind is Kind.WEIGHTS:
                self._line(x + width, top, x + width, top + inner, "white", 0.8)
                self._name(x, top, width, inner, piece)
            x += width
        for row in range(1, len(block.gpus)):
            self._line(start, y + row * ROW, x, y + row * ROW, "white", 0.5)
        width = block.memory_bytes * self._inches_per_byte
        self._frame(start, top, width, inner, dashed=block.unit is None)
        self._notes(start + BAR + 0.1, y, height, block)

    def _name(self, x: float, y: float, width: float, height: float, piece: Piece) -> None:
        """The model's name where it fits, along the bar or up it."""
        colour = "white" if _is_dark(self._colour(piece)) else INK
        for size in (TEXT, SMALL):
            need = len(piece.model) * CHAR * size / TEXT + 0.03
            if need <= width or (need <= height and width >= 0.1):
                middle = y + height / 2
                if need <= width and round((height + GAP) / ROW) % 2 == 0:
                    middle -= ROW / 2  # not on the line between two GPUs
                self._write(
                    x + width / 2, middle, piece.model, size=size, colour=colour,
                    align="center", upright=need > width,
                )  # fmt: skip
                return

    def _notes(self, x: float, y: float, height: float, block: Block) -> None:
        room = int(NOTES / CHAR)
        lines = list(block.notes)
        if len(lines) * LINE > height:
            colour = ALARM if any(note.colour == ALARM for note in lines) else INK
            texts = folded(block, max(1, int(height / LINE)), room)
            lines = [Note(text, colour) for text in texts]
        first = y + height / 2 - (len(lines) - 1) * LINE / 2
        for index, line in enumerate(lines):
            self._write(x, first + index * LINE, _cut(line.text, room), colour=line.colour)

    def _colour(self, piece: Piece) -> Any:
        if piece.kind is not Kind.WEIGHTS:
            return {Kind.OTHER: OTHER, Kind.KV_USED: KV_USED, Kind.KV_FREE: KV_FREE}[piece.kind]
        if piece.rate_rps <= self._low or self._high <= self._low:
            return self._ramp(0.0 if piece.rate_rps < self._high else 1.0)
        return self._ramp(log(piece.rate_rps / self._low) / log(self._high / self._low))

    def _ramp(self, share: float) -> Any:
        low, high = RAMP_ENDS
        return self._palette(low + share * (high - low))

    def _write(
        self, x: float, y: float, text: str, *, size: float = TEXT, colour: str = INK,
        weight: str = "normal", align: str = "left", upright: bool = False,
    ) -> float:  # fmt: skip
        """Put text at its middle line; about where it ends."""
        self._axes.text(
            x, y, text, fontsize=size, color=colour, fontweight=weight, ha=align,
            va="center_baseline" if not upright else "center", rotation=90 if upright else 0,
        )  # fmt: skip
        return x + len(text) * CHAR * size / TEXT

    def _fill(self, x: float, y: float, width: float, height: float, colour: Any) -> None:
        from matplotlib.patches import Rectangle

        self._axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0))

    def _frame(self, x: float, y: float, width: float, height: float, *, dashed: bool) -> None:
        from matplotlib.patches import Rectangle

        style = (0, (3, 2)) if dashed else "solid"
        self._axes.add_patch(
            Rectangle(
                (x, y), width, height, fill=False, edgecolor=GREY, linewidth=0.7, linestyle=style
            )
        )

    def _line(
        self, x: float, y: float, to_x: float, to_y: float, colour: str = RULE, width: float = 0.8
    ) -> None:
        self._axes.plot([x, to_x], [y, to_y], color=colour, linewidth=width, solid_capstyle="butt")


def folded(block: Block, num_lines: int, room: int) -> list[str]:
    """Unit and names in fewer lines than there are models."""
    head = block.unit or "idle"
    if not block.models:
        return [head]
    if len(block.models) == 1:
        return [f"{head}  {block.notes[1].text.replace('attainment ', '')}"]
    lines: list[str] = []
    line = f"{head}  "
    for index, model in enumerate(block.models):
        comma = "," if index < len(block.models) - 1 else ""
        rest = len(block.models) - index
        last = len(lines) == num_lines - 1
        more = f" +{rest - 1}" if last and rest > 1 else ""
        if len(line) + len(model) + len(comma) + len(more) > room:
            if last:
                lines.append(f"{line.rstrip(', ')} +{rest}")
                return lines
            lines.append(line.rstrip())
            line = ""
        line += f"{model}{comma} "
    return [*lines, line.rstrip()]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def _is_dark(colour: Any) -> bool:
    red, green, blue = colour[:3]
    return bool(0.3 * red + 0.59 * green + 0.11 * blue < 0.55)
