"""The simulator as the judge of a plan's final candidates."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from muxrt.cli.plan_input import Asked
from muxrt.planner.assign import in_order, to_placement
from muxrt.planner.draft import Draft
from muxrt.planner.queueing import QueueingJudge
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import SimJudge
from muxrt.workload.arrivals import arrivals
from muxrt.workload.spec import Traffic, Workload

LOAD_S, WARMUP_S = 60.0, 15.0  # of traffic, and what of it does not count


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a draft served."""

    goodput_rps: float


def simulator(asked: Asked, estimator: QueueingJudge) -> Callable[[Draft], Simulated]:
    """Serves every draft the same requests on a virtual clock; who is late is refused."""
    workload, problem = _steady(asked), asked.problem
    slos = {model.name: model.slo for model in asked.models}
    models = [
        msgspec.structs.replace(model, queue_timeout_s=model.queue_timeout_s or model.slo.ttft_s)
        for model in asked.models
        if model.slo is not None
    ]
    shapes = {name: demand.shape for name, demand in problem.demands.items()}
    gpus = {pool.gpu.name: pool.gpu for pool in problem.pools}
    setting = Setting(shapes, problem.cost, asked.engine, gpus)
    requests = arrivals(workload, asked.rows)
    judge = SimJudge(models, setting, requests, workload.duration_s, slos, WARMUP_S)

    def judged(draft: Draft) -> Simulated:
        ordered = in_order(problem, draft)
        return Simulated(judge(to_placement(problem, ordered, estimator(ordered))))

    return judged


def _steady(asked: Asked) -> Workload:
    """A minute of the traffic that is planned for: the rates of the demands, or the trace."""
    workload = asked.workload
    if workload.trace is not None:
        return workload
    given = {model.name: model for model in workload.models}
    models = tuple(
        Traffic(
            name=name,
            rate_rps=demand.rate_rps,
            prompt=given[name].prompt,
            output=given[name].output,
        )
        for name, demand in asked.problem.demands.items()
    )
    return msgspec.structs.replace(
        workload, models=models, power_law=None, diurnal=None, duration_s=LOAD_S
    )
