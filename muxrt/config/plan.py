"""What `muxrt plan` is told: a cluster, models, and what is known of the engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from muxrt.config.cluster import Cluster, cluster_problems
from muxrt.config.document import Document, KeyedError, read_document
from muxrt.config.model import ModelShape
from muxrt.config.placement import Count, Index, ModelSpec, Name, NotNegative, UnitSpec
from muxrt.config.presets import model_shape
from muxrt.config.profile import read_profile
from muxrt.config.schema import convert
from muxrt.config.serve import source_problems


class EngineFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the engine takes and costs beside the steps; None = the default of cost/memory.py."""

    runtime_bytes: Index | None = None  # per process and GPU: CUDA context, NCCL, kernels
    activation_bytes: Index | None = None  # per model and GPU; None = from the shape
    prefill_tokens: Count = 2048  # of one prefill batch
    max_sequences: Count = 256  # per model
    control_s: NotNegative = 0.0  # of the scheduler, per sequence and decode step
    control_step_s: NotNegative = 0.0  # and per step, whatever its size
    request_s: NotNegative = 0.0  # of the endpoint, per request: adds to its TTFT
    interference: NotNegative = 0.1  # how much slower a step is beside another one; assumed
    prefill_interference: NotNegative | None = None  # of prefills; None = `interference`
    decode_interference: NotNegative | None = None  # of decode steps; likewise
    source: Name | None = None  # who measured it


class PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The input of a plan, but for the traffic."""

    cluster: Cluster
    models: tuple[ModelSpec, ...]
    profiles: tuple[Name, ...] = ()  # YAML files; relative to this one
    workload: Name | None = (
        None  # YAML file; relative to this one; the command line may name another
    )
    engine: EngineFacts = EngineFacts()
    largest_tp: Annotated[int, Meta(ge=1, le=16)] = 8


@dataclass(frozen=True, slots=True)
class PlanInput:
    """A checked plan file: paths are absolute, shapes are read."""

    file: PlanFile
    document: Document
    shapes: dict[str, ModelShape]


def load_plan(path: Path) -> PlanInput:
    """The plan file `path`. Raises ConfigError (one line: file, line, key, found, expected)."""
    document = read_document(path)
    file = _resolved(convert(document, PlanFile), path.absolute().parent)
    return check_plan(_with_kinds(file), document)


def _with_kinds(file: PlanFile) -> PlanFile:
    """The cluster's kinds, and those that its profiles describe."""
    known = {kind.name for kind in file.cluster.kinds}
    found = [
        read_profile(Path(n)).file.kind for n in file.profiles if n.endswith((".yaml", ".yml"))
    ]
    more = {kind.name: kind for kind in found if kind is not None and kind.name not in known}
    kinds = (*file.cluster.kinds, *more.values())
    cluster = msgspec.structs.replace(file.cluster, kinds=kinds)
    return msgspec.structs.replace(file, cluster=cluster)


def check_plan(file: PlanFile, document: Document) -> PlanInput:
    """`file`, whose text is `document`, with its shapes. Raises ConfigError."""
    try:
        for problem in _problems(file):
            raise problem
        shapes = {
            model.name: model_shape(model, ("models", index))
            for index, model in enumerate(file.models)
        }
    except KeyedError as problem:
        raise document.locate(problem) from None
    return PlanInput(file, document, shapes)


def mesh_problems(units: Sequence[UnitSpec], file: PlanFile) -> Iterator[KeyedError]:
    """Units that are served and not in the plan's terms: nothing can be planned over them."""
    kinds = sorted({group.gpu for group in file.cluster.nodes})
    for index, unit in enumerate(units):
        if unit.mesh.kind not in kinds or not unit.mesh.gpus:
            yield KeyedError(
                ("units", index, "mesh"),
                f"found {unit.mesh.kind or 'no kind'} and gpus {list(unit.mesh.gpus or ())},"
                f" expected a kind of the plan's cluster ({', '.join(kinds)}) and its gpus, as"
                " `muxrt plan --out` writes them: replan goes by them",
            )


def _problems(file: PlanFile) -> Iterator[KeyedError]:
    yield from cluster_problems(file.cluster, ("cluster",))
    if not file.models:
        yield KeyedError(("models",), "found an empty list, expected at least one model")
    names = [model.name for model in file.models]
    for index, model in enumerate(file.models):
        if model.name in names[:index]:
            yield KeyedError(("models", index, "name"), f"{model.name!r} is already in the list")
        if model.rate_rps != 1.0:
            yield KeyedError(
                ("models", index, "rate_rps"), "rates of a plan are the workload's: remove this"
            )
        yield from source_problems(("models", index), model)


def _resolved(file: PlanFile, folder: Path) -> PlanFile:
    def absolute(name: str) -> str:
        return str(folder / Path(name).expanduser())

    models = tuple(
        msgspec.structs.replace(model, path=model.path and absolute(model.path))
        for model in file.models
    )
    return msgspec.structs.replace(
        file,
        models=models,
        profiles=tuple(absolute(name) for name in file.profiles),
        workload=file.workload and absolute(file.workload),
    )
