"""From a `UnitBoot` to lanes that have each run every model once."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import cast

import msgspec
import numpy as np
import torch

from muxrt.config.model import ModelShape
from muxrt.config.placement import ModelSpec
from muxrt.config.shard import Shard
from muxrt.core import (
    Batch,
    BatchEntry,
    Copy,
    CopyKind,
    Load,
    Phase,
    Prompt,
    SamplingParams,
    Sleep,
    SlotOpen,
    Work,
)
from muxrt.engine.build import UnitPlan, linear_dtype, weight_dtype
from muxrt.engine.messages import Loading, UnitBoot
from muxrt.engine.ranks import rank_cores
from muxrt.errors import ConfigError, MuxrtError
from muxrt.models.device_llama import DeviceLlama
from muxrt.models.llama import DType, LinearDType, Llama
from muxrt.models.weights import WHOLE, Progress
from muxrt.worker.boot import load_shapes, plan_boot, take_cores
from muxrt.worker.build import open_executor
from muxrt.worker.collectives import check_nccl
from muxrt.worker.device_build import open_device_executor
from muxrt.worker.device_streams import check_device
from muxrt.worker.executor import LaneExecutor
from muxrt.worker.host_weights import HostWeights
from muxrt.worker.lanes import LaneDied, split_cores
from muxrt.worker.mesh import open_mesh
from muxrt.worker.rank_processes import RankProcesses
from muxrt.worker.service import Opened, Tell
from muxrt.worker.transfer import addresses

log = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 0.1
WARM_TOKENS = 8


def load_unit(boot: UnitBoot, tell: Tell, ranks: RankProcesses | None = None) -> Opened:
    """Load weights, reserve memory, start the lanes and warm them up.

    `ranks` are the other ones of the unit's mesh. Raises MuxrtError with what is wrong.
    """
    cores = take_cores(boot.unit)
    shapes = load_shapes(boot)
    plan = plan_boot(boot, len(cores), shapes)
    is_gpu = boot.unit.mesh.device == "gpu"
    if is_gpu:
        executor = open_on_device(boot, plan, shapes, take_gpu(boot), tell, ranks)
    elif plan.habits is not None:
        plan, executor = _open_sleepers(boot, shapes, cores, _telling(tell, ranks), ranks)
    else:
        executor = _open_on_cores(boot, plan, shapes, cores, _telling(tell, ranks), ranks)
    try:
        warm_up(plan, executor, tell)
    except LaneDied:
        raise  # lanes may wait for who is gone: the process ends, and all of it with that
    except BaseException:
        executor.close()
        raise
    if not is_gpu:
        _leave_lanes(plan, cores)
    return Opened(plan, executor, addresses=addresses(executor.exchange, plan.models))


def _telling(tell: Tell, ranks: RankProcesses | None) -> Tell:
    """`tell`, which ends the loading of a mesh that is broken rather than to read gigabytes."""

    def told(loading: Loading) -> None:
        if ranks is not None:
            ranks.check()
        tell(loading)

    return told


def _open_on_cores(
    boot: UnitBoot,
    plan: UnitPlan,
    shapes: Mapping[str, ModelShape],
    cores: Sequence[int],
    tell: Tell,
    ranks: RankProcesses | None,
) -> LaneExecutor:
    def load(shard: Shard) -> dict[str, Llama]:
        return load_models(boot.unit.name, boot.models, shapes, tell, shard)

    if plan.spec.mesh.tp > 1:
        return open_mesh(plan, boot.models, shapes, cores, load, boot.identity, ranks)
    return open_executor(plan, load(WHOLE), cores, boot.identity)


def _open_sleepers(
    boot: UnitBoot,
    shapes: Mapping[str, ModelShape],
    cores: Sequence[int],
    tell: Tell,
    ranks: RankProcesses | None,
) -> tuple[UnitPlan, LaneExecutor]:
    """Likewise where models may sleep: with the sizes that their weights turn out to have."""
    sleepers: dict[str, HostWeights] = {}
    is_private = boot.unit.lanes.kind == "cores"

    def load(shard: Shard) -> dict[str, Llama]:
        unit, specs = boot.unit.name, boot.models
        models, found = load_sleepers(unit, specs, shapes, tell, shard, is_private)
        sleepers.update(found)
        return models

    if boot.unit.mesh.tp == 1:
        models = load(WHOLE)
        sizes = {name: weights.num_bytes for name, weights in sleepers.items()}
        plan = plan_boot(boot, len(cores), shapes, sizes)
        return plan, open_executor(plan, models, cores, boot.identity, sleepers)
    plan = plan_boot(boot, len(cores), shapes)
    executor = open_mesh(
        plan, boot.models, shapes, cores, load, boot.identity, ranks, sleepers=sleepers
    )
    try:
        return plan_boot(boot, len(cores), shapes, executor.weight_bytes), executor
    except ConfigError:
        executor.close()
        raise


def take_gpu(boot: UnitBoot) -> torch.device:
    """The GPU of the unit's mesh, current from now on. Raises MuxrtError without one."""
    device = torch.device("cuda", (boot.unit.mesh.gpus or (0,))[0])
    take_device(device)
    if boot.unit.mesh.tp > 1:
        check_nccl()
    return device


