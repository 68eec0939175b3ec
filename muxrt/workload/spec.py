"""The schema of `configs/workloads/*.yaml`: popularity, lengths, or a trace to replay."""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import msgspec

from muxrt.config.document import Key, KeyedError, read_document
from muxrt.config.muxserve import is_muxserve_workload, load_muxserve_workload
from muxrt.config.placement import Count, Index, Name, NotNegative, Positive, Share, Slo
from muxrt.config.schema import convert
from muxrt.errors import ConfigError
from muxrt.workload.trace import TraceRow, read_trace


class Quantile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """This share of lengths is at most `tokens`."""

    share: Share
    tokens: Count


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lengths, cut off at both ends.

    Lognormal, by quantiles with straight lines in between, or empirical: one of those that were
    seen, each as likely as the others.
    """

    mean_tokens: Positive | None = None
    quantiles: tuple[Quantile, ...] = ()  # instead of a mean; rising; the last one is the longest
    seen: tuple[Count, ...] = ()  # instead of a mean
    file: Name | None = None  # instead of a mean: a trace, whose prompts or outputs were seen
    cv: NotNegative = 0.0  # standard deviation / mean, before the cut; 0 = all the same
    min_tokens: Count = 1
    max_tokens: Count | None = None


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Somebody's recorded requests: CSV (workload/trace.py has the headers), or MuxServe's JSON.

    With a column of models each request goes to the one it names, otherwise they are dealt.
    """

    file: Name  # relative paths are relative to the YAML
    start_s: NotNegative = 0.0  # where in the trace to begin
    speed: Positive = 1.0  # 2 = the requests of two seconds arrive in one
    prompt_scale: Positive = 1.0
    output_scale: Positive = 1.0
    max_prompt_tokens: Count | None = None  # after scaling
    max_output_tokens: Count | None = None


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The lengths of somebody's request."""

    prompt_tokens: Count
    output_tokens: Count


class Joint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Prompt and output of requests that were seen, drawn together, each as likely as the others.

    Long prompts have the answers that long prompts got.
    """

    file: Name | None = None  # a trace; its times and models do not matter
    seen: tuple[Seen, ...] = ()  # instead of a file
    prompt_scale: Positive = 1.0
    output_scale: Positive = 1.0
    max_prompt_tokens: Count | None = None  # after scaling
    max_output_tokens: Count | None = None


class PowerLaw(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The i-th model gets a share in proportion to i^-alpha (MuxServe's popularity).

    One of the two rates, none where a trace has it.
    """

    alpha: NotNegative  # 0 = all equal; 0.9 = mild; 2.1 = one model takes most
    rate_rps: Positive | None = None  # of all models together
    top_rate_rps: Positive | None = None  # of the most popular model


class Diurnal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rates that change by the hour: factors of the given rates, repeated for ever."""

    hours: tuple[NotNegative, ...]
    hour_s: Positive = 3600.0  # less to go through a day faster


class Drift(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Popularity that wanders: each model's share is a random walk, the sum of the rates is not.

    On the first day the shares are those given, which is what a planner plans for.
    """

    sigma: Positive  # of the logarithm of a share, per day: 0.3 = a third up or down
    day_s: Positive = 86400.0  # less to go through many days faster


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one model gets; what is left out comes from the workload."""

    name: Name
    rate_rps: Positive | None = None
    prompt: Lengths | None = None
    output: Lengths | None = None
    joint: Joint | None = None  # instead of both
    slo: Slo | None = None


PROMPT = Lengths(mean_tokens=100, cv=0.5)
OUTPUT = Lengths(mean_tokens=60, cv=0.5)


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests over `duration_s`: Poisson at given rates, or a trace dealt to the models."""

    title: Name | None = None  # what people are told that they see
    duration_s: Positive = 60.0
    seed: Index = 0
    models: tuple[Traffic, ...] = ()  # most popular first; empty = what the endpoint lists
    power_law: PowerLaw | None = None
    diurnal: Diurnal | None = None
    drift: Drift | None = None
    gap_cv: Positive = 1.0  # of the gaps between a model's requests: 1 = Poisson, more = bursts
    trace: Trace | None = None
    prompt: Lengths = PROMPT
    output: Lengths = OUTPUT
    joint: Joint | None = None  # instead of both, for models without lengths of their own
    slo: Slo | None = None


def load_workload(path: Path) -> Workload:
    """The workload in `path`, a MuxServe one included. Raises ConfigError (one line)."""
    if is_muxserve_workload(path):
        return _of_muxserve(path)
    document = read_document(path)
    workload = convert(document, Workload)
    for problem in (*_problems(workload), *_shape_problems(workload)):
        raise document.locate(problem)
    return _with_files(workload, path.absolute().parent)


