"""Which model and which phase comes next, asked whenever a lane is idle."""

from collections.abc import Callable

from muxrt.sched.policies.adbs import Adbs
from muxrt.sched.policies.fcfs import Fcfs
from muxrt.sched.policies.round_robin import RoundRobin
from muxrt.sched.policies.slo import LeastSlack
from muxrt.sched.scheduler import Policy

POLICIES: dict[str, Callable[[float], Policy]] = {
    "fcfs": lambda quota_period_s: Fcfs(),
    "round-robin": lambda quota_period_s: RoundRobin(),
    "adbs": Adbs,
    "slo": LeastSlack,
}
