"""Measured step times: a table of cells, and the file that says where it comes from.

MuxServe's own profile (`examples/placement/llama.json`) is read as well.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path

import msgspec

from muxrt.config.document import KeyedError
from muxrt.config.model import ModelShape
from muxrt.config.muxserve import GPU as MUXSERVE_GPU
from muxrt.config.muxserve import read_json
from muxrt.config.presets import preset
from muxrt.config.profile import ProfileFile, ServiceRatio, read_profile
from muxrt.core import Phase
from muxrt.cost.coefficients import read_coefficients
from muxrt.cost.knots import read_knots
from muxrt.cost.steps import SharedSteps
from muxrt.errors import ConfigError

COLUMNS = ("model", "tp", "sm_percent", "batch", "seq_len", "prefill_ms", "decode_ms")


@dataclass(frozen=True, slots=True)
class Cell:
    """One forward pass of `batch` sequences of `seq_len` tokens each.

    A prefill computes all of them, a decode one new token per sequence with `seq_len` tokens of KV.
    """

    model: str
    tp: int
    sm_pct: int
    batch: int
    seq_len: int
    prefill_s: float | None  # None: not measured
    decode_s: float | None

    @property
    def tokens(self) -> int:
        """Tokens of all sequences: computed by a prefill, attended to by a decode."""
        return self.batch * self.seq_len

    def time_s(self, phase: Phase) -> float | None:
        return self.prefill_s if phase is Phase.PREFILL else self.decode_s


@dataclass(frozen=True, slots=True)
class Profile:
    """Cells measured on one kind of GPU, and the shapes of their models."""

    title: str
    source: str
    licence: str
    gpu: str
    shapes: dict[str, ModelShape]
    cells: tuple[Cell, ...]
    file: ProfileFile | None = None  # None: MuxServe's JSON, which says nothing more
    # By model and tp: step times that need no fit, instead of cells.
    given: Mapping[tuple[str, int], SharedSteps] = field(default_factory=dict)

    def of(self, model: str, tp: int) -> tuple[Cell, ...]:
        """The cells of one model on `tp` GPUs; none where that was not measured."""
        return tuple(cell for cell in self.cells if (cell.model, cell.tp) == (model, tp))

    def granularity(self, model: str) -> int:
        """A prefill computes a multiple of so many tokens; 1 where the file does not say."""
        models = self.file.models if self.file is not None else ()
        return next((m.prefill_granularity for m in models if m.name == model), 1)

    def in_service(self, model: str, tp: int) -> tuple[Cell, ...]:
        """`of`, as long as these steps take among those of other models."""
        ratios = self.file.in_service if self.file is not None else ()
        for ratio in ratios:
            if ratio.model == model:
                return tuple(_scaled(cell, ratio) for cell in self.of(model, tp))
        return self.of(model, tp)

    @property
    def is_cpu(self) -> bool:
        """Whether its shares are lanes of cores."""
        return (
            self.file is not None and self.file.kind is not None and self.file.kind.device == "cpu"
        )

    @property
    def keys(self) -> tuple[tuple[str, int], ...]:
        """What was measured, as (model, tp), in order."""
        return tuple(sorted({(cell.model, cell.tp) for cell in self.cells} | set(self.given)))


def _scaled(cell: Cell, ratio: ServiceRatio) -> Cell:
    return replace(
        cell,
        prefill_s=None if cell.prefill_s is None else cell.prefill_s * ratio.prefill,
        decode_s=None if cell.decode_s is None else cell.decode_s * ratio.decode,
    )


def load_profile(path: Path) -> Profile:
    """The profile that the YAML file `path` describes, or MuxServe's JSON.

    Raises ConfigError (one line: file, line or key, found, expected).
    """
    if path.suffix == ".json":
        return _of_muxserve(path)
    if path.suffix == ".csv":
        raise ConfigError(
            f"{path}: found a table, expected the YAML file that names it with its GPU, its source"
            " and the shapes of its models"
        )
    read = read_profile(path)
    file = read.file
    cells = read_cells(read.table) if file.form == "cells" else ()
    given = _given(file, read.table)
    for model in (*(cell.model for cell in cells), *(model for model, _ in given)):
        if model not in read.shapes:
            problem = f"{model!r} is in {read.table.name} but has no shape here"
            raise read.document.locate(KeyedError(("models",), problem))
    return Profile(file.title, file.source, file.licence, file.gpu, read.shapes, cells, file, given)


def _given(file: ProfileFile, table: Path) -> Mapping[tuple[str, int], SharedSteps]:
    """Step times that the table gives without a fit."""
    if file.form == "distserve":
        return read_coefficients(table, file.title)
    if file.form == "splitwise":
        return {key: knots.repaired() for key, knots in read_knots(table, file.title).items()}
    return {}


def table_of(cells: Iterable[Cell]) -> str:
    """The CSV that `read_cells` reads back: to six digits, in order."""
    rows = StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(COLUMNS)
    for cell in sorted(cells, key=lambda c: (c.model, c.tp, c.sm_pct, c.batch, c.seq_len)):
        key = (cell.model, cell.tp, cell.sm_pct, cell.batch, cell.seq_len)
        table.writerow((*key, *(_millis(time) for time in (cell.prefill_s, cell.decode_s))))
    return rows.getvalue()


def _millis(time_s: float | None) -> str:
    return "" if time_s is None else f"{time_s * 1e3:.6g}"


def read_cells(path: Path) -> tuple[Cell, ...]:
    """The cells of a CSV with the header COLUMNS; times in ms, an empty one was not measured.

    Raises ConfigError with file and line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            cells = tuple(_cells(path, file))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such profile") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    if not cells:
        raise ConfigError(f"{path}: the profile has no cells")
    return cells