def take_device(device: torch.device) -> None:
    """It is the current one from now on. Raises MuxrtError where torch cannot compute there."""
    # Where the driver cannot keep the lanes' work queues apart, more of them make it likely. Read
    # when CUDA starts, which is below.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    check_device(device)
    torch.get_device_module(device).set_device(device)


def open_on_device(
    boot: UnitBoot,
    plan: UnitPlan,
    shapes: Mapping[str, ModelShape],
    device: torch.device,
    tell: Tell,
    ranks: RankProcesses | None = None,
) -> LaneExecutor:
    """Load the unit's models there and start its lanes; of several ranks `device` is the first's.

    `ranks` are the others. Raises MuxrtError with what is wrong.
    """
    if plan.spec.has_roles:
        raise ConfigError(
            f"{plan.spec.name}: found roles on a GPU, expected mixed: K and V are fetched from and"
            " into main memory only, so far"
        )
    told = _telling(tell, ranks)

    def load(shard: Shard) -> dict[str, DeviceLlama]:
        return {
            spec.name: load_device_model(
                boot.unit.name, spec, shapes[spec.name], device, told, shard
            )
            for spec in boot.models
        }

    if plan.spec.mesh.tp > 1:
        cores = sorted(os.sched_getaffinity(0))
        return open_mesh(
            plan, boot.models, shapes, cores, load, boot.identity, ranks, device=device
        )
    return open_device_executor(plan, load(WHOLE), device)


def _leave_lanes(plan: UnitPlan, cores: Sequence[int]) -> None:
    """Keep this thread, the unit's loop, off the cores of lanes where others are left for it."""
    parts = rank_cores(cores, plan.spec.mesh.tp)
    shares = [share for part in parts for share in split_cores(part, plan.spec.lanes.split)]
    if free := set(cores).difference(*shares):
        os.sched_setaffinity(0, free)


def warm_up(plan: UnitPlan, executor: LaneExecutor, tell: Tell) -> None:
    """One prefill and one decode step of every model on every lane, before anybody asks.

    Blocks and slots are not in use yet, so what this leaves in them matters to nobody. Raises
    MuxrtError where a model cannot run.
    """
    total = plan.num_lanes * len(plan.models)
    # Who stays awake comes last: nobody is awake then beyond those that fit.
    pairs = [
        (model, lane)
        for model in sorted(plan.models, key=lambda model: model in plan.awake)
        for lane in range(plan.num_lanes)
    ]
    for done, (model, lane) in enumerate(pairs):
        tell(Loading(plan.spec.name, "warm-up", model, done, total))
        if plan.habits is not None and lane == 0:
            size = plan.habits[model].num_bytes
            _run(executor, [Load(0, plan.num_lanes, model, size)])
        _run(executor, list(_warm_works(plan, model, lane)))
        if plan.habits is not None and model not in plan.awake and lane == plan.num_lanes - 1:
            _run(executor, [Sleep(0, plan.num_lanes, model, size, makes_room=True)])
    if plan.num_host_blocks:
        _run(executor, [_warm_copy(plan, plan.num_lanes)])
    tell(Loading(plan.spec.name, "warm-up", None, total, total))


