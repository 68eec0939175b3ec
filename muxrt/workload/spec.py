"""The schema of `configs/workloads/*.yaml`: popularity, lengths, or a trace to replay."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from muxrt.config.document import KeyedError, read_document
from muxrt.config.placement import Count, Index, Name, NotNegative, Positive, Slo
from muxrt.config.schema import convert
from muxrt.errors import ConfigError


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A lognormal distribution of lengths, cut off at both ends."""

    mean_tokens: Positive
    cv: NotNegative = 0.0  # standard deviation / mean, before the cut; 0 = all the same
    min_tokens: Count = 1
    max_tokens: Count | None = None


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A recorded hour of somebody's service: `TIMESTAMP,ContextTokens,GeneratedTokens`."""

    file: Name  # CSV; relative paths are relative to the YAML
    start_s: NotNegative = 0.0  # where in the trace to begin
    speed: Positive = 1.0  # 2 = the requests of two seconds arrive in one
    prompt_scale: Positive = 1.0
    output_scale: Positive = 1.0
    max_prompt_tokens: Count | None = None  # after scaling
    max_output_tokens: Count | None = None


class PowerLaw(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The i-th model gets a share in proportion to i^-alpha (MuxServe's popularity)."""

    alpha: NotNegative  # 0 = all equal; 0.9 = mild; 2.1 = one model takes most
    rate_rps: Positive | None = None  # of all models together; left out where a trace has it


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one model gets; what is left out comes from the workload."""

    name: Name
    rate_rps: Positive | None = None
    prompt: Lengths | None = None
    output: Lengths | None = None
    slo: Slo | None = None


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests over `duration_s`: Poisson at given rates, or a trace dealt to the models."""

    title: Name | None = None  # what people are told that they see
    duration_s: Positive = 60.0
    seed: Index = 0
    models: tuple[Traffic, ...] = ()  # most popular first; empty = what the endpoint lists
    power_law: PowerLaw | None = None
    trace: Trace | None = None
    prompt: Lengths = Lengths(mean_tokens=100, cv=0.5)
    output: Lengths = Lengths(mean_tokens=60, cv=0.5)
    slo: Slo | None = None


def load_workload(path: Path) -> Workload:
    """The workload in `path`. Raises ConfigError (one line: file, key, found, expected)."""
    document = read_document(path)
    workload = convert(document, Workload)
    for problem in _problems(workload):
        raise document.locate(problem)
    if workload.trace is None:
        return workload
    file = path.absolute().parent / Path(workload.trace.file).expanduser()
    trace = msgspec.structs.replace(workload.trace, file=str(file))
    return msgspec.structs.replace(workload, trace=trace)


def _problems(workload: Workload) -> Iterator[KeyedError]:
    names = [model.name for model in workload.models]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield KeyedError(("models", index, "name"), f"{name!r} is already in the list")
    rated = [i for i, model in enumerate(workload.models) if model.rate_rps is not None]
    law = workload.power_law
    if workload.trace is not None:
        if rated:
            yield KeyedError(
                ("models", rated[0], "rate_rps"),
                "the trace has the rate: remove this, or use trace.speed and power_law.alpha",
            )
        if law is not None and law.rate_rps is not None:
            yield KeyedError(
                ("power_law", "rate_rps"), "the trace has the rate: remove this or use trace.speed"
            )
    elif law is not None:
        if law.rate_rps is None:
            yield KeyedError(
                ("power_law",), "rate_rps is missing, expected requests/s of all models together"
            )
        if rated:
            yield KeyedError(
                ("models", rated[0], "rate_rps"), "power_law gives the rates: remove one of the two"
            )
    elif len(rated) < len(names) or not names:
        yield KeyedError(
            ("models",),
            "nothing gives the rates, expected rate_rps for every model, power_law, or trace",
        )


def with_models(workload: Workload, served: list[str]) -> Workload:
    """`workload` for the models an endpoint serves. Raises ConfigError for one it does not."""
    if not workload.models:
        traffic = tuple(Traffic(name=name) for name in served)
        return msgspec.structs.replace(workload, models=traffic)
    for model in workload.models:
        if model.name not in served:
            raise ConfigError(
                f"the workload asks for {model.name!r}, the endpoint serves: {', '.join(served)}"
            )
    return workload


def adjusted(
    workload: Workload, *, duration_s: float | None, speed: float, seed: int | None
) -> Workload:
    """`workload` for another time, at `speed` times its rates, from another seed."""
    replace = msgspec.structs.replace
    models = tuple(
        replace(model, rate_rps=model.rate_rps and model.rate_rps * speed)
        for model in workload.models
    )
    law, trace = workload.power_law, workload.trace
    if law is not None and law.rate_rps is not None:
        law = replace(law, rate_rps=law.rate_rps * speed)
    if trace is not None:
        trace = replace(trace, speed=trace.speed * speed)
    return replace(
        workload,
        models=models,
        power_law=law,
        trace=trace,
        duration_s=workload.duration_s if duration_s is None else duration_s,
        seed=workload.seed if seed is None else seed,
    )
