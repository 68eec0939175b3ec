"""How far off a fit is on cells that it has not seen."""

import csv
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from muxrt.core import Phase
from muxrt.cost.fitted import fit, fit_lanes
from muxrt.cost.profile import Cell, Profile
from muxrt.cost.steps import SharedSteps
from muxrt.errors import ConfigError
from muxrt.metrics import percentile

PHASES = (Phase.PREFILL, Phase.DECODE)
Suspect = tuple[Phase, str, int, int, int, int]  # phase, model, tp, sm_pct, batch, seq_len


@dataclass(frozen=True, slots=True)
class Residual:
    """A held-out cell and what the fit of the others says of it."""

    phase: Phase
    cell: Cell
    measured_s: float
    predicted_s: float

    @property
    def relative(self) -> float:
        return abs(self.predicted_s / self.measured_s - 1)


@dataclass(frozen=True, slots=True)
class Error:
    """Relative errors of one phase."""

    num_cells: int
    median: float
    p90: float
    worst: float


def held_out(
    profile: Profile, suspects: Collection[Suspect] = (), *, folds: int = 5, seed: int = 0
) -> list[Residual]:
    """Hold one in `folds` cells out of the fit, each in turn, and predict it.

    Cells are dealt at random; `suspects` stay in the fit of the others but are not judged.
    """
    judged: list[Residual] = []
    for model, tp in profile.keys:
        cells = list(profile.of(model, tp))
        Random(f"{seed}/{model}/{tp}").shuffle(cells)
        for fold in range(folds):
            kept = [cell for index, cell in enumerate(cells) if index % folds != fold]
            made = fit_lanes if profile.is_cpu else fit
            granularity = profile.granularity(model)
            fitted = made(kept, profile.shapes[model], profile.title, granularity)
            judged += _judge(fitted, cells[fold::folds])
    return [residual for residual in judged if _key(residual) not in suspects]


def errors(residuals: Sequence[Residual]) -> dict[Phase, Error]:
    """Median, 90th percentile and worst relative error of each phase."""
    return {phase: _error([r.relative for r in residuals if r.phase is phase]) for phase in PHASES}


def read_suspects(path: Path) -> frozenset[Suspect]:
    """Cells that look like measurement spikes: `phase,model,tp,sm_percent,batch,seq_len,...`."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        try:
            return frozenset(_suspect(line) for line in lines)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{path}:{lines.line_num}: not a suspect cell: {error}") from None


def _suspect(line: dict[str, str]) -> Suspect:
    numbers = (int(line[name]) for name in ("tp", "sm_percent", "batch", "seq_len"))
    tp, sm_pct, batch, seq_len = numbers
    return Phase(line["phase"]), line["model"], tp, sm_pct, batch, seq_len


def _key(residual: Residual) -> Suspect:
    cell = residual.cell
    return residual.phase, cell.model, cell.tp, cell.sm_pct, cell.batch, cell.seq_len


def _judge(fitted: SharedSteps, cells: Sequence[Cell]) -> Iterator[Residual]:
    for cell in cells:
        steps = fitted.at(cell.sm_pct / 100)
        if cell.prefill_s is not None:
            predicted_s = steps.prefill_s(cell.tokens, cell.tokens * cell.seq_len)
            yield Residual(Phase.PREFILL, cell, cell.prefill_s, predicted_s)
        if cell.decode_s is not None:
            predicted_s = steps.decode_s(cell.batch, cell.tokens)
            yield Residual(Phase.DECODE, cell, cell.decode_s, predicted_s)


def _error(relative: Sequence[float]) -> Error:
    median, p90 = percentile(relative, 50), percentile(relative, 90)
    if median is None or p90 is None:
        return Error(0, 0.0, 0.0, 0.0)
    return Error(len(relative), median, p90, max(relative))