def load_model(
    unit: str, spec: ModelSpec, shape: ModelShape, tell: Tell, shard: Shard = WHOLE
) -> Llama:
    """A rank's part of the model with the weights that its spec asks for. Raises ConfigError."""
    dtype = cast(DType, weight_dtype(spec, shape))
    weights = cast(LinearDType, linear_dtype(spec, shape))
    llama = Llama.load(spec.folder, dtype, _progress(unit, spec.name, tell), weights, shard)
    log.info(
        "event=weights_read model=%s rank=%d bytes=%d", spec.name, shard.rank, llama.bytes_read
    )
    return llama


def load_models(
    unit: str,
    specs: Sequence[ModelSpec],
    shapes: Mapping[str, ModelShape],
    tell: Tell,
    shard: Shard = WHOLE,
) -> dict[str, Llama]:
    """A rank's part of each model of a unit, by name. Raises ConfigError."""
    return {spec.name: load_model(unit, spec, shapes[spec.name], tell, shard) for spec in specs}


def load_sleepers(
    unit: str,
    specs: Sequence[ModelSpec],
    shapes: Mapping[str, ModelShape],
    tell: Tell,
    shard: Shard = WHOLE,
    is_private: bool = True,
) -> tuple[dict[str, Llama], dict[str, HostWeights]]:
    """Likewise, asleep, and their weights. `is_private`: no other process computes with them.

    Each is read, packed, copied and put to sleep before the next one is read, so no more memory is
    taken than the budget and what one model takes while it loads.
    """
    models, sleepers = {}, {}
    for spec in specs:
        pair = HostWeights.of(load_model(unit, spec, shapes[spec.name], tell, shard), is_private)
        sleepers[spec.name], models[spec.name] = pair
    return models, sleepers


def load_device_model(
    unit: str,
    spec: ModelSpec,
    shape: ModelShape,
    device: torch.device,
    tell: Tell,
    shard: Shard = WHOLE,
) -> DeviceLlama:
    """Likewise, on a GPU. Raises ConfigError."""
    dtype: torch.dtype = getattr(torch, linear_dtype(spec, shape, "gpu"))
    begun_s = monotonic()
    progress = _progress(unit, spec.name, tell)
    llama = DeviceLlama.load(spec.folder, dtype, device, progress, shard)
    torch.get_device_module(device).synchronize()  # the last copies are still on their way
    gigabytes, seconds = llama.weights.memory.numel() / 1e9, monotonic() - begun_s
    log.info(
        "event=weights_loaded model=%s gb=%.2f seconds=%.2f gb_per_s=%.2f",
        *(spec.name, gigabytes, seconds, gigabytes / seconds),
    )
    bytes_read = llama.weights.bytes_read
    log.info("event=weights_read model=%s rank=%d bytes=%d", spec.name, shard.rank, bytes_read)
    return llama


def _progress(unit: str, model: str, tell: Tell) -> Progress:
    last_s = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last_s
        if done >= total or monotonic() - last_s > PROGRESS_PERIOD_S:
            last_s = monotonic()
            tell(Loading(unit, "weights", model, done, total))

    return progress


def _warm_works(plan: UnitPlan, model: str, lane: int) -> Iterator[Batch]:
    """A prompt and the token after it, in the first slot and blocks."""
    served = plan.models[model]
    prompt_tokens = min(WARM_TOKENS, served.max_model_len - 1)
    ids = np.arange(served.layout.num_blocks(prompt_tokens + 1), dtype=np.int32)
    sampling = SamplingParams(top_p=0.9, min_p=0.01)
    prompt = Prompt(np.zeros(prompt_tokens, dtype="<i4").tobytes(), sampling)
    opened = SlotOpen(0, msgspec.msgpack.encode(prompt))
    first = BatchEntry(0, 0, prompt_tokens, True, 0, ids.tobytes())
    yield Batch(0, lane, model, Phase.PREFILL, (first,), (opened,))
    yield Batch(1, lane, model, Phase.DECODE, (BatchEntry(0, prompt_tokens, 1, True),))


def _warm_copy(plan: UnitPlan, copy_lane: int) -> Copy:
    block = np.zeros(1, dtype=np.int32).tobytes()
    return Copy(0, copy_lane, next(iter(plan.models)), CopyKind.SWAP_OUT, 0, block, block)


def _run(executor: LaneExecutor, works: list[Work]) -> None:
    for work, result in zip(works, executor.run(works), strict=True):
        if result.error is not None:
            raise MuxrtError(f"{work.model} failed its warm-up: {result.error}")
