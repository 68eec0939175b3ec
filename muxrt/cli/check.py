"""Whether a configuration can be served on this machine, and what it gives each model."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from muxrt.cli.show import show_bytes
from muxrt.config.document import Key, KeyedError
from muxrt.config.load import load_file
from muxrt.config.model import ModelShape, load_shape
from muxrt.config.placement import ModelSpec, UnitSpec, exchanging
from muxrt.config.plan import load_plan, mesh_problems
from muxrt.config.replan import Replan
from muxrt.config.serve import (
    RANKS,
    ApiKeys,
    ServeConfig,
    rank_problems,
    split_problems,
    stage_problems,
)
from muxrt.config.shard import Shard
from muxrt.cost.memory import num_params
from muxrt.engine.build import UnitPlan, linear_dtype, plan_unit, weight_bytes, weight_dtype
from muxrt.engine.ranks import plan_rank
from muxrt.errors import ConfigError, MuxrtError
from muxrt.sched.queues import ServedModel
from muxrt.worker.driver import NoGpu, count_gpus

# Large enough for any floor, small enough that quota arithmetic in floats stays exact.
AMPLE_BYTES = 1 << 50
KIB = 1 << 10
LANES = {"gpu": ("green", "stream", "mps"), "cpu": ("cores", "processes")}


@dataclass(frozen=True, slots=True)
class Checked:
    """A configuration that can be served here, with what follows from it."""

    config: ServeConfig
    shapes: dict[str, ModelShape]
    plans: tuple[UnitPlan, ...]


def check_file(path: Path) -> Checked:
    """Read and check everything that `muxrt serve` needs, without starting it.

    Raises ConfigError: one line with file, line, key, what was found and what was expected.
    """
    file = load_file(path)
    try:
        return check(file.config, os.sched_getaffinity(0), os.environ)
    except KeyedError as problem:
        raise file.document.locate(problem) from None


def check(
    config: ServeConfig,
    cores: set[int],
    environ: Mapping[str, str],
    gpus: Callable[[], int] = count_gpus,
    nccl: Callable[[], None] | None = None,
) -> Checked:
    """`check_file` for a configuration in memory; raises `KeyedError`.

    `gpus` counts those of this machine, or raises NoGpu; `nccl` raises MuxrtError where torch has
    none (None: torch is asked).
    """
    _check_keys(config.endpoint.api_keys, environ, ("endpoint", "api_keys"))
    if config.admin is not None:
        _check_keys(config.admin.keys, environ, ("admin", "keys"))
    shapes = {model.name: _shape(i, model) for i, model in enumerate(config.models)}
    for problem in stage_problems(config.units, "`muxrt serve`"):
        raise problem
    for index, unit in enumerate(exchanging(config.units)):
        _check_exchange(index, unit)
        _check_lanes(index, unit)
        if unit.mesh.device == "gpu":
            _check_gpu(index, unit, gpus)
            _check_gpu_ranks(index, unit, nccl or _ask_torch)
        _check_dtypes(unit, config)
        _check_cores(index, unit, cores)
    if config.replan is not None:
        _check_replan(config.replan, config.units)
    plans = tuple(_plan(i, unit, config, shapes) for i, unit in enumerate(exchanging(config.units)))
    return Checked(config, shapes, plans)


def _check_replan(replan: Replan, units: tuple[UnitSpec, ...]) -> None:
    """A plan that can be read, and units in its terms: better said now than every night."""
    try:
        plan = load_plan(Path(replan.plan))
    except ConfigError as error:
        raise KeyedError(("replan", "plan"), error.message) from None
    for problem in mesh_problems(units, plan.file):
        raise problem


def _check_keys(keys: ApiKeys | None, environ: Mapping[str, str], at: Key) -> None:
    if keys is None:
        return
    if keys.file is not None and not Path(keys.file).is_file():
        raise KeyedError(
            (*at, "file"),
            f"there is no file {keys.file}, expected one with an API key per line",
        )
    if keys.env is not None and not environ.get(keys.env):
        raise KeyedError(
            (*at, "env"),
            f"the variable {keys.env} is not set, expected API keys separated by commas",
        )


def _shape(index: int, model: ModelSpec) -> ModelShape:
    if model.path is None:
        raise KeyedError(
            ("models", index),
            f"{model.name!r} has no path, expected a Hugging Face model folder: a preset or sizes"
            " are enough to plan, not to serve",
        )
    at: Key = ("models", index, "path")
    folder = Path(model.path)
    if not folder.is_dir():
        raise KeyedError(at, f"there is no folder {folder}, expected a Hugging Face model folder")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise KeyedError(at, f"{name} is missing in {folder}")
    if not any(folder.glob("*.safetensors")):
        raise KeyedError(at, f"no *.safetensors in {folder}: weights in other formats are not read")
    try:
        shape = load_shape(folder)
    except ConfigError as error:
        raise KeyedError(at, error.message) from None
    if model.max_model_len is not None and model.max_model_len > shape.max_positions:
        raise KeyedError(
            ("models", index, "max_model_len"),
            f"found {model.max_model_len}, expected at most {shape.max_positions},"
            " the positions the model was made for",
        )
    return shape


def _check_lanes(index: int, unit: UnitSpec) -> None:
    """Lanes of a kind that the device has, counted in what it is made of."""
    device, at = unit.mesh.device, ("units", index, "lanes")
    if unit.lanes.kind not in LANES[device]:
        expected = " or ".join(LANES[device])
        where = "a GPU" if device == "gpu" else "a CPU"
        raise KeyedError((*at, "kind"), f"found {unit.lanes.kind}, expected {expected} on {where}")
    if device == "gpu" and unit.lanes.split is not None:
        raise KeyedError(
            (*at, "split"), "found cores per lane, expected sm_pct on a GPU, such as [60, 40]"
        )
    shares = unit.lanes.sm_pct or ()
    # MPS shares are limits, which may overlap; a split of the device cannot.
    if unit.lanes.kind == "green" and sum(shares) > 100:
        raise KeyedError((*at, "sm_pct"), f"found {sum(shares)} % in all, expected at most 100")


def _check_gpu(index: int, unit: UnitSpec, gpus: Callable[[], int]) -> None:
    """GPUs that are here, and nothing asked of them that only the planner knows."""
    at = ("units", index, "mesh")
    try:
        count = gpus()
    except NoGpu as reason:
        raise KeyedError((*at, "device"), f"found gpu, expected cpu: {reason.message}") from None
    for gpu in unit.mesh.gpus or ():
        if gpu >= count:
            raise KeyedError((*at, "gpus"), f"found GPU {gpu}, expected 0 to {count - 1}")
    for number, part in enumerate(unit.models):
        if part.sm_pct is not None:
            raise KeyedError(
                ("units", index, "models", number, "sm_pct"),
                "found shares of its own, expected none: lanes are the unit's (lanes.sm_pct)",
            )


def _check_gpu_ranks(index: int, unit: UnitSpec, nccl: Callable[[], None]) -> None:
    """Several GPUs that can be one mesh: a rank is a process, and ranks add up by NCCL."""
    found, at = unit.mesh.gpus or (0,), ("units", index)
    if len(found) not in RANKS or len(set(found)) != len(found):
        raise KeyedError(
            (*at, "mesh", "gpus"),
            f"found {list(found)}, expected 1, 2, 4 or 8 different GPUs",
        )
    if unit.mesh.exchange == "gloo":
        raise KeyedError(
            (*at, "mesh", "exchange"), "found gloo, expected none on a GPU: GPUs exchange by NCCL"
        )
    if len(found) == 1:
        return
    if unit.lanes.kind == "mps":
        raise KeyedError(
            (*at, "lanes", "kind"),
            f"found mps on a mesh of {len(found)} GPUs, expected green or stream: a rank is a"
            " process, its lanes are threads",
        )
    try:
        nccl()
    except MuxrtError as error:
        raise KeyedError(
            (*at, "mesh", "gpus"),
            f"found {len(found)} GPUs, expected one: {error.message}",
        ) from None


def _ask_torch() -> None:
    from muxrt.worker.collectives import check_nccl  # late: importing torch takes seconds

    check_nccl()


def _check_exchange(index: int, unit: UnitSpec) -> None:
    """What lies on several ranks is handed over through memory that processes share."""
    if unit.exchanges and unit.mesh.tp > 1 and unit.transfer != "shared":
        raise KeyedError(
            ("units", index, "transfer"),
            f"found {unit.transfer} and {unit.mesh.tp} ranks, expected shared: ranks hand over"
            " within a machine only, so far",
        )


def _check_dtypes(unit: UnitSpec, config: ServeConfig) -> None:
    """Models in dtypes that the unit's device computes in."""
    placed = {model.name for model in unit.models}
    key, unknown, expected = {
        "gpu": ("weights", "int8", "auto, bfloat16 or float32 on a GPU"),
        "cpu": ("kv_dtype", "float8", "auto, bfloat16 or float32 on a CPU"),
    }[unit.mesh.device]
    for number, model in enumerate(config.models):
        if model.name in placed and getattr(model, key) == unknown:
            raise KeyedError(("models", number, key), f"found {unknown}, expected {expected}")


