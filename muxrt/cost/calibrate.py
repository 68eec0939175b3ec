"""The efficiency of an engine from its profile, for the roofline of what was not profiled."""

from dataclasses import astuple
from math import log

import numpy as np
from scipy.optimize import least_squares

from muxrt.config.cluster import GpuKind
from muxrt.cost.monotone import Floats
from muxrt.cost.profile import Cell, Profile
from muxrt.cost.roofline import Efficiency, Roofline
from muxrt.cost.steps import Steps

# A third of the profile's shares is enough for five numbers.
SHARES = (30, 50, 100)
OUTLIER = 0.1  # relative error beyond which a cell counts linearly, not squared
START = Efficiency(flops=0.6, bandwidth=0.6, link=0.5, layer_s=1e-4, saturating_share=0.5)


def calibrate(profile: Profile, gpu: GpuKind) -> Efficiency:
    """The `Efficiency` that explains the profile of `gpu` best; relative errors, robustly."""
    cells = [cell for cell in profile.cells if cell.sm_pct in SHARES] or list(profile.cells)

    def residuals(logs: Floats) -> list[float]:
        steps = _steps(profile, gpu, Efficiency(*np.exp(logs).tolist()), cells)
        return [error for cell in cells for error in _errors(cell, steps)]

    start = np.log(astuple(START))
    found = least_squares(residuals, start, loss="soft_l1", f_scale=OUTLIER)
    return Efficiency(*np.exp(found.x).tolist())


_Key = tuple[str, int, int]


def _steps(
    profile: Profile, gpu: GpuKind, efficiency: Efficiency, cells: list[Cell]
) -> dict[_Key, Steps]:
    keys = {(cell.model, cell.tp, cell.sm_pct) for cell in cells}
    return {
        (model, tp, pct): Roofline(profile.shapes[model], tp, gpu, efficiency).at(pct / 100)
        for model, tp, pct in keys
    }


def _errors(cell: Cell, steps: dict[_Key, Steps]) -> list[float]:
    """Logarithms of predicted / measured."""
    at = steps[cell.model, cell.tp, cell.sm_pct]
    found = []
    if cell.prefill_s is not None:
        found.append(log(at.prefill_s(cell.tokens, cell.tokens * cell.seq_len) / cell.prefill_s))
    if cell.decode_s is not None:
        found.append(log(at.decode_s(cell.batch, cell.tokens) / cell.decode_s))
    return found
