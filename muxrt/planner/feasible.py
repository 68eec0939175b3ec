"""What no placement can do, said before anybody searches for one."""

from muxrt.errors import ConfigError
from muxrt.planner.capacity import Capacity
from muxrt.planner.meshes import smallest_mesh
from muxrt.planner.workload import Problem


def check_feasible(problem: Problem, capacity: Capacity) -> None:
    """Raise ConfigError for the first model that fits nowhere, or that nobody can serve as asked.

    The nearest feasible alternative is part of the message.
    """
    for model in problem.demands:
        smallest_mesh(problem, model)
    for model, demand in problem.demands.items():
        meshes = [
            (pool.index, tp)
            for pool in problem.pools
            for tp in problem.tps(model, pool.index)
            if problem.fits(pool.index, tp, (model,))
        ]
        if not any(capacity.rps(model, mesh) for mesh in meshes):
            raise ConfigError(_too_fast(problem, model, meshes))
        most_rps = sum(
            max(capacity.rps(model, mesh) / mesh[1] for mesh in meshes if mesh[0] == pool.index)
            * pool.num_gpus
            for pool in problem.pools
            if any(mesh[0] == pool.index for mesh in meshes)
        )
        if demand.rate_rps > most_rps:
            raise ConfigError(
                f"{model}: found {demand.rate_rps:g} requests/s, expected at most {most_rps:.1f}:"
                f" what all {problem.num_gpus} GPUs would serve within ttft_s"
                f" {demand.slo.ttft_s:g} and tpot_s {demand.slo.tpot_s:g} if they served nothing"
                f" else; {demand.rate_rps / most_rps:.1f} times the GPUs would do"
            )


def _too_fast(problem: Problem, model: str, meshes: list[tuple[int, int]]) -> str:
    """No mesh keeps the targets even with one request at a time."""
    demand = problem.demands[model]
    prompt = demand.prompt
    alone = []
    for pool, tp in meshes:
        steps = problem.steps(model, pool, tp, 1.0)
        ttft_s = steps.mean_prefill_s(prompt.mean, prompt.mean_square)
        tpot_s = steps.decode_s(1, demand.context) + problem.engine.control_s
        alone.append((ttft_s, tpot_s))
    # Twice what a lone request takes leaves room for its neighbours.
    ttft_s, tpot_s = (2 * min(times) for times in zip(*alone, strict=True))
    return (
        f"{model}: found ttft_s {demand.slo.ttft_s:g} and tpot_s {demand.slo.tpot_s:g}, which no"
        f" mesh of these GPUs keeps even at a trickle; expected about ttft_s"
        f" {max(ttft_s, demand.slo.ttft_s):.2g} and tpot_s {max(tpot_s, demand.slo.tpot_s):.2g}"
    )
