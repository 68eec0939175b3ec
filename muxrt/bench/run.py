"""A whole benchmark: prompts, load, figures."""

from collections.abc import Callable, Sequence
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
    async with session(target) as http:
        workload = with_models(workload, await list_models(http, target))
        plan = plan_arrivals(workload)
        jobs = await make_jobs(http, target, plan, workload.seed)
        progress = Progress(len(jobs), changed)
        changed(progress)
        async with watching(http, target) as blocks:
            outcomes = await replay(http, target, jobs, progress)
    return Run(workload, outcomes, blocks, len(jobs))


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
    http: aiohttp.ClientSession, target: Target, plan: Sequence[Arrival], seed: int
) -> list[Job]:
    """Text for every arrival, cut to length by each model's own tokens per character."""
    text, rng = PromptText(), Random(seed)
    probe = text.cut(PROBE_CHARS, rng)
    names = dict.fromkeys(arrival.model for arrival in plan)
    ratio = {name: await chars_per_token(http, target, name, probe) for name in names}
    return [
        Job(
            arrival.at_s,
            arrival.model,
            text.cut(max(1, round(arrival.prompt_tokens * ratio[arrival.model])), rng),
            arrival.output_tokens,
        )
        for arrival in plan
    ]
