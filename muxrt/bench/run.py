"""A whole benchmark: prompts, load, figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import aiohttp

from muxrt.bench.client import chars_per_token, list_models, replay, session
from muxrt.bench.job import Job, Outcome, Progress, Target
from muxrt.bench.text import PROBE_CHARS, PromptText
from muxrt.bench.watch import Blocks, watching
from muxrt.errors import ConfigError
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Workload, with_models
from muxrt.workload.trace import read_trace


@dataclass(frozen=True, slots=True)
class Run:
    """What a benchmark saw; `blocks.models` is empty where the server is not muxrt."""

    workload: Workload  # with the models it was dealt to
    outcomes: list[Outcome]
    blocks: Blocks
    num_planned: int  # more than `outcomes` where the run was cut short


async def run(target: Target, workload: Workload, changed: Callable[[Progress], None]) -> Run:
    """Replay `workload` against `target`. Raises EndpointError and ConfigError before any load."""
    return await run_all([target], workload, changed)


async def run_all(
    targets: Sequence[Target], workload: Workload, changed: Callable[[Progress], None]
) -> Run:
    """`run` against several endpoints: a model is asked for at the first one that lists it.

    All get the key and the limits of the first.
    """
    async with session(targets[0]) as http:
        routes = await find_models(http, targets)
        workload = with_models(workload, list(routes))
        plan = plan_arrivals(workload)
        jobs = await make_jobs(http, routes, plan, workload.seed)
        progress = Progress(len(jobs), changed)
        changed(progress)
        async with watching(http, targets) as blocks:
            outcomes = await replay(http, routes, jobs, progress)
    return Run(workload, outcomes, blocks, len(jobs))


async def find_models(http: aiohttp.ClientSession, targets: Sequence[Target]) -> dict[str, Target]:
    """Where each model is served. Raises EndpointError."""
    routes: dict[str, Target] = {}
    for target in targets:
        for model in await list_models(http, target):
            routes.setdefault(model, target)
    return routes


def plan_arrivals(workload: Workload) -> list[Arrival]:
    """The requests of `workload`, its trace read. Raises ConfigError where there are none."""
    rows = read_trace(Path(workload.trace.file)) if workload.trace else []
    plan = arrivals(workload, rows)
    if not plan:
        raise ConfigError(
            f"the workload has no request within {workload.duration_s:g} s:"
            " raise duration_s or the rates"
        )
    return plan


async def make_jobs(
    http: aiohttp.ClientSession, routes: Mapping[str, Target], plan: Sequence[Arrival], seed: int
) -> list[Job]:
    """Text for every arrival, cut to length by each model's own tokens per character."""
    text, rng = PromptText(), Random(seed)
    probe = text.cut(PROBE_CHARS, rng)
    names = dict.fromkeys(arrival.model for arrival in plan)
    ratio = {name: await chars_per_token(http, routes[name], name, probe) for name in names}
    return [
        Job(
            arrival.at_s,
            arrival.model,
            text.cut(max(1, round(arrival.prompt_tokens * ratio[arrival.model])), rng),
            arrival.output_tokens,
        )
        for arrival in plan
    ]
