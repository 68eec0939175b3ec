"""The simulator as the judge of a plan's final candidates."""

import msgspec

from muxrt.cli.plan_input import Asked
from muxrt.config.placement import Placement
from muxrt.planner import assign, mix
from muxrt.planner.assign import in_order
from muxrt.planner.draft import Draft
from muxrt.planner.mix import Kept, Mix
from muxrt.planner.queueing import QueueingJudge
from muxrt.sim.report import Report
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import SimJudge
from muxrt.workload.arrivals import arrivals
from muxrt.workload.spec import Traffic, Workload

# Seconds of traffic that are drawn, fewer where that are more requests; a trace is as long as its
# workload says. Too much traffic takes minutes to fill a placement: of two OPT-13B on 8 A100 with
# 28.9 requests/s one that serves 65 % in 200 s served 93 % in 60 s.
LOAD_S, NUM_REQUESTS, LEAST_S = 150.0, 4500, 40.0
WARMUP = 0.25  # of the time: requests that meet an emptier system do not count


class Simulator:
    """Serves every placement the same requests on a virtual clock; who is late is refused.

    They are drawn when it is first asked: of the workload's seed, or of another one.
    """

    def __init__(self, asked: Asked, seed: int | None = None) -> None:
        self._asked = asked
        self._seed = seed
        self._judge: SimJudge | None = None

    def draft(self, estimator: QueueingJudge, draft: Draft) -> Kept:
        """What a draft of all models on all GPUs serves; `estimator` sets its quotas."""
        problem = self._asked.problem
        ordered = in_order(problem, draft)
        return self.placement(assign.to_placement(problem, ordered, estimator(ordered)))

    def mix(self, found: Mix) -> Kept:
        """What a placement of both kinds serves."""
        return self.placement(mix.to_placement(self._asked.problem, found))

    def report(self, placement: Placement) -> Report:
        """All figures of any placement."""
        if self._judge is None:
            self._judge = _judge(self._asked, self._seed)
        return self._judge.report(placement)

    def placement(self, placement: Placement) -> Kept:
        """What any placement serves."""
        report = self.report(placement)
        shares = [row.attainment for row in report.rows if row.requests]
        least = min((share for share in shares if share is not None), default=1.0)
        total = report.total
        return Kept(total.goodput_rps or 0.0, total.attainment or 0.0, least)


def _judge(asked: Asked, seed: int | None) -> SimJudge:
    workload, problem = _steady(asked), asked.problem
    if seed is not None:
        workload = msgspec.structs.replace(workload, seed=seed)
    models = [model.refusing_late() for model in asked.models]
    setting = Setting(
        {name: demand.shape for name, demand in problem.demands.items()},
        problem.cost,
        asked.engine,
        {pool.gpu.name: pool.gpu for pool in problem.pools},
        network_bytes_per_s=problem.cluster.network_bytes_per_s,
    )
    requests = arrivals(workload, asked.rows)
    warmup_s = WARMUP * workload.duration_s
    return SimJudge(models, setting, requests, workload.duration_s, warmup_s=warmup_s)


def _steady(asked: Asked) -> Workload:
    """The traffic that is planned for: the rates of the demands, or the trace."""
    workload = asked.workload
    if workload.trace is not None:
        return workload
    given = {model.name: model for model in workload.models}
    demands = asked.problem.demands
    models = tuple(
        Traffic(
            name=name,
            rate_rps=demand.rate_rps,
            prompt=given[name].prompt,
            output=given[name].output,
            joint=given[name].joint,
        )
        for name, demand in demands.items()
    )
    return msgspec.structs.replace(
        workload, models=models, power_law=None, diurnal=None, duration_s=simulated_s(asked)
    )


def simulated_s(asked: Asked) -> float:
    """Seconds in which a judge's requests come."""
    if asked.workload.trace is not None:
        return asked.workload.duration_s
    rate_rps = sum(demand.rate_rps for demand in asked.problem.demands.values())
    return min(LOAD_S, max(LEAST_S, NUM_REQUESTS / rate_rps))