def _check_cores(index: int, unit: UnitSpec, cores: set[int]) -> None:
    listed = ", ".join(str(core) for core in sorted(cores))
    for core in unit.mesh.cores or ():
        if core not in cores:
            raise KeyedError(
                ("units", index, "mesh", "cores"),
                f"found core {core}, expected cores this process may use: {listed}",
            )
    if unit.mesh.cores is None:
        why = f"this machine has {len(cores)}"
        for find in (rank_problems, split_problems):
            for problem in find(index, unit, len(cores), why):
                raise problem


def _plan(
    index: int, unit: UnitSpec, config: ServeConfig, shapes: Mapping[str, ModelShape]
) -> UnitPlan:
    specs = {model.name: model for model in config.models}
    ample = msgspec.structs.replace(unit.memory, kv_bytes=AMPLE_BYTES)
    try:
        plan = plan_unit(msgspec.structs.replace(unit, memory=ample), specs, shapes)
        if unit.mesh.tp > 1:
            plan_rank(plan, shapes, Shard(0, unit.mesh.tp))
        _check_floor(index, unit, plan)
        return plan_unit(unit, specs, shapes)
    except KeyedError:
        raise
    except ConfigError as error:
        raise KeyedError(("units", index), error.message) from None


def _check_floor(index: int, unit: UnitSpec, plan: UnitPlan) -> None:
    """The arena must hold one sequence of maximum length of every model at the same time."""
    block_bytes = plan.arena.block_bytes
    if plan.habits is not None:
        return  # those that are awake together: `plan_unit` says what is missing
    floors = {name: model.floor_blocks for name, model in plan.models.items()}
    needed = sum(floors.values()) * block_bytes
    if needed <= unit.memory.kv_bytes:
        return
    parts = " + ".join(
        f"{name} {plan.models[name].max_model_len} tokens = {show_bytes(blocks * block_bytes)}"
        for name, blocks in floors.items()
    )
    raise KeyedError(
        ("units", index, "memory", "kv_bytes"),
        f"found {show_bytes(unit.memory.kv_bytes)}, expected at least {-(-needed // KIB)}KiB"
        f" ({show_bytes(needed)}), one sequence of maximum length per model: {parts}",
    )


