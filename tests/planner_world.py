"""Small clusters and demands for tests of the planner; times by roofline, so nothing is fitted."""

from collections.abc import Sequence

from muxrt.config.cluster import Cluster, NodeGroup
from muxrt.config.placement import Slo
from muxrt.config.presets import PRESETS
from muxrt.cost.model import CostModel
from muxrt.planner.draft import Group, Part
from muxrt.planner.queueing import QueueingJudge
from muxrt.planner.search import Search
from muxrt.planner.workload import Demand, Engine, Lengths, Problem


def demand(
    model: str,
    rate_rps: float = 1.0,
    preset: str = "llama-7b",
    *,
    prompt: float = 200,
    output: float = 100,
    cv: float = 0.5,
    ttft_s: float = 1.0,
    tpot_s: float = 0.05,
    max_tokens: int = 2048,
) -> Demand:
    """A model with lengths of that mean and spread."""

    def lengths(mean: float) -> Lengths:
        return Lengths(mean, mean**2 * (1 + cv**2))

    slo = Slo(ttft_s=ttft_s, tpot_s=tpot_s)
    shape = PRESETS[preset]
    return Demand(model, shape, rate_rps, lengths(prompt), lengths(output), slo, max_tokens)


def problem(
    demands: Sequence[Demand], gpus: int = 4, nodes: int = 1, gpu: str = "a100-80g"
) -> Problem:
    """`nodes` machines with `gpus` each."""
    cluster = Cluster(nodes=(NodeGroup(gpu=gpu, gpus=gpus, count=nodes),))
    return Problem(cluster, list(demands), CostModel(), Engine())


def search(given: Problem) -> Search:
    """A search without end, judged by the estimator."""
    judge = QueueingJudge(given)
    return Search(judge, judge)


def group(size: int, *models: str, pct: int | None = None) -> Group:
    """A mesh with all traffic of these models."""
    return Group(0, size, tuple(Part(model) for model in sorted(models)), pct)
