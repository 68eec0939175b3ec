"""One brain, two worlds: the same arrivals, the same decisions."""

from random import Random

import msgspec
import pytest
from real_world import MODELS, RealWorld, prompts

from muxrt.config.placement import Slo
from muxrt.core import Batch, Work

SLO = Slo(ttft_s=0.3, tpot_s=0.03)  # some prompts of the requests below come too late


def arrivals(world: RealWorld) -> None:
    """Poisson requests for three models; each ends by itself or at its limit."""
    random, at_s = Random(7), 0.0
    pools = {model: prompts(model, 40, 300, seed=2) for model in MODELS}
    for index in range(40):
        at_s += random.expovariate(30)
        model = random.choice(MODELS)
        limit = random.randint(1, 80)
        world.at(at_s, lambda m=model, i=index, n=limit: world.submit(m, pools[m][i], n))  # type: ignore[misc]


def decision(work: Work) -> Work:
    """A work without what only the worker may read."""
    if not isinstance(work, Batch):
        return work
    opened = tuple(msgspec.structs.replace(slot, payload=b"") for slot in work.opened)
    return msgspec.structs.replace(work, opened=opened)


@pytest.mark.parametrize("policy", ["fcfs", "round-robin", "adbs", "slo"])
@pytest.mark.parametrize(("lanes", "depth"), [(1, 1), (2, 1), (2, 2)])
def test_every_scheduling_decision_is_the_same(policy: str, lanes: int, depth: int) -> None:
    settings = {
        "lanes": lanes, "depth": depth, "policy": policy, "num_groups": 1.1, "swap_groups": 0.5,
        "prefill_tokens": 128, "quota_period_s": 0.1, "max_sequences": 16,
        "slo": SLO if policy == "slo" else None,
    }  # fmt: skip
    real = RealWorld(**settings)  # type: ignore[arg-type]
    arrivals(real)
    real.run()
    lengths = {rid: len(served.tokens) for rid, served in real.served.items()}
    # Where the real sequence met its limit, the simulated one must not stop by itself before it.
    simulated = RealWorld(simulate=lengths, **settings)  # type: ignore[arg-type]
    arrivals(simulated)
    simulated.run()
    wanted = [decision(work) for work in real.executor.works]
    found = [decision(work) for work in simulated.executor.works]
    assert found == wanted
    assert len(wanted) > 100
