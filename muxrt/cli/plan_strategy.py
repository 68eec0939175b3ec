"""The placement that a strategy finds, as `muxrt plan` writes it."""

from time import monotonic

from muxrt.cli.plan_input import Asked
from muxrt.cli.plan_judge import Simulator
from muxrt.config.serve import ServeConfig
from muxrt.planner.assign import in_order, overloaded
from muxrt.planner.capacity import Capacity
from muxrt.planner.feasible import check_feasible
from muxrt.planner.mix import NOBODY, Mix, to_placement
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.rest import rest_of, whole
from muxrt.planner.search import Search
from muxrt.planner.strategies import STRATEGIES
from muxrt.planner.strategies.mixed import Terms, mixed

LIMIT_S = 60.0  # of a search that nobody limits

GOAL = 0.9  # of the requests in time: what phases apart are planned for


def impatient(mix: Mix) -> set[str]:
    """Models with more traffic than some of their units serve: what would be late is refused."""
    apart = {one.model for one in mix.apart.models if one.seen.attainment < GOAL}
    return overloaded(mix.score) | apart


def to_config(asked: Asked, mix: Mix) -> ServeConfig:
    """Models and units. The estimate of an overloaded unit assumes that it refuses who is late."""
    late = impatient(mix)
    models = tuple(m.refusing_late() if m.name in late else m for m in asked.models)
    return ServeConfig(models=models, units=to_placement(asked.problem, mix).units)


def colocated(asked: Asked, strategy: str, search: Search) -> Mix:
    """Everybody colocated. Raises ConfigError where nothing fits."""
    problem = asked.problem
    check_feasible(problem, Capacity(problem, search.estimator))
    draft = in_order(problem, STRATEGIES[strategy](problem, search))
    rest = rest_of(problem, whole(problem), problem.demands)
    return Mix(NOBODY, rest, draft, search.estimator(draft))


def planned(asked: Asked, strategy: str) -> ServeConfig:
    """What `muxrt plan` writes for it. Raises ConfigError where nothing fits."""
    estimator = QueueingJudge(asked.problem)
    if strategy != "auto":
        return to_config(asked, colocated(asked, strategy, Search(estimator, estimator)))
    end_s = monotonic() + LIMIT_S
    search = Search(estimator, estimator, lambda: monotonic() > end_s)
    return to_config(asked, mixed(asked.problem, search, Terms(Simulator(asked).mix)).mix)
