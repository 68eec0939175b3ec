"""What `muxrt serve` is told: the endpoint, the models, and the units that hold them."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from muxrt.config.document import Key, KeyedError
from muxrt.config.placement import (
    GIB,
    MIB,
    Count,
    ModelSpec,
    Name,
    NotNegative,
    Placement,
    Positive,
    UnitSpec,
    exchanging,
)
from muxrt.config.replan import Replan, replan_problems
from muxrt.config.routing import Routing, routing_problems

# Shares written as decimals may add up to a hair more than one (0.7 + 0.2 + 0.1).
SHARE_SLACK = 1e-6
RANKS = (1, 2, 4, 8)  # of a mesh: blocks of up to 16 planes can be dealt to so many


class ApiKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the accepted API keys are: exactly one of a file (a key per line) or a variable."""

    file: Name | None = None
    env: Name | None = None  # name of an environment variable; keys separated by commas
    # Cached prompts of different keys are kept apart: nobody learns by timing what others asked,
    # at the price of a system prompt cached once per key.
    isolate: bool = False


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HTTP side."""

    host: Name = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000  # 0 = any free one
    api_keys: ApiKeys | None = None  # None = open to whoever reaches the port
    max_body_bytes: Count = 8 * MIB
    drain_s: NotNegative = 30.0  # what runs at SIGTERM may finish until then


class TrafficFolder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A log of who was asked how much when, for `muxrt traffic` and `muxrt replan`.

    A folder with an SQLite file per day (UTC). It never holds what was asked or answered.
    """

    path: Name  # relative paths are relative to the YAML
    keep_days: Count = 28  # older days are deleted: four weeks
    max_bytes: Annotated[int, Meta(ge=MIB)] = GIB  # beyond it, the oldest go first


class Admin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may change what is served while it is served: routes under /admin."""

    keys: ApiKeys  # of their own: no API key opens them
    journal: Name | None = None  # a file; without it a restart forgets changes
    load_s: Positive = 3600.0  # a new unit may load for so long, or the change is undone
    drain_s: NotNegative = 600.0  # old units may finish what runs in them for so long
    max_extra_bytes: Count | None = None  # that a change may take beside what runs; None = any


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One endpoint, its models, and where they live."""

    models: tuple[ModelSpec, ...]
    units: tuple[UnitSpec, ...]
    endpoint: Endpoint = Endpoint()
    routing: Routing = Routing()
    traffic: TrafficFolder | None = None  # None = no log
    admin: Admin | None = None  # None = nobody
    replan: Replan | None = None  # None = the placement stays as it is

    @property
    def placement(self) -> Placement:
        return Placement(self.units)

    def model(self, name: str) -> ModelSpec:
        """The model of that name; KeyError where there is none."""
        for spec in self.models:
            if spec.name == name:
                return spec
        raise KeyError(name)


def check_references(config: ServeConfig) -> None:
    """Raise `KeyedError` for the first key that contradicts another one."""
    for problem in _problems(config):
        raise problem


def _problems(config: ServeConfig) -> Iterator[KeyedError]:
    yield from _key_problems(config.endpoint.api_keys)
    if config.admin is not None:
        yield from _key_problems(config.admin.keys, ("admin", "keys"))
    if not config.models:
        yield KeyedError(("models",), "found an empty list, expected at least one model")
    if not config.units:
        yield KeyedError(("units",), "found an empty list, expected at least one unit")
    yield from _twice("models", [model.name for model in config.models])
    yield from _twice("units", [unit.name for unit in config.units])
    known = [model.name for model in config.models]
    for index, model in enumerate(config.models):
        yield from source_problems(("models", index), model)
    for index, unit in enumerate(config.units):
        yield from _unit_problems(index, unit, known)
        yield from _policy_problems(index, unit, config.models)
    placed = {model.name for unit in config.units for model in unit.models}
    for index, name in enumerate(known):
        if name not in placed:
            yield KeyedError(
                ("models", index, "name"),
                f"{name!r} is in no unit: add {{name: {name}}} to the models of a unit"
                " or remove it here",
            )
    yield from _core_problems(config.units)
    yield from _role_problems(config.units)
    yield from _sleep_problems(config)
    yield from routing_problems(config.routing)
    if config.replan is not None:
        yield from _replan_problems(config, config.replan)


