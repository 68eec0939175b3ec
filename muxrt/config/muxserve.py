"""MuxServe's file formats: what its planner reads and writes for each mesh, and its workloads.

From muxserve/arg_utils.py, muxsched/placement.py and examples/ of hao-ai-lab/MuxServe (June 2024).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from muxrt.config.cluster import Cluster, NodeGroup
from muxrt.config.document import Document, KeyedError, read_document
from muxrt.config.placement import (
    Count,
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Name,
    NotNegative,
    Positive,
    Share,
    UnitModel,
    UnitSpec,
)
from muxrt.config.plan import PlanFile, PlanInput, check_plan
from muxrt.config.presets import PRESETS
from muxrt.config.schema import convert
from muxrt.errors import ConfigError

# PlacementOptimizer's own means of ShareGPT, tokens.
PROMPT_TOKENS, OUTPUT_TOKENS = 161.0, 337.0
GPU = "a100-80g"  # all that it was run on; its files do not say


class _Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    nnodes: Count
    ngpus_per_node: Count


class _Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: Name
    model: Name  # a folder
    rate: Positive


class _Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    cluster: _Cluster
    models: tuple[_Model, ...]
    avg_prompt_len: Positive = PROMPT_TOKENS
    avg_output_len: Positive = OUTPUT_TOKENS


class MuxserveInput(msgspec.Struct, frozen=True):
    """A plan without a workload file: rates and mean lengths are in it."""

    plan: PlanInput
    rates: dict[str, float]
    prompt_tokens: float
    output_tokens: float


def is_muxserve(document: Document) -> bool:
    """Whether this is an input of MuxServe's planner."""
    value = document.value
    cluster = value.get("cluster") if isinstance(value, dict) else None
    return isinstance(cluster, dict) and "nnodes" in cluster


def load_muxserve(path: Path) -> MuxserveInput:
    """An input of MuxServe's planner (`examples/basic/models.yaml`). Raises ConfigError.

    A model is a folder, or its path ends in the name of a preset.
    """
    document = read_document(path)
    found = convert(document, _Input)
    models = tuple(_spec(document, index, model) for index, model in enumerate(found.models))
    nodes = NodeGroup(gpu=GPU, gpus=found.cluster.ngpus_per_node, count=found.cluster.nnodes)
    file = PlanFile(cluster=Cluster(nodes=(nodes,)), models=models)
    return MuxserveInput(
        check_plan(file, document),
        {model.name: model.rate for model in found.models},
        found.avg_prompt_len,
        found.avg_output_len,
    )


def _spec(document: Document, index: int, model: _Model) -> ModelSpec:
    folder = Path(model.model)
    if (folder / "config.json").is_file():
        return ModelSpec(name=model.name, path=model.model)
    if folder.name in PRESETS:
        return ModelSpec(name=model.name, preset=folder.name)
    raise document.locate(
        KeyedError(
            ("models", index, "model"),
            f"found {model.model!r}, expected a folder with config.json, or a path that ends in one"
            f" of {', '.join(PRESETS)}",
        )
    )


class _UnitModel(msgspec.Struct, frozen=True, kw_only=True):
    name: Name
    model: Name
    tensor_parallel_size: Count
    pipeline_parallel_size: Count = 1
    placement: tuple[tuple[int, ...], ...]
    mps_percentage: tuple[Count, ...]
    max_num_seqs: Count | None = None
    model_dtype: Name = "fp16"


class _Unit(msgspec.Struct, frozen=True, kw_only=True):
    num_gpus: Count
    max_num_seqs: Count = 256
    overload_threshold: int = 2
    gpu_memory_utilization: Share
    models: tuple[_UnitModel, ...]


def load_unit(path: Path, gpu_memory_bytes: int, node: int = 0) -> UnitSpec:
    """A unit from MuxServe's per-mesh file (`examples/basic/model_config.yaml`).

    Raises ConfigError. Its `workloads` (a file to replay) are not read. The larger of a model's two
    percentages is its prefill process, the smaller its decode process.
    """
    document = read_document(path)
    value = document.value
    if isinstance(value, dict):
        document = Document(
            document.name,
            {key: item for key, item in value.items() if key != "workloads"},
            document.lines,
        )
    unit = convert(document, _Unit)
    for index, model in enumerate(unit.models):
        _check_unit_model(document, index, model, unit.num_gpus)
    return UnitSpec(
        name=path.stem,
        models=tuple(
            UnitModel(name=m.name, sm_pct=(max(m.mps_percentage), min(m.mps_percentage)))
            for m in unit.models
        ),
        memory=Memory(
            kv_bytes=round(unit.gpu_memory_utilization * gpu_memory_bytes) * unit.num_gpus
        ),
        mesh=Mesh(device="gpu", kind=GPU, node=node, gpus=tuple(range(unit.num_gpus))),
        lanes=Lanes(kind="stream"),
    )


