"""Steps in service against what the table says: the same models, served together.

A cell is the same step several times in a row. In service steps of several models take turns,
batches have sizes that no cell has, and an endpoint works beside them. So a `muxrt serve` of all
models answers mixed requests for some seconds, the simulator answers the same ones, and the ratio
of their steps is kept: by model and phase on one lane, and by phase where lanes take all cores.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import msgspec

from muxrt.bench.client import replay, session
from muxrt.bench.job import Job, Progress, Status, Target
from muxrt.cli.batch_counts import Batches, batches_since, read_batches
from muxrt.cli.endpoint import ready_endpoint
from muxrt.cli.profile_source import Subject
from muxrt.config.placement import Lanes, Memory, Mesh, Scheduling, UnitModel, UnitSpec
from muxrt.config.plan import EngineFacts
from muxrt.config.profile import ServiceRatio
from muxrt.config.serve import Endpoint, ServeConfig
from muxrt.core import Phase
from muxrt.cost.memory import kv_token_bytes
from muxrt.cost.model import CostModel
from muxrt.cost.profile import Profile
from muxrt.engine.build import DTYPE_BYTES, kv_dtype
from muxrt.engine.messages import BatchStats
from muxrt.engine.metered import Metered
from muxrt.errors import MuxrtError
from muxrt.sim.group import Simulation
from muxrt.sim.setting import Setting
from muxrt.sim.simulate import tasks
from muxrt.workload.arrivals import Arrival, arrivals
from muxrt.workload.spec import Lengths, Traffic, Workload

LOADS = (0.4, 0.7, 1.0)  # of what the simulator answers when all requests are there at once
LOAD_S, WARM_S = 12.0, 3.0  # of arrivals at a load, each time other ones
MOST_RPS = 30.0  # beyond it, tiny models would measure the endpoint and its client
REPORT_S = 1.5  # in which a unit that went idle has said what it computed
SEED, SAMPLE = 11, 100
MEAN_PROMPT, MEAN_OUTPUT = 128, 64  # tokens; as of a chat, and short
LONGEST = 4  # times the mean
SEQUENCES = 64  # that the KV memory holds at their longest
ROUNDS = 4  # batches come out otherwise when their times change: until that settles

Key = tuple[str, Phase]


@dataclass(frozen=True, slots=True)
class Service:
    """Steps in service over steps of the table."""

    models: tuple[ServiceRatio, ...]
    prefill_interference: float | None = None  # None: there is one lane at most
    decode_interference: float | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What an endpoint was asked, what it computed, and what its client did."""

    config: ServeConfig
    arrivals: tuple[tuple[Arrival, ...], ...]
    batches: Batches  # of all loads
    client_token_s: float


def measure_service(
    subject: Subject, profile: Profile, tp: int, cores: int, seconds: float
) -> Service:
    """Serve the profile's models on one lane of `cores`, then on lanes that take all of them.

    Of each of `tp` ranks.

    Each time about `seconds` of requests: machines are uneasy, so steps of the same requests differ
    by some per cent from minute to minute. Raises MuxrtError where they cannot be served.
    """
    assert profile.file is not None and profile.file.kind is not None, "it was just written"
    lanes = profile.file.kind.sms // cores
    one = _serve(config_of(subject, profile, (cores,), tp), subject, profile, seconds)
    ratios = find_ratios(profile, one)
    if lanes == 1:
        return Service(ratios)
    known = with_ratios(profile, ratios)
    everywhere = _serve(config_of(subject, known, (cores,) * lanes, tp), subject, known, seconds)
    return Service(ratios, *find_interference(known, everywhere))


def find_ratios(profile: Profile, served: Served) -> tuple[ServiceRatio, ...]:
    """What each model's steps have to be multiplied by."""
    found: dict[Key, float] = dict.fromkeys(served.batches, 1.0)
    for _ in range(ROUNDS):
        ours = simulated(with_ratios(profile, _as_ratios(found)), served)
        for key, measured in served.batches.items():
            if measured.batches and key in ours:
                found[key] *= _mean_s(measured) / _mean_s(ours[key])
    return _as_ratios(found)


