"""Which model and which phase comes next, asked whenever a lane is idle."""

from collections.abc import Callable, Mapping

from muxrt.sched.policies.adbs import Adbs
from muxrt.sched.policies.fcfs import Fcfs
from muxrt.sched.policies.round_robin import RoundRobin
from muxrt.sched.policies.slo import LeastSlack
from muxrt.sched.queues import ServedModel
from muxrt.sched.scheduler import Policy

# From the quota period and the models of the unit.
POLICIES: dict[str, Callable[[float, Mapping[str, ServedModel]], Policy]] = {
    "fcfs": lambda quota_period_s, models: Fcfs(),
    "round-robin": lambda quota_period_s, models: RoundRobin(),
    "adbs": lambda quota_period_s, models: Adbs(quota_period_s),
    "slo": lambda quota_period_s, models: LeastSlack(models),
}
