"""What two placements of the same models differ in: units kept, changed, added, removed."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from muxrt.config.placement import UnitSpec


class Fate(Enum):
    """What becomes of a unit."""

    KEPT = "kept"
    CHANGED = "changed"  # it starts anew where it was
    ADDED = "added"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class UnitDiff:
    """A unit of either placement, by its name."""

    fate: Fate
    old: UnitSpec | None
    new: UnitSpec | None

    @property
    def name(self) -> str:
        unit = self.new or self.old
        assert unit is not None, "it is in one of them"
        return unit.name


@dataclass(frozen=True, slots=True)
class Move:
    """A model whose units are others than before."""

    model: str
    left: tuple[str, ...]  # units that lose it
    joined: tuple[str, ...]  # units that get it


@dataclass(frozen=True, slots=True)
class Diff:
    """All units, those of the new placement first, and the models that move."""

    units: tuple[UnitDiff, ...]
    moves: tuple[Move, ...]

    @property
    def is_empty(self) -> bool:
        """Nothing has to be started or ended."""
        return all(unit.fate is Fate.KEPT for unit in self.units)

    def of(self, *fates: Fate) -> tuple[UnitDiff, ...]:
        """The units with one of those fates."""
        return tuple(unit for unit in self.units if unit.fate in fates)


def diff(old: Sequence[UnitSpec], new: Sequence[UnitSpec]) -> Diff:
    """From `old` to `new`; units of the same name are the same unit.

    A unit is kept where nothing differs that it would have to start anew for.
    """
    before = {unit.name: unit for unit in old}
    after = {unit.name for unit in new}
    units = []
    for unit in new:
        was = before.get(unit.name)
        if was is None:
            units.append(UnitDiff(Fate.ADDED, None, unit))
        else:
            fate = Fate.KEPT if was.lasting == unit.lasting else Fate.CHANGED
            units.append(UnitDiff(fate, was, unit))
    units += [UnitDiff(Fate.REMOVED, unit, None) for unit in old if unit.name not in after]
    return Diff(tuple(units), _moves(old, new))


def _moves(old: Sequence[UnitSpec], new: Sequence[UnitSpec]) -> tuple[Move, ...]:
    before, after = _homes(old), _homes(new)
    moves = []
    for model in sorted(before.keys() | after.keys()):
        was, now = before.get(model, set()), after.get(model, set())
        if was != now:
            moves.append(Move(model, tuple(sorted(was - now)), tuple(sorted(now - was))))
    return tuple(moves)


def _homes(units: Sequence[UnitSpec]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for unit in units:
        for part in unit.models:
            found.setdefault(part.name, set()).add(unit.name)
    return found
