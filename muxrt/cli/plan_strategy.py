"""The placement that a strategy finds, as `muxrt plan` writes it."""

from muxrt.cli.plan_input import Asked
from muxrt.config.serve import ServeConfig
from muxrt.planner.assign import in_order, overloaded, to_placement
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft
from muxrt.planner.feasible import check_feasible
from muxrt.planner.queueing import QueueingJudge, Score
from muxrt.planner.search import Search
from muxrt.planner.strategies import STRATEGIES


def to_config(asked: Asked, draft: Draft, score: Score) -> ServeConfig:
    """Models and units. The estimate of an overloaded unit assumes that it refuses who is late."""
    impatient = overloaded(score)
    models = tuple(m.refusing_late() if m.name in impatient else m for m in asked.models)
    placement = to_placement(asked.problem, draft, score)
    return ServeConfig(models=models, units=placement.units)


def planned(asked: Asked, strategy: str) -> ServeConfig:
    """Search to the end, judged by the estimator. Raises ConfigError where nothing fits."""
    estimator = QueueingJudge(asked.problem)
    check_feasible(asked.problem, Capacity(asked.problem, estimator))
    search = Search(estimator, estimator)
    draft = in_order(asked.problem, STRATEGIES[strategy](asked.problem, search))
    return to_config(asked, draft, estimator(draft))