def _as_ratios(found: Mapping[Key, float]) -> tuple[ServiceRatio, ...]:
    return tuple(
        ServiceRatio(
            model=name,
            prefill=round(found.get((name, Phase.PREFILL), 1.0), 4),
            decode=round(found.get((name, Phase.DECODE), 1.0), 4),
        )
        for name in dict.fromkeys(model for model, _ in found)
    )


def find_interference(profile: Profile, served: Served) -> tuple[float, float]:
    """How much slower prefills and decode steps are beside another lane's."""
    slower = dict.fromkeys((Phase.PREFILL, Phase.DECODE), 0.0)
    for _ in range(ROUNDS):
        ours = simulated(profile, served, slower)
        for phase in slower:
            mine = [(b, ours[k]) for k, b in served.batches.items() if k[1] is phase and k in ours]
            measured_s = sum(batch.seconds for batch, _ in mine)
            expected_s = sum(batch.batches * _mean_s(one) for batch, one in mine)
            slower[phase] = max(0.0, (1 + slower[phase]) * measured_s / expected_s - 1)
    return round(slower[Phase.PREFILL], 4), round(slower[Phase.DECODE], 4)


def _mean_s(stats: BatchStats) -> float:
    return stats.seconds / stats.batches


def with_ratios(profile: Profile, ratios: tuple[ServiceRatio, ...]) -> Profile:
    assert profile.file is not None, "it was just written"
    return replace(profile, file=msgspec.structs.replace(profile.file, in_service=ratios))


def _setting(
    profile: Profile, slower: Mapping[Phase, float] | None, client_token_s: float
) -> Setting:
    assert profile.file is not None and profile.file.kind is not None, "it was just written"
    engine = msgspec.structs.asdict(profile.file.engine)
    if slower is not None:
        engine["prefill_interference"] = slower[Phase.PREFILL]
        engine["decode_interference"] = slower[Phase.DECODE]
    engine["control_s"] = (engine["control_s"] or 0.0) + client_token_s  # it is on these cores too
    facts = EngineFacts(**{name: value for name, value in engine.items() if value is not None})
    gpus = {profile.gpu: profile.file.kind}
    cost = CostModel([profile], gpus)
    return Setting(profile.shapes, cost, facts, gpus, asks_exactly=True, fold=False)


def simulated(
    profile: Profile, served: Served, slower: Mapping[Phase, float] | None = None
) -> dict[Key, BatchStats]:
    """What the simulator computes for the same requests."""
    setting = _setting(profile, slower, served.client_token_s)
    total: dict[Key, BatchStats] = {}
    for load in served.arrivals:
        for one in _run(served.config, setting, load)[1]:
            key = (one.model, one.phase)
            total[key] = _add(total.get(key) or BatchStats(*key), one)
    return total


def _add(one: BatchStats, other: BatchStats) -> BatchStats:
    return BatchStats(
        one.model,
        one.phase,
        one.batches + other.batches,
        one.tokens + other.tokens,
        one.seconds + other.seconds,
    )


def _run(
    config: ServeConfig, setting: Setting, asked: Sequence[Arrival]
) -> tuple[float, tuple[BatchStats, ...]]:
    """Seconds until the last token, and what was computed."""
    (task,) = tasks(config, setting, asked)
    simulation = Simulation(task.group, task.setting)
    (unit,) = simulation.units.values()
    meter = unit.unit.executor = Metered(unit.unit.executor)
    served = simulation.run(task.arrivals).served
    return max(one.last_s or 0.0 for one in served), meter.stats()


def _capacity_rps(config: ServeConfig, profile: Profile) -> float:
    """Requests/s when all are there at once."""
    sample = arrivals(workload(config, SAMPLE / 100, 100.0))
    at_once = [replace(one, at_s=0.0) for one in sample]
    return len(at_once) / _run(config, _setting(profile, None, 0.0), at_once)[0]