def device_of(model: ModelSpec, config: ServeConfig) -> str:
    """Where the first unit that has the model computes."""
    units = (u for u in config.units if any(part.name == model.name for part in u.models))
    return next((unit.mesh.device for unit in units), "cpu")


def summary(checked: Checked) -> dict[str, Any]:
    """What `--check --json` prints."""
    config = checked.config
    return {
        "endpoint": {"host": config.endpoint.host, "port": config.endpoint.port},
        "models": [_model_summary(model, checked) for model in config.models],
        "units": [_unit_summary(plan) for plan in checked.plans],
        "routing": msgspec.to_builtins(config.routing),
    }


def _model_summary(model: ModelSpec, checked: Checked) -> dict[str, Any]:
    shape, device = checked.shapes[model.name], device_of(model, checked.config)
    return {
        "name": model.name,
        "path": model.path,
        "family": shape.family,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_model_len": model.max_model_len or shape.max_positions,
        "dtype": weight_dtype(model, shape, device),
        "weights": linear_dtype(model, shape, device),
        "num_params": num_params(shape),
        "weight_bytes": weight_bytes(model, shape, device),
    }


def _unit_summary(plan: UnitPlan) -> dict[str, Any]:
    return {
        "name": plan.spec.name,
        "policy": plan.spec.scheduling.policy,
        "ranks": plan.spec.mesh.tp,
        "kv_bytes": plan.spec.memory.kv_bytes,
        "swap_bytes": plan.spec.memory.swap_bytes,
        "block_bytes": plan.arena.block_bytes,
        "num_blocks": plan.num_blocks,
        "models": [_share_summary(model, plan) for model in plan.models.values()],
    }


def _share_summary(model: ServedModel, plan: UnitPlan) -> dict[str, Any]:
    quota = plan.quotas[model.name]
    return {
        "name": model.name,
        "block_tokens": model.layout.block_tokens,
        "blocks_per_group": model.layout.blocks_per_group,
        "quota_blocks": quota,
        "quota_tokens": quota // model.layout.blocks_per_group * model.layout.block_tokens,
        "floor_blocks": model.floor_blocks,
        "sequences_of_max_len": quota // model.floor_blocks,
        "is_awake": plan.habits is None or model.name in plan.awake,  # at the start
    }
