"""What a strategy is handed beside the problem: a judge, when to stop, whom to tell."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from muxrt.planner.draft import Draft
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.workload import Problem


class Judged(Protocol):
    """What a judge says of a draft: a `Score`, or what a simulation gave."""

    @property
    def goodput_rps(self) -> float: ...


Judge = Callable[[Draft], Judged]


def _never() -> bool:
    return False


def _nobody(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True, slots=True)
class Search:
    """`estimator` scores the many moves of a search, `judge` the few final candidates.

    `is_over` says that the time is up or the user has had enough: return the best so far.
    """

    estimator: QueueingJudge
    judge: Judge
    is_over: Callable[[], bool] = _never
    tell: Callable[[str, int, int], None] = _nobody


Strategy = Callable[[Problem, Search], Draft]
