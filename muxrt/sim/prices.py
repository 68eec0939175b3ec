"""What decode steps of a unit cost, as arrays: found out when first asked, and kept."""

from collections.abc import Sequence

import numpy as np

from muxrt.core import Phase
from muxrt.sim.mesh import DecodePrice, MeshCost, Runner
from muxrt.sim.sprint import FACTOR_COLUMNS, Prices

MOST_KEYS = 1 << 16  # of what runs together; beyond that a table would be too large


class PriceTable:
    """Prices by model, share and company, and which of them hold for what runs together."""

    def __init__(
        self, cost: MeshCost, models: Sequence[str], num_lanes: int, max_sequences: int
    ) -> None:
        """`max_sequences` bounds those of a batch; see `fits` for the lanes."""
        self._cost = cost
        self._models = tuple(models)
        self._rows: dict[tuple[str, float, bool], int] = {}
        self._found: list[DecodePrice] = []
        self.arrays = Prices(
            beside=np.full(((len(models) + 1) ** num_lanes, num_lanes), -1),
            by_size=np.full((1, max_sequences + 1), np.nan),
            factors=np.zeros((1, FACTOR_COLUMNS)),
            curves=np.zeros((1, 2), np.int64),
            knots=np.zeros(1),
            values=np.zeros(1),
        )

    @staticmethod
    def fits(num_models: int, num_lanes: int) -> bool:
        """A table for so many is not too large."""
        num_keys: int = (num_models + 1) ** num_lanes
        return num_keys <= MOST_KEYS

    def find_shares(self, key: int) -> None:
        """Prices of the models that run: the digits of `key`, the first to start the lowest."""
        runners, digits = [], key
        while digits:
            digits, digit = divmod(digits, len(self._models) + 1)
            runners.append(Runner(self._models[digit - 1], Phase.DECODE))
        is_alone = len(runners) == 1
        shares = self._cost.shares(runners)
        for position, (runner, share) in enumerate(zip(runners, shares, strict=True)):
            self.arrays.beside[key, position] = self._row(runner.model, share, is_alone)

    def find_size(self, row: int, size: int) -> None:
        """The price of a batch of `size` sequences that hold nothing."""
        self.arrays.by_size[row, size] = self._found[row].steps.decode_batch_s(size)

    def _row(self, model: str, share: float, is_alone: bool) -> int:
        key = (model, share, is_alone)
        if key not in self._rows:
            self._rows[key] = len(self._found)
            self._found.append(self._cost.decode_price(model, share, is_alone))
            self._write()
        return self._rows[key]

    def _write(self) -> None:
        """Arrays that hold one more; there are few of them, however long it goes on."""
        curves = [price.steps.decode_context for price in self._found]
        ends = np.cumsum([len(curve.knots) for curve in curves])
        begins = ends - [len(curve.knots) for curve in curves]
        by_size = np.full((len(curves), self.arrays.by_size.shape[1]), np.nan)
        known = self.arrays.by_size[: len(curves) - 1]
        by_size[: len(known)] = known
        factors = [
            (price.slower, price.control_step_s, price.control_s, curve.slope)
            for price, curve in zip(self._found, curves, strict=True)
        ]
        self.arrays = Prices(
            beside=self.arrays.beside,
            by_size=by_size,
            factors=np.array(factors),
            curves=np.stack([begins, ends], axis=1).astype(np.int64),
            knots=np.array([knot for curve in curves for knot in curve.knots], float),
            values=np.array([value for curve in curves for value in curve.values], float),
        )