def _replan_problems(config: ServeConfig, replan: Replan) -> Iterator[KeyedError]:
    """A server that is to plan anew and cannot."""
    yield from replan_problems(replan)
    if config.traffic is None:
        yield KeyedError(
            ("replan",), "found no log to plan by, expected traffic: {path: FOLDER} beside it"
        )
    if config.admin is None:
        yield KeyedError(
            ("replan",),
            "found no admin, expected admin: {keys: {env: NAME}} beside it: its keys show what was"
            " decided, and its limits hold for the change",
        )
    for index, model in enumerate(config.models):
        if model.slo is None and replan.slo is None:
            yield KeyedError(
                ("models", index),
                f"{model.name} has no slo, expected one to plan by, here or in replan.slo, such as"
                " {ttft_s: 1.0, tpot_s: 0.1}",
            )
    for index, unit in enumerate(config.units):
        if unit.has_roles:
            yield KeyedError(
                ("units", index),
                "found roles and replan, expected one of them: units that hand sequences over are"
                " changed by a restart",
            )


def source_problems(at: Key, model: ModelSpec) -> Iterator[KeyedError]:
    """A model that has no source, or several; `at` is its key."""
    named = {"path": model.path, "preset": model.preset, "sizes": model.sizes}
    found = [name for name, value in named.items() if value is not None]
    if len(found) != 1:
        yield KeyedError(
            at,
            f"found {' and '.join(found) or 'none'} of path, preset and sizes,"
            " expected exactly one of them",
        )


def _key_problems(keys: ApiKeys | None, at: Key = ("endpoint", "api_keys")) -> Iterator[KeyedError]:
    if keys is not None and (keys.file is None) == (keys.env is None):
        found = "neither" if keys.file is None else "both"
        yield KeyedError(at, f"found {found} of file and env, expected exactly one of them")


def _twice(section: str, names: list[str]) -> Iterator[KeyedError]:
    counts = Counter(names)
    for index, name in enumerate(names):
        if counts[name] > 1 and name in names[:index]:
            first = names.index(name)
            yield KeyedError(
                (section, index, "name"), f"{name!r} is already the name of {section}[{first}]"
            )


def _unit_problems(index: int, unit: UnitSpec, known: list[str]) -> Iterator[KeyedError]:
    at = ("units", index, "models")
    if not unit.models:
        yield KeyedError(at, "found an empty list, expected at least one model")
    names = [model.name for model in unit.models]
    for position, name in enumerate(names):
        if name not in known:
            yield KeyedError(
                (*at, position, "name"),
                f"found {name!r}, expected one of the models of this file: {', '.join(known)}",
            )
        if name in names[:position]:
            yield KeyedError(
                (*at, position, "name"),
                f"{name!r} is already units[{index}].models[{names.index(name)}]",
            )
    shares = [model.quota for model in unit.models if model.quota is not None]
    if sum(shares) > 1 + SHARE_SLACK:
        terms = " + ".join(f"{share:g}" for share in shares)
        yield KeyedError(
            at, f"the quotas add up to {terms} = {sum(shares):g}, expected at most 1 in all"
        )
    if unit.scheduling.preempt == "swap" and not unit.memory.swap_bytes:
        yield KeyedError(
            ("units", index, "scheduling", "preempt"),
            f"swap needs room: set units[{index}].memory.swap_bytes, such as 64MiB",
        )


def _sleep_problems(config: ServeConfig) -> Iterator[KeyedError]:
    """Models that are to sleep where that cannot be."""
    for index, model in enumerate(config.models):
        if model.pin and model.idle_timeout_s is not None:
            yield KeyedError(
                ("models", index, "idle_timeout_s"),
                f"found {model.idle_timeout_s:g}, expected none: {model.name} is pinned",
            )
    sleepers = {model.name for model in config.models if model.idle_timeout_s is not None}
    for index, unit in enumerate(exchanging(config.units)):
        named = sorted(sleepers.intersection(part.name for part in unit.models))
        why = "memory.weight_bytes" if unit.memory.weight_bytes is not None else None
        why = f"idle_timeout_s of {named[0]}" if named else why
        if why and unit.has_roles:
            yield KeyedError(
                ("units", index),
                f"found {why} and roles, expected one of them: K and V are fetched from units"
                " whose models are awake",
            )
        if why and unit.mesh.device == "gpu":
            yield KeyedError(
                ("units", index), f"found {why}, expected none on a GPU: models sleep on CPUs only"
            )
        if named and unit.mesh.tp > 1 and unit.memory.weight_bytes is None:
            yield KeyedError(
                ("units", index, "memory"),
                f"found {why} and no weight_bytes, expected it: {unit.mesh.tp} ranks reserve their"
                " memory before they know what weights take",
            )


def _role_problems(units: tuple[UnitSpec, ...]) -> Iterator[KeyedError]:
    """Prefills that nobody goes on with, or the other way round; stages that do not come out."""
    roles = {(part.name, part.role) for unit in units for part in unit.models}
    other = {"prefill": "decode", "decode": "prefill"}
    for index, unit in enumerate(units):
        for position, part in enumerate(unit.models):
            if part.role in other and (part.name, other[part.role]) not in roles:
                yield KeyedError(
                    ("units", index, "models", position, "role"),
                    f"{part.name} has a {part.role} unit and no {other[part.role]} unit",
                )
        yield from _stage_problems(index, unit)