def _cells(path: Path, file: Iterator[str]) -> Iterator[Cell]:
    lines = csv.DictReader(line for line in file if not line.startswith("#"))
    missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
    if missing:
        raise ConfigError(
            f"{path}: no column {missing[0]}, expected a CSV with the header {','.join(COLUMNS)}"
        )
    seen: dict[tuple[str, int, int, int, int], int] = {}
    for line in lines:
        cell = _cell(path, lines.line_num, line)
        key = (cell.model, cell.tp, cell.sm_pct, cell.batch, cell.seq_len)
        if key in seen:
            raise ConfigError(f"{path}:{lines.line_num}: the same cell as on line {seen[key]}")
        seen[key] = lines.line_num
        yield cell


def _cell(path: Path, number: int, line: dict[str, str]) -> Cell:
    try:
        if None in line or None in line.values():  # more or fewer values than columns
            raise ValueError
        cell = Cell(
            line["model"],
            int(line["tp"]),
            int(line["sm_percent"]),
            int(line["batch"]),
            int(line["seq_len"]),
            _seconds(line["prefill_ms"]),
            _seconds(line["decode_ms"]),
        )
    except (ValueError, TypeError):
        cell = None
    if cell is None or not cell.model or not _is_sound(cell):
        found = ",".join(str(value) for value in line.values())
        raise ConfigError(
            f"{path}:{number}: found {found}, expected a model, whole numbers above 0 (sm_percent"
            " at most 100), and times in ms above 0 or nothing"
        )
    return cell


def _seconds(text: str) -> float | None:
    return float(text) / 1000 if text else None


def _is_sound(cell: Cell) -> bool:
    counts = min(cell.tp, cell.sm_pct, cell.batch, cell.seq_len)
    times = [time for time in (cell.prefill_s, cell.decode_s) if time is not None]
    return counts >= 1 and cell.sm_pct <= 100 and all(0 < time < float("inf") for time in times)


class _Times(msgspec.Struct, frozen=True):
    prefill: float  # ms; -1 = not measured
    decoding: float


# Model, GPUs, per cent of the SMs, sequences, tokens of each.
_Json = dict[str, dict[str, dict[str, dict[str, dict[str, _Times]]]]]


def _of_muxserve(path: Path) -> Profile:
    """A profile of models that are presets, on the only GPU that MuxServe ran on."""
    cells = tuple(_muxserve_cells(path, read_json(path, _Json)))
    if not cells:
        raise ConfigError(f"{path}: the profile has no cells")
    shapes = {}
    for name in dict.fromkeys(cell.model for cell in cells):
        try:
            shapes[name] = preset(name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error.message}") from None
    return Profile(path.name, str(path), "not stated", MUXSERVE_GPU, shapes, cells)


def _muxserve_cells(path: Path, file: _Json) -> Iterator[Cell]:
    for model, by_tp in file.items():
        for tp, by_pct in by_tp.items():
            for pct, by_batch in by_pct.items():
                for batch, by_length in by_batch.items():
                    for length, times in by_length.items():
                        key = (model, tp, pct, batch, length)
                        cell = _muxserve_cell(path, key, times)
                        if (cell.prefill_s, cell.decode_s) != (None, None):
                            yield cell


def _muxserve_cell(path: Path, key: tuple[str, str, str, str, str], times: _Times) -> Cell:
    measured = [None if time == -1 else time / 1000 for time in (times.prefill, times.decoding)]
    try:
        cell = Cell(key[0], *(int(number) for number in key[1:]), *measured)
    except ValueError:
        cell = None
    if cell is None or not _is_sound(cell):
        raise ConfigError(
            f"{path}: {'.'.join(key)}: found prefill {times.prefill:g} and decoding"
            f" {times.decoding:g}, expected GPUs, sm_percent (at most 100), batch and length as"
            " whole numbers above 0, and times in ms above 0 or -1"
        )
    return cell