def _with_files(workload: Workload, home: Path) -> Workload:
    """Paths are absolute, and what lengths were seen is read."""
    replace = msgspec.structs.replace

    def place(name: str) -> Path:
        return home / Path(name).expanduser()

    @cache
    def rows(name: str) -> list[TraceRow]:
        return read_trace(place(name))

    def prompts(lengths: Lengths | None) -> Lengths | None:
        if lengths is None or lengths.file is None:
            return lengths
        seen = tuple(max(1, row.prompt_tokens) for row in rows(lengths.file))
        return replace(lengths, seen=seen, file=None)

    def outputs(lengths: Lengths | None) -> Lengths | None:
        if lengths is None or lengths.file is None:
            return lengths
        seen = tuple(max(1, row.output_tokens) for row in rows(lengths.file))
        return replace(lengths, seen=seen, file=None)

    def both(joint: Joint | None) -> Joint | None:
        if joint is None or joint.file is None:
            return joint
        found = (Seen(max(1, r.prompt_tokens), max(1, r.output_tokens)) for r in rows(joint.file))
        return replace(joint, seen=tuple(found), file=None)

    models = tuple(
        replace(m, prompt=prompts(m.prompt), output=outputs(m.output), joint=both(m.joint))
        for m in workload.models
    )
    trace = workload.trace
    return replace(
        workload,
        models=models,
        prompt=prompts(workload.prompt) or PROMPT,
        output=outputs(workload.output) or OUTPUT,
        joint=both(workload.joint),
        trace=trace and replace(trace, file=str(place(trace.file))),
    )


def _of_muxserve(path: Path) -> Workload:
    """The trace, with the rates that it states."""
    found = load_muxserve_workload(path)
    return Workload(
        title=path.name,
        duration_s=found.duration_s,
        models=tuple(Traffic(name=n, rate_rps=found.rates.get(n)) for n in found.models),
        trace=Trace(file=str(path.absolute())),
    )


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
        for name in ("rate_rps", "top_rate_rps"):
            if law is not None and getattr(law, name) is not None:
                yield KeyedError(
                    ("power_law", name), "the trace has the rate: remove this or use trace.speed"
                )
        for name in ("diurnal", "drift"):
            if getattr(workload, name) is not None:
                yield KeyedError((name,), "the trace has its own times: remove one of the two")
        if workload.gap_cv != 1:
            yield KeyedError(("gap_cv",), "the trace has its own times: remove one of the two")
    elif law is not None:
        if (law.rate_rps is None) == (law.top_rate_rps is None):
            found = "neither" if law.rate_rps is None else "both"
            yield KeyedError(
                ("power_law",),
                f"found {found} of rate_rps (of all models together) and top_rate_rps (of the most"
                " popular one), expected exactly one of them",
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


def _shape_problems(workload: Workload) -> Iterator[KeyedError]:
    """What is wrong with lengths and curves."""
    places: list[tuple[Key, Lengths | None]] = [
        (("prompt",), workload.prompt),
        (("output",), workload.output),
    ]
    for index, model in enumerate(workload.models):
        at: Key = ("models", index)
        places += [((*at, "prompt"), model.prompt), ((*at, "output"), model.output)]
    for key, lengths in places:
        if lengths is not None:
            yield from _length_problems(key, lengths)
    yield from _joint_problems(workload)
    if workload.diurnal is not None and not any(workload.diurnal.hours):
        yield KeyedError(("diurnal", "hours"), "found no traffic in any hour, expected factors")


def _joint_problems(workload: Workload) -> Iterator[KeyedError]:
    whole = workload.joint, workload.prompt != PROMPT or workload.output != OUTPUT
    places: list[tuple[Key, Joint | None, bool]] = [(("joint",), *whole)]
    for index, model in enumerate(workload.models):
        has_own = model.prompt is not None or model.output is not None
        places.append((("models", index, "joint"), model.joint, has_own))
        one_only = (model.prompt is None) != (model.output is None)
        if workload.joint is not None and model.joint is None and one_only:
            yield KeyedError(
                ("models", index), "found one of prompt and output, which joint draws together"
            )
    for key, joint, has_lengths in places:
        if joint is None:
            continue
        if has_lengths:
            yield KeyedError(key, "draws prompt and output together: remove those, or this")
        if workload.trace is not None:
            yield KeyedError(key, "the trace has its own lengths: remove one of the two")
        if (joint.file is None) == (not joint.seen):
            found = "neither" if joint.file is None else "both"
            yield KeyedError(key, f"found {found} of file and seen, expected exactly one of them")


def _length_problems(key: Key, lengths: Lengths) -> Iterator[KeyedError]:
    ways = ("mean_tokens", "quantiles", "seen", "file")
    found = [way for way in ways if getattr(lengths, way)]
    if len(found) != 1:
        yield KeyedError(
            key, f"found {' and '.join(found) or 'none'}, expected exactly one of {', '.join(ways)}"
        )
    pairs = [(quantile.share, quantile.tokens) for quantile in lengths.quantiles]
    if any(b[0] <= a[0] or b[1] < a[1] for a, b in pairwise(pairs)):
        yield KeyedError((*key, "quantiles"), "shares and tokens must rise from one to the next")


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
    if law is not None:
        law = replace(
            law,
            rate_rps=law.rate_rps and law.rate_rps * speed,
            top_rate_rps=law.top_rate_rps and law.top_rate_rps * speed,
        )
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