def workload(config: ServeConfig, rate_rps: float, duration_s: float, seed: int = SEED) -> Workload:
    """Poisson arrivals, as popular as the models' own rates say, or all alike."""
    weights = {model.name: model.rate_rps or 1.0 for model in config.models}
    longest = min(model.max_model_len or 0 for model in config.models)
    prompt, output = min(MEAN_PROMPT, longest // 4), min(MEAN_OUTPUT, longest // 8)
    return Workload(
        duration_s=duration_s,
        seed=seed,
        models=tuple(
            Traffic(name=name, rate_rps=rate_rps * weight / sum(weights.values()))
            for name, weight in weights.items()
        ),
        prompt=Lengths(mean_tokens=prompt, cv=0.5, max_tokens=min(LONGEST * prompt, longest // 2)),
        output=Lengths(mean_tokens=output, cv=0.5, max_tokens=min(LONGEST * output, longest // 4)),
    )


def config_of(
    subject: Subject, profile: Profile, split: tuple[int, ...], tp: int = 1
) -> ServeConfig:
    """All models in one unit of `tp` ranks, with memory for all that comes."""
    assert profile.file is not None and profile.file.kind is not None, "it was just written"
    wanted = 2 * LONGEST * (MEAN_PROMPT + MEAN_OUTPUT)
    models, kv_bytes = [], 0
    for spec in subject.specs:
        shape = subject.shapes[spec.name]
        longest = min(spec.max_model_len or shape.max_positions, wanted)
        token_bytes = tp * kv_token_bytes(shape, tp, DTYPE_BYTES[kv_dtype(spec, shape)])
        kv_bytes += SEQUENCES * longest * token_bytes
        models.append(
            msgspec.structs.replace(spec, max_model_len=longest, slo=None, queue_timeout_s=None)
        )
    unit = UnitSpec(
        name="service",
        models=tuple(UnitModel(name=spec.name) for spec in models),
        memory=Memory(kv_bytes=kv_bytes),
        mesh=Mesh(kind=profile.file.kind.name, gpus=tuple(range(tp))),
        lanes=Lanes(split=split),
        scheduling=Scheduling(prefix_reuse=False),  # simulated prompts have none in common
    )
    return ServeConfig(models=tuple(models), units=(unit,), endpoint=Endpoint(port=0, drain_s=1.0))


def _serve(config: ServeConfig, subject: Subject, profile: Profile, seconds: float) -> Served:
    """A real endpoint under each load."""
    most_rps = min(MOST_RPS, _capacity_rps(config, profile))
    loads = LOADS if seconds >= LOAD_S else LOADS[1:2]  # a rough picture from one of them
    rounds = max(1, round(seconds / (LOAD_S * len(loads))))
    plan = [
        arrivals(workload(config, load * most_rps, min(seconds, LOAD_S), seed))
        for seed in range(SEED, SEED + rounds)
        for load in loads
    ]
    with ready_endpoint(config) as endpoint:
        url = endpoint.url
        client = _Client(url, {name: shape.vocab_size for name, shape in subject.shapes.items()})
        warm = workload(config, most_rps, min(seconds, WARM_S))  # code is compiled, buffers made
        client.ask(arrivals(warm))
        before, begun_s = read_batches(url), time.process_time()
        asked = tuple(client.ask(load) for load in plan)
        client_s = time.process_time() - begun_s
        found = batches_since(before, read_batches(url))
    tokens = sum(one.output_tokens for load in asked for one in load)
    return Served(config, asked, found, client_s / max(tokens, 1))


class _Client:
    """Sends arrivals, and says what the server made of them."""

    def __init__(self, url: str, vocab_sizes: Mapping[str, int]) -> None:
        self._target, self._vocab_sizes = Target(url), vocab_sizes
        self._random = Random(SEED)

    def ask(self, asked: Sequence[Arrival]) -> tuple[Arrival, ...]:
        """The requests with the server's count of tokens. Raises MuxrtError where one fails."""
        found = asyncio.run(self._ask(asked))
        time.sleep(REPORT_S)
        return found

    def _job(self, one: Arrival) -> Job:
        words = range(self._vocab_sizes[one.model])
        ids = self._random.choices(words, k=one.prompt_tokens)
        return Job(one.at_s, one.model, ids, one.output_tokens)

    async def _ask(self, asked: Sequence[Arrival]) -> tuple[Arrival, ...]:
        async with session(self._target) as http:
            routes = {one.model: self._target for one in asked}
            jobs = [self._job(one) for one in asked]
            done = await replay(http, routes, jobs, Progress(len(jobs)))
        for one in done:
            if one.status is not Status.OK:
                raise MuxrtError(f"{one.model} does not answer: {one.error}")
        return tuple(Arrival(o.due_s, o.model, o.prompt_tokens, o.output_tokens) for o in done)