def _check_unit_model(document: Document, index: int, model: _UnitModel, num_gpus: int) -> None:
    at = ("models", index)
    if model.tensor_parallel_size != num_gpus or model.pipeline_parallel_size != 1:
        raise document.locate(
            KeyedError(
                (*at, "tensor_parallel_size"),
                f"found tp {model.tensor_parallel_size} x pp {model.pipeline_parallel_size},"
                f" expected tp {num_gpus} x pp 1: all GPUs of the unit, one stage",
            )
        )
    if len(model.mps_percentage) != 2 or max(model.mps_percentage) > 100:
        raise document.locate(
            KeyedError(
                (*at, "mps_percentage"),
                f"found {list(model.mps_percentage)}, expected two percentages: prefill and decode",
            )
        )


class _Info(msgspec.Struct, frozen=True):
    rates: tuple[tuple[Name, NotNegative], ...] | None = None
    duration: NotNegative | None = None


class _Request(msgspec.Struct, frozen=True):
    model_name: Name
    data: tuple[msgspec.Raw, Count, Count]  # token ids, prompt and output tokens


class _Workload(msgspec.Struct, frozen=True):
    arrivals: tuple[NotNegative, ...]
    requests: tuple[_Request, ...]
    info: _Info = _Info()


@dataclass(frozen=True, slots=True)
class MuxserveRequest:
    """One request of a workload; `at_s` counts from the start."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class MuxserveWorkload:
    """Requests in order of time; `rates` are those that the file states, if it does."""

    models: tuple[str, ...]
    rates: dict[str, float]
    duration_s: float
    requests: tuple[MuxserveRequest, ...]


def is_muxserve_workload(path: Path) -> bool:
    """Whether this is the output of MuxServe's workload generator: JSON with `requests`."""
    if path.suffix != ".json" or not path.is_file():
        return False
    value = read_json(path)
    return isinstance(value, dict) and "requests" in value


def load_muxserve_workload(path: Path) -> MuxserveWorkload:
    """A workload as `muxsched/workload_utils.py` writes it. Raises ConfigError.

    The time it covers is at least what it states; its requests may go on for longer.
    """
    file: _Workload = read_json(path, _Workload)
    if len(file.arrivals) != len(file.requests):
        raise ConfigError(
            f"{path}: found {len(file.arrivals)} arrivals and {len(file.requests)} requests,"
            " expected as many"
        )
    if not file.requests:
        raise ConfigError(f"{path}: the workload has no requests")
    pairs = sorted(zip(file.arrivals, file.requests, strict=True), key=lambda pair: pair[0])
    first_s, last_s = pairs[0][0], pairs[-1][0]
    # A mean gap follows the last arrival: rates are requests over this time.
    span_s = (last_s - first_s) * len(pairs) / max(1, len(pairs) - 1)
    duration_s = max(span_s, file.info.duration or 0.0)
    if not duration_s:
        raise ConfigError(f"{path}: all arrive at once, expected info.duration, seconds above 0")
    stated = {name: rate for name, rate in file.info.rates or () if rate}
    requests = tuple(
        MuxserveRequest(at_s - first_s, r.model_name, r.data[1], r.data[2]) for at_s, r in pairs
    )
    models = dict.fromkeys([*stated, *(request.model for request in requests)])
    return MuxserveWorkload(tuple(models), stated, duration_s, requests)


def read_json(path: Path, target: Any = dict[str, msgspec.Raw]) -> Any:
    """The JSON file `path` as a `target`. Raises ConfigError with the place of what is wrong."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=target)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        wrong, _, place = str(error).partition(" - at `$")
        # Keys that a file may choose are "[...]" to msgspec: they tell nobody anything.
        place = place.removesuffix("`").replace("[...]", "").lstrip(".")
        where = f"{place}: " if place else ""
        raise ConfigError(f"{path}: {where}{wrong[:1].lower()}{wrong[1:]}") from None
