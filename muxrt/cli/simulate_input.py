"""From the files of `muxrt simulate` to what it runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from muxrt.cli.plan_input import with_measured
from muxrt.config.cluster import KINDS, GpuKind
from muxrt.config.document import KeyedError
from muxrt.config.load import load_file
from muxrt.config.model import ModelShape
from muxrt.config.placement import Slo, UnitSpec
from muxrt.config.plan import EngineFacts, load_plan
from muxrt.config.presets import model_shape
from muxrt.config.serve import ServeConfig, stage_problems
from muxrt.config.shard import check_split
from muxrt.cost.memory import allowed_tps
from muxrt.cost.model import CostModel
from muxrt.cost.profile import Profile, load_profile
from muxrt.errors import ConfigError
from muxrt.sim.setting import NETWORK_BYTES_PER_S, Failure, Setting
from muxrt.worker.boot import with_split
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Workload, adjusted, load_workload, with_models
from muxrt.workload.trace import read_trace


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the engine and its GPUs, as the command line has it."""

    profiles: tuple[Path, ...] = ()
    plan: Path | None = None
    control_s: float | None = None
    interference: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """The requests and what befalls them, as the command line has them."""

    workload: Path
    duration_s: float | None = None  # None: the file's
    speeds: tuple[float, ...] = (1.0,)
    seed: int | None = None
    num_seeds: int = 1
    warmup_s: float = 0.0
    refuse_late: bool = False  # models without a queue_timeout_s get that of their TTFT target
    failures: tuple[Failure, ...] = ()

    def workload_of(self, models: Sequence[str], speed: float, number: int = 0) -> Workload:
        """The workload for `models` at `speed` times its rates, from the seed of that number."""
        workload = with_models(load_workload(self.workload), list(models))
        seed = (workload.seed if self.seed is None else self.seed) + number
        return adjusted(workload, duration_s=self.duration_s, speed=speed, seed=seed)


def parse_failure(text: str) -> Failure:
    """`UNIT@T[+S]`: it dies at T seconds and is back S later. Raises ConfigError."""
    unit, _, times = text.rpartition("@")
    at, plus, down = times.partition("+")
    try:
        return Failure(unit, float(at), float(down) if plus else None)
    except ValueError:
        raise ConfigError(
            f"found --fail {text}, expected UNIT@T or UNIT@T+S with seconds, such as unit-0@30+12.5"
        ) from None


@dataclass(frozen=True, slots=True)
class Variant:
    """A placement that is simulated, under the name that it is shown by."""

    name: str
    config: ServeConfig
    shapes: Mapping[str, ModelShape]

    def __post_init__(self) -> None:
        _check_meshes(self.config, self.shapes)

    @property
    def models(self) -> list[str]:
        """Their names."""
        return [model.name for model in self.config.models]


@dataclass(frozen=True, slots=True)
class Known:
    """GPUs by kind, the engine's facts, and step times."""

    gpus: Mapping[str, GpuKind]
    engine: EngineFacts
    cost: CostModel
    network_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Case:
    """A placement, what it is simulated in, and its requests."""

    config: ServeConfig
    setting: Setting
    arrivals: list[Arrival]
    slos: dict[str, Slo | None]
    duration_s: float  # in which requests come


def load_variant(path: Path) -> Variant:
    """The placement of a file, under its name. Raises ConfigError."""
    file = load_file(path)
    try:
        for problem in stage_problems(file.config.units, "`muxrt simulate`"):
            raise problem
        shapes = {
            model.name: model_shape(model, ("models", index))
            for index, model in enumerate(file.config.models)
        }
    except KeyedError as problem:
        raise file.document.locate(problem) from None
    return Variant(str(path), file.config, shapes)


