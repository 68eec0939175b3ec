"""From the placement that is served to another one, as steps: what is to be done in which order.

Units are changed whole: one that differs in anything is started anew beside the old one, which
finishes what runs in it. Only a unit whose models may sleep goes on, where it just loses some.
Nothing is routed to new units until all of them are ready, and then everything at once, so a
placement is never half there: before the switch it is the old one, after it the new one. Each step
names a unit and can be done twice.
"""

from collections.abc import Iterable, Mapping
from enum import Enum

import msgspec

from muxrt.config.placement import ModelSpec, UnitSpec, exchanging
from muxrt.errors import ConfigError


class Kind(Enum):
    """What a step does."""

    LOAD = "load"  # start the unit's process: weights, memory, warm-up
    SWITCH = "switch"  # new requests go to the units of the new placement
    DRAIN = "drain"  # wait for the last request in the unit
    FREE = "free"  # end its process
    FORGET = "forget"  # wait for the last request for a model in it, which sleeps for good then


class Step(msgspec.Struct, frozen=True):
    """One thing to do."""

    kind: Kind
    unit: str = ""  # of a SWITCH: none
    model: str = ""  # of a FORGET


class Deployment(msgspec.Struct, frozen=True):
    """What is served: models, and where they live."""

    models: tuple[ModelSpec, ...]
    units: tuple[UnitSpec, ...]

    def specs_of(self, unit: UnitSpec) -> tuple[ModelSpec, ...]:
        """The models of a unit, in its order. Raises ConfigError for one that is not known."""
        by_name = {model.name: model for model in self.models}
        for part in unit.models:
            if part.name not in by_name:
                known = ", ".join(by_name)
                raise ConfigError(f"unit {unit.name}: found {part.name!r}, expected one of {known}")
        return tuple(by_name[part.name] for part in unit.models)


class Change(msgspec.Struct, frozen=True):
    """From one deployment to another."""

    before: Deployment
    after: Deployment  # its units by the names that they get
    steps: tuple[Step, ...]  # none: it is there already

    @property
    def loaded(self) -> tuple[str, ...]:
        """Units that are started."""
        return tuple(step.unit for step in self.steps if step.kind is Kind.LOAD)

    @property
    def freed(self) -> tuple[str, ...]:
        """Units that end."""
        return tuple(step.unit for step in self.steps if step.kind is Kind.FREE)


def diff(before: Deployment, wanted: Deployment) -> Change:
    """What turns `before` into `wanted`; units that are the same but for their names stay.

    Raises ConfigError where a unit that changes hands sequences over, or takes them.
    """
    left = list(exchanging(before.units))
    kept: dict[int, UnitSpec] = {}
    for index, unit in enumerate(exchanging(wanted.units)):
        twins = [old for old in left if _content(old, before) == _content(unit, wanted)]
        if twins:  # the one of that name, if there are several
            kept[index] = next((old for old in twins if old.name == unit.name), twins[0])
            left.remove(kept[index])
    lost: list[Step] = []  # models, by units that go on without them
    for index, unit in enumerate(exchanging(wanted.units)):
        larger = [old for old in left if _only_loses(old, before, unit, wanted)]
        if index not in kept and larger:
            kept[index] = next((old for old in larger if old.name == unit.name), larger[0])
            left.remove(kept[index])
            names = {part.name for part in unit.models}
            gone = [part.name for part in kept[index].models if part.name not in names]
            lost += [Step(Kind.FORGET, kept[index].name, name) for name in gone]
    taken = {unit.name for unit in before.units}
    units = []
    for index, unit in enumerate(exchanging(wanted.units)):
        name = kept[index].name if index in kept else _free_name(unit.name, taken)
        taken.add(name)
        units.append(msgspec.structs.replace(unit, name=name))
    new = [unit for index, unit in enumerate(units) if index not in kept]
    for unit in (*new, *left):
        if unit.has_roles:
            raise ConfigError(
                f"unit {unit.name} has roles, expected mixed: units that hand sequences over are"
                " changed by a restart"
            )
    after = Deployment(wanted.models, tuple(units))
    steps = [Step(Kind.LOAD, unit.name) for unit in new]
    is_same = _by_name(after.units) == _by_name(exchanging(before.units))
    if not is_same or before.models != wanted.models:
        steps.append(Step(Kind.SWITCH))
    steps += lost
    for unit in left:
        steps += [Step(Kind.DRAIN, unit.name), Step(Kind.FREE, unit.name)]
    return Change(before, after, tuple(steps))


def _by_name(units: Iterable[UnitSpec]) -> dict[str, UnitSpec]:
    return {unit.name: unit for unit in units}


# What a model is to its endpoint only, or expected to be: a unit need not start anew for it.
_EDGE = {"rate_rps": 1.0, "queue_timeout_s": None, "max_queue": 0}


def _content(unit: UnitSpec, deployment: Deployment) -> bytes:
    """All that makes a unit what it is, its name left out."""
    spec = msgspec.structs.replace(unit.lasting, name="-")
    models = [msgspec.structs.replace(m, **_EDGE) for m in deployment.specs_of(spec)]
    return msgspec.json.encode((spec, models))


def _only_loses(old: UnitSpec, before: Deployment, new: UnitSpec, wanted: Deployment) -> bool:
    """`new` is `old` without some of its models, and those can be put to sleep for good."""
    if old.memory.weight_bytes is None or old.has_roles:
        return False
    names = {part.name for part in new.models}
    rest = tuple(part for part in old.models if part.name in names)
    if not rest or len(rest) == len(old.models):
        return False
    smaller = msgspec.structs.replace(old, models=rest)
    return _content(smaller, before) == _content(new, wanted)


def _free_name(name: str, taken: Iterable[str]) -> str:
    """`name`, or with the first number behind it that nobody has."""
    taken, number = set(taken), 2
    stem, dot, tail = name.rpartition(".")
    if dot and tail.isdigit():
        name_, number = stem, int(tail)
    else:
        name_ = name
    chosen = name
    while chosen in taken:
        chosen = f"{name_}.{number}"
        number += 1
    return chosen


def check_room(change: Change, num_bytes: Mapping[str, int], limit_bytes: int | None) -> int:
    """Bytes that the change takes on top while old and new units are both there.

    Raises ConfigError where that is more than `limit_bytes`; None = no limit.
    """
    needed = sum(num_bytes[name] for name in change.loaded)
    if limit_bytes is not None and needed > limit_bytes:
        raise ConfigError(
            f"the units {', '.join(change.loaded)} take {needed} bytes beside those that run,"
            f" expected at most admin.max_extra_bytes = {limit_bytes}: change fewer at a time"
        )
    return needed
