"""From what was measured to the files of a profile."""

import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import muxrt
from muxrt.cli.profile_run import Found
from muxrt.cli.profile_source import Subject
from muxrt.config.cluster import GpuKind
from muxrt.config.model import ModelShape
from muxrt.config.placement import ModelSpec
from muxrt.config.profile import (
    Dtype,
    Measured,
    ProfiledEngine,
    ProfiledModel,
    ProfileFile,
    dump_profile,
    sizes_of,
)
from muxrt.core import Phase
from muxrt.cost.fitted import find_granularity, linear_params
from muxrt.cost.memory import kv_token_bytes
from muxrt.cost.profile import Cell, Profile, load_profile, table_of
from muxrt.engine.build import DTYPE_BYTES, kv_dtype, linear_dtype, weight_bytes, weight_dtype
from muxrt.metrics import percentile


def write(out: Path, subject: Subject, found: Found, memory_bytes: int | None) -> Profile:
    """Write `out` and its table beside it; the profile as a reader gets it.

    The table comes first and each file is put in its place whole, so `out` never names cells that
    are not there.
    """
    table = out.with_suffix(".csv")
    file = _file(table.name, subject, found, memory_bytes or found.target.memory_bytes)
    for path, text in ((table, table_of(found.cells())), (out, dump_profile(file))):
        beside = path.with_name(path.name + ".part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    return load_profile(out)


def _file(table: str, subject: Subject, found: Found, memory_bytes: int) -> ProfileFile:
    target, cells = found.target, found.cells()
    kind, parts = target.kind, f"{target.parts} {target.word}"
    if target.tp > 1:
        parts = f"{target.tp} ranks of {parts}"
    return ProfileFile(
        title=f"{', '.join(spec.name for spec in subject.specs)} on {parts} of {target.name}",
        source=f"muxrt profile, {subject.source.name}",
        licence="measured here: yours",
        gpu=kind,
        table=table,
        models=tuple(
            _model(spec, subject.shapes[spec.name], cells, target.device) for spec in subject.specs
        ),
        kind=GpuKind(
            name=kind,
            device="gpu" if target.device == "gpu" else "cpu",
            memory_bytes=memory_bytes,
            bandwidth_bytes_per_s=round(_most_bytes_per_s(subject, found) / target.tp),
            flops=round(_most_flops(subject, found) / target.tp),
            sms=target.parts,
            link_bytes_per_s=round(_most_bytes_per_s(subject, found) / target.tp),
        ),
        sm_percent=(
            f"{target.word} of the lane over the {target.parts} of a device, which are kind.sms;"
            " its bandwidth and flops are the most that a measured decode step read and a measured"
            f" prefill computed; its link is not measured: {_about_link(target.tp)}"
        ),
        engine=_engine(found),
        side_by_side=found.side_by_side,
        in_service=found.service.models if found.service else (),
        measured=_measured(found),
    )


def _about_link(tp: int) -> str:
    return "one device has none" if tp == 1 else "what ranks exchange is part of every time"


def _model(spec: ModelSpec, shape: ModelShape, cells: Sequence[Cell], device: str) -> ProfiledModel:
    return ProfiledModel(
        name=spec.name,
        sizes=sizes_of(shape),
        weights=cast(Dtype, linear_dtype(spec, shape, device)),
        dtype=cast(Dtype, weight_dtype(spec, shape, device)),
        kv_dtype=cast(Dtype, kv_dtype(spec, shape, device)),
        prefill_granularity=find_granularity([c for c in cells if c.model == spec.name], shape),
    )


def _engine(found: Found) -> ProfiledEngine:
    prefills = [one.prefill_slowdown for one in found.side_by_side]
    decodes = [one.decode_slowdown for one in found.side_by_side]
    control, service = found.control, found.service
    beside = (_beyond(prefills), _beyond(decodes))
    if service is not None and service.prefill_interference is not None:
        beside = (service.prefill_interference, service.decode_interference)
    return ProfiledEngine(
        interference=_beyond(prefills + decodes),
        prefill_interference=beside[0],
        decode_interference=beside[1],
        control_s=float(f"{control.sequence_s:.3g}") if control else None,
        control_step_s=float(f"{control.step_s:.3g}") if control else None,
        request_s=float(f"{control.request_s:.3g}") if control else None,
    )


def _beyond(slowdowns: Sequence[float]) -> float | None:
    """The median, less one; nothing is quicker beside other work."""
    return round(max(0.0, statistics.median(slowdowns) - 1), 4) if slowdowns else None


def _measured(found: Found) -> Measured:
    spreads = found.spreads()
    return Measured(
        device=found.target.name,
        cores=found.target.parts,
        lanes=found.lanes,
        date=datetime.now(UTC).date().isoformat(),
        muxrt=muxrt.__version__,
        commit=_commit(),
        versions=", ".join(found.target.versions),
        load_average=round(found.load_average, 2),
        seconds=round(max(found.elapsed_s, 0.1), 1),
        bursts=round(statistics.median(len(bursts) for bursts in found.bursts.values())),
        statistic=(
            "median over bursts of the median of up to 8 steps in a row;"
            " tokens drawn at temperature 1"
        ),
        spread=round(percentile(spreads, 50) or 0.0, 4),
        spread_p90=round(percentile(spreads, 90) or 0.0, 4),
        is_whole=found.is_whole,
    )


def _commit() -> str | None:
    """The commit of this checkout; None for an installed package."""
    command = ["git", "-C", str(Path(muxrt.__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


@dataclass(frozen=True, slots=True)
class Figures:
    """What a model reaches on lanes of one size; None where no cell tells."""

    model: str
    cores: int
    prefill_tokens_per_s: float | None  # of the largest prefill
    decode_s: dict[int, float | None]  # by batch, at one context
    context: int
    bytes_per_s: float | None  # of weights and KV, read by a step of one sequence


FIGURE_BATCHES = (1, 8, 32)


def figures(subject: Subject, found: Found) -> list[Figures]:
    """A row per model and lane, from the cells themselves."""
    return [
        _figures(spec, subject.shapes[spec.name], cores, found)
        for spec in subject.specs
        for cores in found.lanes
    ]


def _figures(spec: ModelSpec, shape: ModelShape, cores: int, found: Found) -> Figures:
    pct = found.share_pct(cores)
    cells = [cell for cell in found.cells() if (cell.model, cell.sm_pct) == (spec.name, pct)]
    prefills = [(cell.tokens, cell.tokens / cell.prefill_s) for cell in cells if cell.prefill_s]
    decodes = {(cell.batch, cell.seq_len): cell.decode_s for cell in cells if cell.decode_s}
    batches = [batch for batch, _ in decodes]
    # The context at which most batch sizes are known; the longest of those.
    context = max(
        (length for _, length in decodes),
        key=lambda length: (sum((batch, length) in decodes for batch in batches), length),
        default=0,
    )
    alone_s = decodes.get((1, context))
    return Figures(
        spec.name,
        cores,
        max(prefills)[1] if prefills else None,
        {batch: decodes.get((batch, context)) for batch in FIGURE_BATCHES},
        context,
        step_bytes(spec, shape, context, found.target.device) / alone_s if alone_s else None,
    )


def step_bytes(spec: ModelSpec, shape: ModelShape, context: int, device: str) -> int:
    """What a decode step of one sequence reads: weights (of the input table a row), and KV."""
    weights = weight_bytes(spec, shape, device)
    if not shape.tied_embeddings:
        table = shape.vocab_size * shape.hidden_size
        weights -= table * DTYPE_BYTES[weight_dtype(spec, shape, device)]
    return weights + context * kv_token_bytes(shape, 1, DTYPE_BYTES[kv_dtype(spec, shape, device)])


def _most_bytes_per_s(subject: Subject, found: Found) -> float:
    specs = {spec.name: spec for spec in subject.specs}
    rates = [
        step_bytes(specs[model], subject.shapes[model], one.seq_len, found.target.device)
        / min(bursts)
        for (model, _, one), bursts in found.bursts.items()
        if one.phase is Phase.DECODE and one.batch == 1
    ]
    return max(rates, default=1.0)


def _most_flops(subject: Subject, found: Found) -> float:
    rates = [
        2 * linear_params(subject.shapes[model]) * one.tokens / min(bursts)
        for (model, _, one), bursts in found.bursts.items()
        if one.phase is Phase.PREFILL
    ]
    return max(rates, default=1.0)