def make_case(
    variant: Variant, known: Known, load: Load, speed: float = 1.0, number: int = 0
) -> Case:
    """Requests at `speed` times the rates, from the seed of that number.

    Raises ConfigError: one line with file, key, what was found and what was expected.
    """
    workload = load.workload_of(variant.models, speed, number)
    rows = read_trace(Path(workload.trace.file)) if workload.trace is not None else ()
    found = arrivals(workload, rows)
    if not found:
        raise ConfigError(f"{load.workload}: no request comes in {workload.duration_s:g} s")
    units = tuple(_on_cores(unit, known.gpus) for unit in variant.config.units)
    config = msgspec.structs.replace(variant.config, units=units)
    slos = _slos(config, workload)
    setting = Setting(
        variant.shapes,
        known.cost,
        known.engine,
        known.gpus,
        failures=load.failures,
        network_bytes_per_s=known.network_bytes_per_s,
    )
    if load.refuse_late:
        models = tuple(model.refusing_late(slos[model.name]) for model in config.models)
        config = msgspec.structs.replace(config, models=models)
    return Case(config, setting, found, slos, workload.duration_s)


def _on_cores(unit: UnitSpec, gpus: Mapping[str, GpuKind]) -> UnitSpec:
    """A unit on cores of no stated kind: on those that were profiled, with the lanes it is served
    with. As it is where several kinds of cores are known, or none.
    """
    kinds = [kind for kind in gpus.values() if kind.device == "cpu"]
    if unit.mesh.device != "cpu" or unit.mesh.kind is not None or len(kinds) != 1:
        return unit
    (kind,) = kinds
    mesh = msgspec.structs.replace(unit.mesh, kind=kind.name, gpus=unit.mesh.gpus or (0,))
    return with_split(msgspec.structs.replace(unit, mesh=mesh), kind.sms * mesh.tp)


def _check_meshes(config: ServeConfig, shapes: Mapping[str, ModelShape]) -> None:
    """Raise ConfigError for a mesh that does not divide a model of its unit."""
    for unit in config.units:
        size = len(unit.mesh.gpus or (0,))
        for model in unit.models:
            shape = shapes[model.name]
            if unit.mesh.device == "cpu":  # parts of a model need not be equal there
                check_split(model.name, shape, size)
                continue
            allowed = allowed_tps(shape)
            if size not in allowed:
                raise ConfigError(
                    f"{unit.name}: found {model.name} on a mesh of {size} GPUs, which do not divide"
                    f" its {shape.num_heads} heads and intermediate_size {shape.intermediate_size};"
                    f" expected {', '.join(map(str, allowed))}"
                )


def load_known(facts: Facts) -> Known:
    """Read plan and profiles. Raises ConfigError."""
    gpus, engine, paths = dict(KINDS), EngineFacts(), facts.profiles
    network_bytes_per_s = NETWORK_BYTES_PER_S
    stated: Collection[str] = ()
    if facts.plan is not None:
        plan = load_plan(facts.plan)
        gpus |= {kind.name: kind for kind in plan.file.cluster.kinds}
        network_bytes_per_s = plan.file.cluster.network_bytes_per_s
        engine, stated = plan.file.engine, plan.document.value.get("engine") or ()
        paths = paths or tuple(Path(name) for name in plan.file.profiles)
    profiles: list[Profile] = [load_profile(path) for path in paths]
    for profile in profiles:
        if profile.file is not None and profile.file.kind is not None:
            gpus.setdefault(profile.gpu, profile.file.kind)
    engine = with_measured(engine, stated, profiles)
    if facts.control_s is not None:
        engine = msgspec.structs.replace(engine, control_s=facts.control_s)
    if facts.interference is not None:
        engine = msgspec.structs.replace(
            engine,
            interference=facts.interference,
            prefill_interference=None,
            decode_interference=None,
        )
    return Known(gpus, engine, CostModel(profiles, gpus), network_bytes_per_s)


def _slos(config: ServeConfig, workload: Workload) -> dict[str, Slo | None]:
    """The workload's targets for a model, the model's own, those for all: as `muxrt plan` does."""
    asked = {model.name: model.slo for model in workload.models}
    return {m.name: asked.get(m.name) or m.slo or workload.slo for m in config.models}
