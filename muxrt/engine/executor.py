"""The seam between the brain and what computes: `Executor.launch(work, done)`."""

from collections.abc import Callable
from typing import Protocol

from muxrt.core import Result, Work

Done = Callable[[Work, Result], None]


class Executor(Protocol):
    """Runs work on lanes. Works of one lane run one after the other, in launch order."""

    def launch(self, work: Work, done: Done) -> None:
        """Start `work`; `done` is called on the unit's loop thread, never inside `launch`."""
