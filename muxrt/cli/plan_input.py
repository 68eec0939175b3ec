"""From the files of `muxrt plan` to a problem."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from muxrt.config.cluster import GpuKind
from muxrt.config.document import read_document
from muxrt.config.model import ModelShape
from muxrt.config.muxserve import is_muxserve, load_muxserve
from muxrt.config.placement import ModelSpec, Scheduling, Slo
from muxrt.config.plan import EngineFacts, PlanInput, load_plan
from muxrt.cost.memory import MemoryRules, ModelBytes, activation_bytes, kv_token_bytes
from muxrt.cost.model import CostModel, arithmetic
from muxrt.cost.profile import Profile, load_profile
from muxrt.engine.build import DTYPE_BYTES, kv_dtype, linear_dtype, weight_bytes, weight_dtype
from muxrt.errors import ConfigError
from muxrt.planner.workload import Demand, Engine, Lengths, Problem
from muxrt.workload.offered import Moments, Offered, offered
from muxrt.workload.spec import Lengths as LengthSpec
from muxrt.workload.spec import Traffic, Workload, load_workload
from muxrt.workload.trace import TraceRow, read_trace


@dataclass(frozen=True, slots=True)
class Asked:
    """What to plan, and the models as the placement will list them."""

    problem: Problem
    models: tuple[ModelSpec, ...]
    workload: Workload
    rows: Sequence[TraceRow]  # of its trace
    engine: EngineFacts


def load_problem(
    plan_file: Path, workload_file: Path | None, slo: Slo | None, hour: int | None
) -> Asked:
    """Read and join everything; `slo` is for models that have none of their own.

    Raises ConfigError: one line with file, key, what was found and what was expected.
    """
    if is_muxserve(read_document(plan_file)):
        found = load_muxserve(plan_file)
        plan = found.plan
        workload = Workload(
            models=tuple(Traffic(name=n, rate_rps=rate) for n, rate in found.rates.items()),
            prompt=LengthSpec(mean_tokens=found.prompt_tokens),
            output=LengthSpec(mean_tokens=found.output_tokens),
        )
        if workload_file is not None:
            raise ConfigError(f"{plan_file} has rates of its own: no workload goes with it")
    else:
        plan = load_plan(plan_file)
        workload = _workload(plan, plan_file, workload_file)
    if workload.slo is None and slo is not None:
        workload = msgspec.structs.replace(workload, slo=slo)
    return join(plan, workload, hour)


def _workload(plan: PlanInput, plan_file: Path, workload_file: Path | None) -> Workload:
    path = workload_file or (plan.file.workload and Path(plan.file.workload))
    if not path:
        raise ConfigError(
            f"{plan_file} names no workload, expected one there or on the command line:"
            " configs/workloads/*.yaml"
        )
    workload = load_workload(path)
    names = [model.name for model in plan.file.models]
    if not workload.models:
        return msgspec.structs.replace(workload, models=tuple(Traffic(name=n) for n in names))
    asked = [model.name for model in workload.models]
    for name in asked:
        if name not in names:
            raise ConfigError(f"{path}: asks for {name!r}, {plan_file} has: {', '.join(names)}")
    for name in names:
        if name not in asked:
            raise ConfigError(f"{path}: gives {name!r} of {plan_file} no rate")
    return workload


def join(plan: PlanInput, workload: Workload, hour: int | None) -> Asked:
    """The problem of a plan's models under a workload that has all of them. Raises ConfigError."""
    rows = read_trace(Path(workload.trace.file)) if workload.trace is not None else ()
    specs = {model.name: model for model in plan.file.models}
    traffic = offered(_with_targets(workload, specs), rows, hour=hour)
    profiles = [load_profile(Path(name)) for name in plan.file.profiles]
    facts = _facts(plan, profiles)
    demands = [
        _demand(found, specs[found.model], plan, facts) for found in traffic if found.rate_rps > 0
    ]
    silent = [found.model for found in traffic if found.rate_rps <= 0]
    if silent:
        raise ConfigError(f"{silent[0]} gets no requests in that hour: plan for another one")
    kinds = {group.gpu: plan.file.cluster.kind(group.gpu) for group in plan.file.cluster.nodes}
    kinds |= {profile.gpu: _gpu(plan, profile) for profile in profiles}
    if plan.file.cluster.is_cpu:
        _check_dtypes(plan, profiles)
    problem = Problem(
        plan.file.cluster, demands, CostModel(profiles, kinds), _engine(facts), plan.file.largest_tp
    )
    models = tuple(
        msgspec.structs.replace(specs[found.model], rate_rps=found.rate_rps, slo=found.slo)
        for found in traffic
    )
    return Asked(problem, models, workload, rows, facts)


