"""/metrics: what the endpoint measures itself, and what its units report."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from muxrt.config.placement import ModelSpec, Role
from muxrt.engine.messages import BatchStats, ModelStats, Stats
from muxrt.metrics import Timing, is_met
from muxrt.server.dispatch import Dispatcher
from muxrt.server.replan import Outcome, Replanner
from muxrt.server.unit_process import UnitProcess

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds; from a small model's decode step to what nobody waits for.
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

MODEL_UNIT = ("model", "unit")
ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")
ModelValue = Callable[[ModelStats], float]

GAUGES: Mapping[str, tuple[str, ModelValue]] = {
    "muxrt_sequences_waiting": ("Sequences that never started.", lambda m: m.waiting),
    "muxrt_sequences_running": ("Sequences that hold blocks.", lambda m: m.running),
    "muxrt_sequences_preempted": ("Started sequences without blocks.", lambda m: m.preempted),
    "muxrt_blocks_used": ("Blocks that sequences hold.", lambda m: m.blocks_used),
    "muxrt_blocks_cached": ("Blocks that only the prefix cache holds.", lambda m: m.blocks_cached),
    "muxrt_blocks_quota": ("Blocks a model is entitled to.", lambda m: m.blocks_quota),
    "muxrt_model_awake": ("1 while its weights are in memory.", lambda m: m.state == "awake"),
    "muxrt_blocks_borrowed": ("Blocks above the quota.", lambda m: m.blocks_borrowed),
}
COUNTERS: Mapping[str, tuple[str, ModelValue]] = {
    "muxrt_prefix_hit_tokens": ("Prompt tokens found in the cache.", lambda m: m.prefix_hit_tokens),
    "muxrt_prompt_tokens": ("Prompt tokens of started sequences.", lambda m: m.prompt_tokens),
    "muxrt_output_tokens": ("Tokens generated.", lambda m: m.output_tokens),
    "muxrt_model_moves": ("Times that it woke or fell asleep.", lambda m: m.moves),
    "muxrt_deadline_refusals": ("Sequences refused at their deadline.", lambda m: m.refused),
}
BATCHES: Mapping[str, tuple[str, Callable[[BatchStats], float]]] = {
    "muxrt_batches": ("Batches computed.", lambda b: b.batches),
    "muxrt_batch_tokens": ("Tokens that went into batches.", lambda b: b.tokens),
    "muxrt_batch_seconds": ("Seconds of lanes that batches took.", lambda b: b.seconds),
}
PREEMPTIONS: Mapping[str, ModelValue] = {
    "swap": lambda m: m.preemptions_swap,
    "recompute": lambda m: m.preemptions_recompute,
}


class UnitCollector(Collector):
    """The units' last reports, read when somebody asks. A dead unit reports nothing."""

    def __init__(
        self, units: Mapping[str, UnitProcess], dispatcher: Dispatcher, models: Mapping[str, object]
    ) -> None:
        """`models` by name, those served at the time."""
        self._units = units
        self._dispatcher = dispatcher
        self._ledger = dispatcher.ledger
        self._models = models

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._unit_gauges()
        yield from self._roles()
        stats = [unit.stats for unit in self._units.values() if unit.stats is not None]
        for name, (text, value) in GAUGES.items():
            yield _filled(GaugeMetricFamily(name, text, labels=MODEL_UNIT), stats, value)
        for name, (text, value) in COUNTERS.items():
            yield _filled(CounterMetricFamily(name, text, labels=MODEL_UNIT), stats, value)
        yield _preemptions(stats)
        for name, (text, count) in BATCHES.items():
            yield _by_phase(
                CounterMetricFamily(name, text, labels=(*MODEL_UNIT, "phase")), stats, count
            )

    def _requests(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily(
            "muxrt_requests_queued", "Requests without a first token.", labels=("model",)
        )
        running = GaugeMetricFamily(
            "muxrt_requests_running", "Requests that stream.", labels=("model",)
        )
        for model in list(self._models):
            queued.add_metric([model], self._ledger.queued(model))
            running.add_metric([model], self._ledger.running(model))
        yield from (queued, running)

    def _unit_gauges(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("muxrt_unit_ready", "1 while a unit serves.", labels=("unit",))
        total = GaugeMetricFamily("muxrt_unit_blocks", "Blocks of a unit.", labels=("unit",))
        free = GaugeMetricFamily("muxrt_unit_blocks_free", "Free blocks.", labels=("unit",))
        restarts = CounterMetricFamily("muxrt_unit_restarts", "Restarts.", labels=("unit",))
        for unit in self._units.values():
            ready.add_metric([unit.name], unit.is_ready)
            restarts.add_metric([unit.name], unit.num_restarts)
            if unit.stats is not None:
                total.add_metric([unit.name], unit.stats.blocks_total)
                free.add_metric([unit.name], unit.stats.blocks_free)
        yield from (ready, total, free, restarts)

    def _roles(self) -> Iterator[Metric]:
        role = GaugeMetricFamily(
            "muxrt_role", "1 for what a unit does for a model now.", labels=(*MODEL_UNIT, "role")
        )
        switches = CounterMetricFamily(
            "muxrt_role_switches", "Times that its role changed.", labels=MODEL_UNIT
        )
        for unit in self._units.values():
            for part in unit.spec.models:
                now = self._dispatcher.role_now(part.name, unit.name)
                for each in ROLES:
                    role.add_metric([part.name, unit.name, each], each == now)
                count = self._dispatcher.num_switches[part.name, unit.name]
                switches.add_metric([part.name, unit.name], count)
        yield from (role, switches)


class ReplanCollector(Collector):
    """What a server that replans itself decided, since it was started."""

    def __init__(self, replanner: Replanner) -> None:
        self._replanner = replanner

    def collect(self) -> Iterator[Metric]:
        now, last = self._replanner, self._replanner.last
        done = CounterMetricFamily("muxrt_replans", "Replans, by outcome.", labels=("outcome",))
        for outcome in Outcome:
            done.add_metric([outcome.value], now.counts[outcome])
        yield done
        yield CounterMetricFamily("muxrt_replans_missed", "Due and not made.", now.num_missed)
        yield GaugeMetricFamily(
            "muxrt_replan_running", "1 while one goes on.", now.begun_s is not None
        )
        yield GaugeMetricFamily(
            "muxrt_replan_next_timestamp_seconds", "When the next is due.", now.next_s
        )
        if last is not None:
            yield GaugeMetricFamily(
                "muxrt_replan_last_timestamp_seconds", "When the last began.", last.begun_s
            )


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, stats: list[Stats], value: ModelValue
) -> Metric:
    for unit in stats:
        for model in unit.models:
            family.add_metric([model.model, unit.unit], value(model))
    return family


def _by_phase(
    family: CounterMetricFamily, stats: list[Stats], count: Callable[[BatchStats], float]
) -> Metric:
    for unit in stats:
        for done in unit.batches:
            family.add_metric([done.model, unit.unit, done.phase.value], count(done))
    return family


def _preemptions(stats: list[Stats]) -> Metric:
    family = CounterMetricFamily(
        "muxrt_preemptions", "Sequences that lost their blocks.", labels=(*MODEL_UNIT, "kind")
    )
    for unit in stats:
        for model in unit.models:
            for kind, value in PREEMPTIONS.items():
                family.add_metric([model.model, unit.unit, kind], value(model))
    return family


class Metrics:
    """Counts of this endpoint; one registry per server, none per process."""

    def __init__(
        self,
        models: Iterable[ModelSpec],
        units: Mapping[str, UnitProcess],
        dispatcher: Dispatcher,
    ) -> None:
        self._slos = {model.name: model.slo for model in models}  # of those there were, too
        self._registry = registry = CollectorRegistry(auto_describe=False)
        registry.register(UnitCollector(units, dispatcher, dispatcher.models))
        self._requests = Counter(
            "muxrt_http_requests",
            "HTTP requests to generate, by status; 499 = the client left.",
            ("model", "status"),
            registry=registry,
        )
        self._ttft = Histogram(
            "muxrt_ttft_seconds",
            "Time to first token.",
            ("model",),
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self._tpot = Histogram(
            "muxrt_tpot_seconds",
            "Time per output token after the first, mean of a sequence.",
            ("model",),
            buckets=TPOT_BUCKETS,
            registry=registry,
        )
        self._finished = Counter(
            "muxrt_slo_finished", "Prompts of models with targets.", ("model",), registry=registry
        )
        self._met = Counter(
            "muxrt_slo_met", "Those that met both targets.", ("model",), registry=registry
        )

    def watch(self, replanner: Replanner) -> None:
        """Tell of its decisions, too."""
        self._registry.register(ReplanCollector(replanner))

    def serve(self, models: Iterable[ModelSpec]) -> None:
        """These are the models from now on; requests for others may still end."""
        self._slos.update((model.name, model.slo) for model in models)

    def on_response(self, model: str | None, status: int) -> None:
        """A request to generate was answered; `model` only if it is served here."""
        self._requests.labels(model or "", str(status)).inc()

    def on_finish(self, model: str, timing: Timing) -> None:
        """A sequence came to its end."""
        if timing.ttft_s is not None:
            self._ttft.labels(model).observe(timing.ttft_s)
        if timing.tpot_s is not None:
            self._tpot.labels(model).observe(timing.tpot_s)
        slo = self._slos[model]
        if slo is not None:
            self._finished.labels(model).inc()
            self._met.labels(model).inc(is_met(timing, slo))

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