def _stage_problems(index: int, unit: UnitSpec) -> Iterator[KeyedError]:
    mesh, at = unit.mesh, ("units", index, "mesh")
    if mesh.pp > 1 and len(mesh.gpus or ()) % mesh.pp:
        yield KeyedError(
            (*at, "pp"), f"found {mesh.pp}, expected a divisor of its {len(mesh.gpus or ())} gpus"
        )
    elif mesh.pp > 1 and not mesh.gpus:
        yield KeyedError((*at, "pp"), f"found {mesh.pp} stages and no gpus, expected them listed")
    if mesh.nodes is not None and (len(mesh.nodes) != mesh.pp or mesh.node is not None):
        yield KeyedError(
            (*at, "nodes"), f"found {len(mesh.nodes)}, expected one for each stage, and no node"
        )


def stage_problems(units: tuple[UnitSpec, ...], verb: str) -> Iterator[KeyedError]:
    """Pipeline stages, which `verb` cannot run."""
    for index, unit in enumerate(units):
        if unit.mesh.pp > 1:
            yield KeyedError(
                ("units", index, "mesh", "pp"),
                f"found {unit.mesh.pp}, expected 1: {verb} has no pipeline stages, such a placement"
                " is a plan only",
            )


def _policy_problems(
    index: int, unit: UnitSpec, models: tuple[ModelSpec, ...]
) -> Iterator[KeyedError]:
    """A policy that goes by targets, and a model that has none."""
    if unit.scheduling.policy != "slo":
        return
    aimless = {model.name for model in models if model.slo is None}
    for part in unit.models:
        if part.name in aimless:
            yield KeyedError(
                ("units", index, "scheduling", "policy"),
                f"slo goes by targets, and {part.name} has none: give it"
                " slo: {ttft_s: 1.0, tpot_s: 0.1}, or use adbs",
            )


def _core_problems(units: tuple[UnitSpec, ...]) -> Iterator[KeyedError]:
    owner: dict[int, int] = {}
    for index, unit in enumerate(units):
        cores = unit.mesh.cores
        if cores is None:
            continue
        at = ("units", index, "mesh", "cores")
        if not cores:
            yield KeyedError(at, "found an empty list, expected core numbers")
        for core in cores:
            if core in owner:
                yield KeyedError(at, f"core {core} is already in units[{owner[core]}].mesh.cores")
            owner[core] = index
        yield from rank_problems(index, unit, len(cores), f"mesh.cores lists {len(cores)}")
        yield from split_problems(index, unit, len(cores), f"mesh.cores lists {len(cores)}")


def rank_problems(index: int, unit: UnitSpec, num_cores: int, why: str) -> Iterator[KeyedError]:
    """A tensor-parallel mesh that cores cannot be; `why` says where `num_cores` comes from."""
    at, size = ("units", index, "mesh", "gpus"), unit.mesh.tp
    if unit.mesh.device != "cpu" or size == 1:
        return
    if size not in RANKS or len(set(unit.mesh.gpus or ())) != size:
        found = list(unit.mesh.gpus or ())
        yield KeyedError(at, f"found {found}, expected 1, 2, 4 or 8 different ranks on a CPU")
    elif size > num_cores:
        yield KeyedError(
            at, f"found {size} ranks and {why} cores: expected at most {num_cores}, a core each"
        )
    if unit.lanes.kind == "processes":
        yield KeyedError(
            ("units", index, "lanes", "kind"),
            f"found processes on a mesh of {size} ranks, expected cores: a rank is a process, its"
            " lanes are threads",
        )


def split_problems(index: int, unit: UnitSpec, num_cores: int, why: str) -> Iterator[KeyedError]:
    """Lanes that need more cores than the unit has; `why` says where `num_cores` comes from."""
    split = unit.lanes.split
    if split is None:
        return
    at = ("units", index, "lanes", "split")
    if not split:
        yield KeyedError(at, "found an empty list, expected cores per lane, such as [1, 1]")
        return
    if unit.mesh.tp > 1:
        num_cores //= unit.mesh.tp
        why += f", {num_cores} for each of {unit.mesh.tp} ranks"
    if sum(split) > num_cores:
        yield KeyedError(
            at,
            f"the lanes need {sum(split)} cores and {why}: expected a sum of at most {num_cores}",
        )


def listening_on(config: ServeConfig, host: str | None, port: int | None) -> ServeConfig:
    """`config` at another address; None leaves the file's."""
    endpoint = config.endpoint
    moved = msgspec.structs.replace(
        endpoint,
        host=endpoint.host if host is None else host,
        port=endpoint.port if port is None else port,
    )
    return msgspec.structs.replace(config, endpoint=moved)