def _gpu(plan: PlanInput, profile: Profile) -> GpuKind:
    try:
        return plan.file.cluster.kind(profile.gpu)
    except KeyError:
        raise ConfigError(
            f"the profile {profile.title!r} is of {profile.gpu!r}, which nobody knows:"
            " describe it in cluster.kinds"
        ) from None


def _with_targets(workload: Workload, specs: dict[str, ModelSpec]) -> Workload:
    """A model's own targets go before the workload's for all, not before those for this model."""
    models = tuple(
        msgspec.structs.replace(model, slo=model.slo or specs[model.name].slo)
        for model in workload.models
    )
    return msgspec.structs.replace(workload, models=models)


def _demand(found: Offered, spec: ModelSpec, plan: PlanInput, facts: EngineFacts) -> Demand:
    shape = plan.shapes[found.model]
    most = spec.max_model_len or shape.max_positions
    if most > shape.max_positions:
        raise ConfigError(
            f"{found.model}: found max_model_len {most}, expected at most {shape.max_positions}"
        )
    prompt, output = _lengths(found.prompt), _lengths(found.output)
    if prompt.mean + output.mean > most:
        raise ConfigError(
            f"{found.model}: prompts and answers of {prompt.mean + output.mean:.0f} tokens on"
            f" average do not fit its {most} positions"
        )
    held = _held(spec, shape, facts) if plan.file.cluster.is_cpu else None
    return Demand(found.model, shape, found.rate_rps, prompt, output, found.slo, most, held)


def _held(spec: ModelSpec, shape: ModelShape, facts: EngineFacts) -> ModelBytes:
    """What a model takes on a CPU: weights and KV in its own dtypes, activations in float32."""
    rules = MemoryRules(
        dtype_bytes=DTYPE_BYTES["float32"],
        prefill_tokens=facts.prefill_tokens,
        max_sequences=facts.max_sequences,
    )
    stated = facts.activation_bytes
    return ModelBytes(
        weights=weight_bytes(spec, shape),
        activations=activation_bytes(shape, 1, rules) if stated is None else stated,
        runtime=0,
        kv_per_token=kv_token_bytes(shape, 1, DTYPE_BYTES[kv_dtype(spec, shape)]),
    )


def _check_dtypes(plan: PlanInput, profiles: Sequence[Profile]) -> None:
    """Raise ConfigError for a model whose times were measured with other dtypes."""
    for spec in plan.file.models:
        shape = plan.shapes[spec.name]
        asked = (linear_dtype(spec, shape), weight_dtype(spec, shape), kv_dtype(spec, shape))
        measured = [
            (model.weights, model.dtype, model.kv_dtype)
            for profile in profiles
            if profile.file is not None
            for model in profile.file.models
            if arithmetic(profile.shapes[model.name]) == arithmetic(shape)
        ]
        if measured and measured[0] not in (asked, (None, None, None)):
            raise ConfigError(
                f"{spec.name}: found weights, dtype and kv_dtype {', '.join(asked)}, but its times"
                f" were measured with {', '.join(map(str, measured[0]))}: profile it as it is"
            )


def _lengths(moments: Moments) -> Lengths:
    return Lengths(moments.mean, moments.mean_square)


def _facts(plan: PlanInput, profiles: Sequence[Profile]) -> EngineFacts:
    stated = plan.document.value.get("engine") or {}
    facts = with_measured(plan.file.engine, stated, profiles)
    if plan.file.cluster.is_cpu and "prefill_tokens" not in stated:
        # What was profiled, and what `muxrt serve` has.
        return msgspec.structs.replace(facts, prefill_tokens=Scheduling().prefill_tokens)
    return facts


# What a profile may say of the engine, in the words of both.
MEASURED = ("control_s", "control_step_s", "request_s", "interference")


def with_measured(
    facts: EngineFacts, stated: Collection[str], profiles: Sequence[Profile]
) -> EngineFacts:
    """What is `stated` goes before what a profile measured, and that before the defaults."""
    measured = [profile.file.engine for profile in profiles if profile.file is not None]
    found = {}
    by_phase = ("prefill_interference", "decode_interference")
    for name in (*MEASURED, *by_phase):
        known = [v for v in (getattr(engine, name) for engine in measured) if v is not None]
        is_stated = name in stated or (name in by_phase and "interference" in stated)
        if known and not is_stated:
            found[name] = known[0]
    return msgspec.structs.replace(facts, **found)


def _engine(facts: EngineFacts) -> Engine:
    default = MemoryRules()
    memory = MemoryRules(
        runtime_bytes=default.runtime_bytes if facts.runtime_bytes is None else facts.runtime_bytes,
        activation_bytes=facts.activation_bytes,
        prefill_tokens=facts.prefill_tokens,
        max_sequences=facts.max_sequences,
        source=facts.source or default.source,
    )
    return Engine(memory, facts.control_s, facts.interference)
