"""MuxServe's file formats: what its planner reads, and what it writes for each mesh.

From muxserve/arg_utils.py, muxsched/placement.py and examples/ of hao-ai-lab/MuxServe (June 2024).
"""

from pathlib import Path

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
    Positive,
    Share,
    UnitModel,
    UnitSpec,
)
from muxrt.config.plan import PlanFile, PlanInput, check_plan
from muxrt.config.presets import PRESETS
from muxrt.config.schema import convert

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
