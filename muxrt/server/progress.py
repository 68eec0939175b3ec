"""What is shown while units load: one line on a terminal, log lines elsewhere."""

import logging
from typing import TextIO

from muxrt.server.readiness import describe
from muxrt.server.unit_process import UnitProcess, UnitState

log = logging.getLogger(__name__)

ERASE_LINE = "\r\x1b[2K"


class LoadingView:
    """Told of every change of a unit; a terminal sees all of them, a log each stage once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._told: dict[str, tuple[int, str, str | None]] = {}
        self._words: dict[str, str] = {}

    def on_change(self, unit: UnitProcess) -> None:
        """Show what `unit` does now."""
        if self._is_terminal:
            self._words[unit.name] = describe(unit) if unit.state is UnitState.LOADING else ""
            self._write("; ".join(words for words in self._words.values() if words))
            return
        loading = unit.loading
        if unit.state is not UnitState.LOADING or loading is None:
            return
        stage = (unit.generation, loading.stage, loading.model)
        if self._told.get(unit.name) != stage:
            self._told[unit.name] = stage
            log.info("event=loading unit=%s stage=%s model=%s", unit.name, *stage[1:])

    def _write(self, line: str) -> None:
        self._stream.write(ERASE_LINE + line)
        self._stream.flush()
